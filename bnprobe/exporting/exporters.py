"""The export formats."""

from __future__ import annotations

from bnprobe.exporting.interface import Exporter
from bnprobe.exporting.onnx import OnnxExporter
from bnprobe.exporting.torch_export import TorchExporter
from bnprobe.exporting.torchscript import TorchScriptExporter

EXPORTERS: tuple[Exporter, ...] = (TorchExporter(), TorchScriptExporter(), OnnxExporter())
"""All export formats. A new one takes one file and one line here."""
