"""``bnprobe recalibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnprobe.cli import options
from bnprobe.config import PathChoice
from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS

if TYPE_CHECKING:
    from bnprobe.commands.recalibrate import Repaired
    from bnprobe.config.spec import Spec

RECALIBRATION = "Recalibration"


def recalibrate(
    context: typer.Context,
    target: options.Target,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Weights (.safetensors); record.json, before.json and after.json are written beside them.",
            rich_help_panel=options.REPORT,
            metavar="FILE",
        ),
    ],
    checkpoint: options.Checkpoint = None,
    key: options.Key = None,
    strip_prefix: options.StripPrefix = None,
    model_arg: options.ModelArg = None,
    unsafe_load: options.UnsafeLoad = False,
    data: options.Data = None,
    eval_data: options.EvalData = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = None,
    path: Annotated[
        PathChoice,
        options.option(
            RECALIBRATION,
            "--path",
            "train: one pass, large batches; eval: using the new statistics of earlier layers, one pass if all samples"
            " fit into memory at once, else one per layer; auto: train, or the better of both where samples cannot be"
            " mixed; micro-batch-...: batches as in training (--batch-size), variances pooled or averaged.",
            "NAME",
        ),
    ] = "auto",
    batches: Annotated[
        int | None,
        typer.Option(
            "--batches",
            help="Use N batches (default: all).",
            min=1,
            max=10**6,
            rich_help_panel=RECALIBRATION,
            metavar="N",
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        options.option(RECALIBRATION, "--layers", "Only layers whose name matches; repeatable.", "GLOB"),
    ] = None,
    include_frozen: Annotated[
        bool,
        options.option(
            RECALIBRATION, "--include-frozen", "Recalibrate layers, too, that model.train() leaves in eval mode."
        ),
    ] = False,
    goal: options.Goal = None,
    max_batches: options.MaxBatches = None,
    device: options.Device = None,
    autocast: options.Autocast = None,
    threshold: options.Threshold = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    select: options.Select = None,
    ignore: options.Ignore = None,
    force: options.Force = False,
    format_: options.ReportFormat = None,
    output_dir: options.OutputDir = None,
    verbose: options.Verbose = False,
    show_all: options.ShowAll = False,
    exit_zero: options.ExitZero = False,
) -> None:
    """Recalibrate the running statistics of BN layers on training data, without training; scan before and after.

    Exit codes: 0 clean; 1 findings in the recalibrated model, or it scores worse than as loaded and was not written;
    2 error in usage, spec or your code; 3 nothing could be recalibrated.
    """
    from bnprobe.analysis.diagnosis import has_findings
    from bnprobe.cli.artifacts import Artifacts
    from bnprobe.cli.delivery import Delivery
    from bnprobe.config.load import build_spec
    from bnprobe.report.repair import RepairReport
    from bnprobe.rules.selection import selected

    delivery = Delivery(
        "recalibrate", RepairReport, format_, folder=output_dir, force=force, show_all=show_all, verbose=verbose
    )
    artifacts = Artifacts(output, force)
    with artifacts.alone():
        artifacts.check()
        delivery.check()
        given = options.overrides(context)
        spec = build_spec(target, given)
        selected(spec.rules)  # report a wrong code before torch is imported
        repaired = _recalibrate(spec, path, tuple(layers or ()), batches, include_frozen)
        record, files = artifacts.write(repaired.record, repaired.weights, repaired.before, repaired.after)
    delivery.deliver(RepairReport(record, repaired.before, repaired.after, files))
    if record.weights is None:
        raise typer.Exit(EXIT_FINDINGS)
    flagged = repaired.after is not None and has_findings(repaired.after, spec.rules)
    raise typer.Exit(EXIT_FINDINGS if flagged and not exit_zero else EXIT_CLEAN)


def _recalibrate(
    spec: Spec, path: PathChoice, layers: tuple[str, ...], batches: int | None, include_frozen: bool
) -> Repaired:
    from bnprobe.cli.console import progress_bar, typed_command
    from bnprobe.cli.processes import importing

    with progress_bar() as show:
        with importing():
            from bnprobe.commands.recalibrate import recalibrate_spec
        return recalibrate_spec(
            spec,
            path=path,
            layers=layers,
            num_batches=batches,
            include_frozen=include_frozen,
            command=typed_command(),
            progress=show,
        )
