"""``bnprobe export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnprobe.cli import options
from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS, UsageError
from bnprobe.paths import placed

if TYPE_CHECKING:
    from bnprobe.commands.export import Exported
    from bnprobe.config.spec import Spec

EXPORT = "Export"


def _export_format(name: str) -> str:
    from bnprobe.config.exporters import EXPORTERS

    return options.row_name(EXPORTERS, name)


def export(
    context: typer.Context,
    target: options.Target,
    checkpoint: options.Checkpoint = None,
    key: options.Key = None,
    strip_prefix: options.StripPrefix = None,
    model_arg: options.ModelArg = None,
    unsafe_load: options.UnsafeLoad = False,
    data: options.Data = None,
    batch_size: options.BatchSize = None,
    input_shape: options.InputShape = None,
    seed: options.Seed = None,
    to: Annotated[
        str,
        typer.Option("--to", help="Format of the file.", rich_help_panel=EXPORT, metavar="NAME", parser=_export_format),
    ] = "torch-export",
    quantize: Annotated[
        bool, options.option(EXPORT, "--quantize", "Quantize to 8 bits with torch.ao, calibrated on the data.")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            help="Largest accepted difference of the outputs, relative to the largest output.",
            min=0.0,
            rich_help_panel=EXPORT,
            metavar="X",
        ),
    ] = 1e-5,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The exported file (default: the checkpoint's name with another suffix).",
            rich_help_panel=options.REPORT,
            metavar="FILE",
        ),
    ] = None,
    force: Annotated[bool, options.option(options.REPORT, "--force", "Replace an output that exists.")] = False,
    format_: options.ReportFormat = None,
    output_dir: options.OutputDir = None,
) -> None:
    """Export a model for inference, and check that the file gives the model's outputs, also at other batch sizes.

    Exit codes: 0 written, 1 the outputs differ by more than the tolerance (nothing is written), 2 error in usage, spec
    or your code.
    """
    from bnprobe.cli.delivery import Delivery
    from bnprobe.config.load import build_spec
    from bnprobe.files import refuse_input, require_new, write_all
    from bnprobe.records import ExportReport

    delivery = Delivery("export", ExportReport, format_, folder=output_dir, force=force)
    given = options.overrides(context)
    spec = build_spec(target, given)
    path = output or _default(spec, to)
    refuse_input(path, [target, *spec.files()], "-o")
    require_new([path], force)
    delivery.check()
    exported = _export(spec, to, quantize)
    agrees = exported.relative <= tolerance
    if agrees:
        write_all({placed(path): exported.content}, force)
    report = exported.report(str(path) if agrees else None, tolerance)
    delivery.deliver(report)
    raise typer.Exit(EXIT_CLEAN if agrees else EXIT_FINDINGS)


def _default(spec: Spec, to: str) -> Path:
    from bnprobe.config.exporters import EXPORTERS

    if spec.checkpoint.path is None:
        raise UsageError("export writes a file: give -o FILE, or a --checkpoint to name the file after.")
    return Path(spec.checkpoint.path).with_suffix(EXPORTERS[to].suffix)


def _export(spec: Spec, to: str, quantize: bool) -> Exported:
    from bnprobe.cli.processes import importing

    with importing():
        from bnprobe.commands.export import export_spec
    return export_spec(spec, to, quantize)
