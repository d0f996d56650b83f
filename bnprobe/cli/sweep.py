"""``bnprobe sweep``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnprobe.cli import options
from bnprobe.cli.command import Command
from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS, NothingToProbeError, UsageError

if TYPE_CHECKING:
    from bnprobe.config.spec import Spec
    from bnprobe.records import SweepReport

_SWEEP = "Sweep"
_CUMULATIVE = "cumulative"
_RATES = re.compile(rf"[-+\d.eE]+(,.*)?|{_CUMULATIVE}(,.*)?")
_USUAL = "usual"


class SweepCommand(Command):
    """Accepts ``--momentum`` with and without rates; typer does not support an optional value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give ``--momentum`` without a value the default rates."""
        filled: list[str] = []
        for position, word in enumerate(args):
            following = args[position + 1] if position + 1 < len(args) else ""
            bare = word == "--momentum" and not _RATES.fullmatch(following)
            filled += [word, _USUAL] if bare else [word]
        return super().parse_args(ctx, filled)


def sweep(
    context: typer.Context,
    target: options.Target,
    checkpoint: options.Checkpoint = None,
    key: options.Key = None,
    strip_prefix: options.StripPrefix = None,
    model_arg: options.ModelArg = None,
    unsafe_load: options.UnsafeLoad = False,
    batch_size: options.BatchSize = None,
    input_shape: options.InputShape = None,
    seed: options.Seed = None,
    batch_sizes: Annotated[
        str | None,
        options.option(_SWEEP, "--batch-sizes", "Sizes measured at inference (default 1,2,4,8,16,32,64).", "N,N"),
        options.Sets("scan.batch_sizes"),
    ] = None,
    train_sizes: Annotated[
        str | None, options.option(_SWEEP, "--train-sizes", "Measure training at these sizes too.", "N,N")
    ] = None,
    momentum: Annotated[
        str | None,
        options.option(
            _SWEEP,
            "--momentum",
            "Replay the running average with these momentum values, e.g. 0.1,0.01,cumulative (default: 0.3 to 0.001).",
            "[A,A]",
        ),
    ] = None,
    shift: Annotated[
        float | None,
        options.option(
            _SWEEP, "--shift", "With --momentum: add S standard deviations to the means from halfway on.", "S"
        ),
    ] = None,
    scale: Annotated[
        float | None,
        options.option(
            _SWEEP, "--scale", "With --momentum: multiply the standard deviations by F from halfway on.", "F"
        ),
    ] = None,
    batches: options.Batches = None,
    max_batches: options.MaxBatches = None,
    device: options.Device = None,
    autocast: options.Autocast = None,
    physical_batch: options.PhysicalBatch = None,
    no_emulate: options.NoEmulate = False,
    threshold: options.Threshold = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    format_: options.ReportFormat = options.TERMINAL,
    output: options.Output = None,
    force: options.ForceReport = False,
    verbose: options.Verbose = False,
    show_all: options.ShowAll = False,
    exit_zero: options.ExitZero = False,
) -> None:
    """Measure the mismatch at other batch sizes, and which momentum of the running average would track best.

    Exit codes: 0 clean at the scanned batch size, 1 findings, 2 error in usage, spec or your code, 3 nothing to probe.
    """
    from bnprobe.cli.console import check_output, deliver, verbosely
    from bnprobe.config.load import build_spec
    from bnprobe.files import refuse_input
    from bnprobe.records import SweepReport
    from bnprobe.report import renderer
    from bnprobe.report.sweep import one_line

    sizes = _sizes("--train-sizes", train_sizes)
    rates = _rates(momentum)
    if momentum is None and (shift is not None or scale is not None):
        raise UsageError("--shift and --scale change the data that --momentum replays: give --momentum too.")
    render = renderer(format_, SweepReport)
    render = verbosely(render) if verbose else render
    check_output(output, force)
    spec = build_spec(
        target,
        options.overrides(context),
    )
    if output is not None:
        refuse_input(output, [target, *spec.files()])
    replayed = {"rates": rates, "shift": shift, "scale": scale}
    report = _measure(spec, sizes, None if momentum is None else replayed)
    deliver(report, render, output, show_all, one_line(report), force)
    findings = any(layer.flagged for layer in report.layers) and not exit_zero
    raise typer.Exit(EXIT_FINDINGS if findings else EXIT_CLEAN)


def _measure(spec: Spec, train_sizes: tuple[int, ...], replayed: dict[str, Any] | None) -> SweepReport:
    """Sweep, and show progress.

    Args:
        spec: What to measure.
        train_sizes: Further sizes of the train path.
        replayed: Fields of ``MomentumPlan``, with None for defaults; None: nothing is replayed.

    Raises:
        NothingToProbeError: Ctrl-C before anything was measured.
    """
    from bnprobe.cli.console import progress_bar
    from bnprobe.cli.processes import importing

    try:
        with progress_bar() as show:
            with importing():
                from bnprobe.analysis.momentum import MomentumPlan
                from bnprobe.commands.sweep import SweepPlan, sweep_spec
            given = {name: value for name, value in (replayed or {}).items() if value is not None}
            momentum = None if replayed is None else MomentumPlan(**given)
            return sweep_spec(spec, SweepPlan(train_sizes=train_sizes, momentum=momentum), show)
    except KeyboardInterrupt:
        raise NothingToProbeError("Interrupted before the first scan was complete; there is no report.") from None


def _sizes(name: str, text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise UsageError(f"{name} {text} is not a list of batch sizes: give whole numbers and commas, as in 8,32.")
    return tuple(sorted({int(part) for part in text.split(",")}))


def _rates(text: str | None) -> tuple[float | None, ...] | None:
    """Parse rates, where None stands for the cumulative average; None: the default rates."""
    if text is None or text == _USUAL:
        return None
    try:
        return tuple(None if part == _CUMULATIVE else float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--momentum {text} is not a list of momentum values: give numbers and commas, as in 0.1,0.01, or the word"
            f" {_CUMULATIVE}."
        ) from None
