"""``bnprobe scan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bnprobe.cli import options
from bnprobe.cli.checkpoints import expanded
from bnprobe.cli.processes import importing, is_main
from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS, BnprobeError, NothingToProbeError

if TYPE_CHECKING:
    from bnprobe.config.spec import Spec
    from bnprobe.records import Report

FURTHER = "Further measurements"


def scan(
    context: typer.Context,
    target: options.Target,
    checkpoint: Annotated[
        list[str] | None,
        options.option(
            options.MODEL,
            "--checkpoint",
            "Weights: a file of safetensors or torch.save, or a folder with one. Several, or a pattern such as"
            " 'run/*.ckpt', are scanned one after the other and compared.",
            "PATH",
        ),
        options.Sets("checkpoint.path", lambda given: expanded(given)[0]),
    ] = None,
    key: options.Key = None,
    strip_prefix: options.StripPrefix = None,
    model_arg: options.ModelArg = None,
    unsafe_load: options.UnsafeLoad = False,
    data: options.Data = None,
    eval_data: options.EvalData = None,
    batch_size: options.BatchSize = None,
    input_shape: options.InputShape = None,
    seed: options.Seed = None,
    batches: options.Batches = None,
    max_batches: options.MaxBatches = None,
    batch_sizes: Annotated[
        str | None,
        options.option(options.RUN, "--batch-sizes", "Measure inference at these sizes too, e.g. 1,2,4,8.", "N,N"),
        options.Sets("scan.batch_sizes"),
    ] = None,
    device: options.Device = None,
    autocast: options.Autocast = None,
    physical_batch: options.PhysicalBatch = None,
    no_emulate: options.NoEmulate = False,
    what_if: Annotated[
        bool | None,
        options.option(
            FURTHER,
            "--what-if/--no-what-if",
            "Try remedies without training on up to 512 samples, and in larger batches; or none, which is faster. By"
            " default they are tried on few samples, and only where something may be wrong.",
        ),
        options.Sets("scan.what_if"),
    ] = None,
    train_steps: Annotated[
        int | None,
        options.option(FURTHER, "--train-steps", "Train a copy for N steps and watch its running statistics.", "N"),
        options.Sets("scan.train_steps"),
    ] = None,
    gradients: Annotated[
        bool,
        options.option(FURTHER, "--gradients", "Measure the noise of the backward pass; needs loss()."),
        options.Sets("scan.gradients"),
    ] = False,
    thorough: Annotated[
        bool,
        options.option(
            FURTHER,
            "--thorough",
            "Measure exactly what layers do, and try remedies on up to 512 samples, however long it takes.",
        ),
        options.Sets("scan.thorough"),
    ] = False,
    goal: options.Goal = None,
    threshold: options.Threshold = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    select: options.Select = None,
    ignore: options.Ignore = None,
    format_: options.ReportFormat = None,
    output: options.Output = None,
    output_dir: options.OutputDir = None,
    baseline: options.KnownFindings = None,
    write_baseline: options.WriteBaseline = None,
    force: options.ForceReport = False,
    verbose: options.Verbose = False,
    show_all: options.ShowAll = False,
    exit_zero: options.ExitZero = False,
) -> None:
    """Measure every BN layer in training and at inference; report which ones disagree, why, and what to do.

    Exit codes: 0 no errors found (there may be warnings), 1 errors found (in one of several checkpoints), 2 error in
    usage, spec or your code, 3 nothing could be probed.
    """
    from bnprobe.cli.baselines import Baselines
    from bnprobe.cli.checkpoints import Several
    from bnprobe.cli.delivery import Delivery, with_command
    from bnprobe.config.load import build_spec
    from bnprobe.records import Report
    from bnprobe.rules.selection import selected

    paths = expanded(checkpoint or [])
    if len(paths) > 1:
        several = Several(paths, format_, output=output, folder=output_dir, force=force, show_all=show_all)
        several.check(target, alone={"--baseline": baseline, "--write-baseline": write_baseline})
        spec = build_spec(target, options.overrides(context))
        selected(spec.rules)  # report a wrong code before torch is imported
        raise typer.Exit(several.scan(spec, _measure, exit_zero))
    delivery = Delivery(
        "scan", Report, format_, output=output, folder=output_dir, force=force, show_all=show_all, verbose=verbose
    )
    baselines = Baselines(baseline, write_baseline)
    if is_main():
        delivery.check(baselines.read, baselines.written)
    spec = build_spec(target, options.overrides(context))
    if is_main():
        delivery.check([*baselines.read, target, *spec.files()], baselines.written)
    selected(spec.rules)  # report a wrong code before torch is imported
    try:
        report = _measure(spec)
    except BnprobeError as error:
        if error.report is not None and is_main():
            delivery.deliver(with_command(error.report))
        raise
    narrowed = bool(spec.rules.select or spec.rules.ignore)
    report = baselines.deliver(with_command(report), narrowed, delivery if is_main() else None)
    from bnprobe.analysis.diagnosis import has_findings

    raise typer.Exit(EXIT_FINDINGS if has_findings(report, spec.rules) and not exit_zero else EXIT_CLEAN)


def _measure(spec: Spec) -> Report:
    """Scan, and show progress.

    Raises:
        NothingToProbeError: Ctrl-C before anything was measured.
    """
    from bnprobe.cli.console import progress_bar

    measured = 0
    try:
        with progress_bar(shown=is_main()) as show:
            with importing():
                from bnprobe.commands.scan import scan_spec
                from bnprobe.distributed import connected

            def progress(done: int, planned: int) -> None:
                nonlocal measured
                measured = done
                show(done, planned)

            with connected() as world:
                return scan_spec(spec, progress, world, show.announce)
    except KeyboardInterrupt:
        if measured:
            raise
        raise NothingToProbeError("Interrupted before anything was measured; there is no report.") from None
