"""What a model can be exported to: the registry of export formats.

A row imports no torch, so that the command line can list and validate the formats at once. It names its code as
``"package.module:CLASS"``, which is imported when a model is exported (``bnprobe.commands.exporters``).
"""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.registry import Registry


@dataclass(frozen=True)
class ExportFormat:
    """A kind of file that a model can be written to.

    Attributes:
        name: The name after ``--to``.
        suffix: Suffix of file names, with the dot.
        summary: How the file is made, a phrase for help and documentation.
        exporter: Where its ``bnprobe.commands.exporters.Exporter`` is, as "package.module:CLASS".
        packages: Packages that must be installed in addition to torch.
        runtime: The package that runs the files, without which they are not checked; empty: torch.
        takes_quantized: Whether a model quantized by torch.ao can be written.
    """

    name: str
    suffix: str
    summary: str
    exporter: str
    packages: tuple[str, ...] = ()
    runtime: str = ""
    takes_quantized: bool = False


_HERE = "bnprobe.commands.exporters:"

EXPORTERS: Registry[ExportFormat] = Registry(
    "bnprobe.exporters",
    (
        ExportFormat(
            name="torch-export",
            suffix=".pt2",
            summary="torch.export.export and torch.export.save",
            exporter=_HERE + "TorchExporter",
        ),
        ExportFormat(
            name="torchscript",
            suffix=".pt",
            summary="torch.jit.trace, or torch.jit.script if a trace would freeze a branch that depends on the data",
            exporter=_HERE + "TorchScriptExporter",
            takes_quantized=True,
        ),
        ExportFormat(
            name="onnx",
            suffix=".onnx",
            summary="torch.onnx.export based on torch.export; checked with ONNX Runtime",
            exporter=_HERE + "OnnxExporter",
            packages=("onnx", "onnxscript"),
            runtime="onnxruntime",
        ),
    ),
    lambda row: row.name,
    "export format",
)
