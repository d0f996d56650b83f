"""``bnprobe convert``."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnprobe.cli import options
from bnprobe.cli.processes import is_main
from bnprobe.cli.streams import say
from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS, UsageError

if TYPE_CHECKING:
    from bnprobe.cli.artifacts import Artifacts
    from bnprobe.cli.delivery import Delivery
    from bnprobe.config.spec import Spec

REPAIR, TRAINING, PROOF = "Repair", "Fine-tuning", "Comparison"


def convert(
    context: typer.Context,
    target: options.Target,
    checkpoint: options.Checkpoint = None,
    key: options.Key = None,
    strip_prefix: options.StripPrefix = None,
    model_arg: options.ModelArg = None,
    unsafe_load: options.UnsafeLoad = False,
    data: options.Data = None,
    eval_data: options.EvalData = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = None,
    to: Annotated[
        str | None,
        options.option(REPAIR, "--to", "What the layers become.", "NAME"),
        options.Sets("repair.to"),
    ] = None,
    blend: Annotated[
        float | None,
        options.option(
            REPAIR, "--blend", "Weight of the own statistics, of gated, instance-renorm, example-weighing.", "X"
        ),
        options.Sets("repair.blend"),
    ] = None,
    groups: Annotated[
        int | None,
        options.option(REPAIR, "--groups", "Group norm: the largest number of groups (default 32).", "N"),
        options.Sets("repair.groups"),
    ] = None,
    virtual_batch_size: Annotated[
        int | None,
        options.option(REPAIR, "--virtual-batch-size", "Ghost: most samples in a part of a batch (default 32).", "N"),
        options.Sets("repair.virtual_batch_size"),
    ] = None,
    window: Annotated[
        int | None,
        options.option(REPAIR, "--window", "Mabn, cross-iteration: batches that are averaged (default 16).", "N"),
        options.Sets("repair.window"),
    ] = None,
    burn_in: Annotated[
        int | None,
        options.option(REPAIR, "--burn-in", "Cross-iteration: batches as BN before (default 0).", "N"),
        options.Sets("repair.burn_in"),
    ] = None,
    domains: Annotated[
        int | None,
        options.option(REPAIR, "--domains", "Per-domain: how many there are (default 2).", "N"),
        options.Sets("repair.domains"),
    ] = None,
    layers: Annotated[
        list[str] | None,
        options.option(REPAIR, "--layers", 'Convert layers whose name matches ("*": all).', "GLOB"),
        options.Sets("repair.layers"),
    ] = None,
    report: Annotated[
        Path | None,
        options.option(REPAIR, "--report", "Convert the layers that this JSON report flags.", "FILE"),
        options.Sets("repair.report"),
    ] = None,
    dry_run: Annotated[bool, options.option(REPAIR, "--dry-run", "Only print what would change, and why.")] = False,
    check: Annotated[
        bool, options.option(REPAIR, "--check", "Like --dry-run; exit 1 if a layer needs repair.")
    ] = False,
    finetune: Annotated[
        bool, options.option(TRAINING, "--finetune", "Train the repaired model, and plain BN as the baseline.")
    ] = False,
    steps: Annotated[
        int | None,
        options.option(TRAINING, "--steps", "Optimizer steps of a run (default 500).", "N"),
        options.Sets("train.steps"),
    ] = None,
    epochs: Annotated[
        int | None,
        options.option(TRAINING, "--epochs", "Length of a run in passes over the data, instead of --steps.", "N"),
        options.Sets("train.epochs"),
    ] = None,
    rate: Annotated[
        float | None, options.option(TRAINING, "--lr", "Learning rate of the spec's optimizer (default 0.01).", "X")
    ] = None,
    resume: Annotated[
        bool,
        options.option(TRAINING, "--resume", "Continue an earlier run that was stopped."),
    ] = False,
    seeds: Annotated[
        int | None,
        options.option(PROOF, "--seeds", "Training runs of every model compared (default 1).", "N"),
        options.Sets("repair.seeds"),
    ] = None,
    require: Annotated[
        list[str] | None,
        options.option(
            PROOF, "--require", 'Exit 1 unless this holds, e.g. "metric>=0.97", "gain>0", "flagged==0".', "EXPR"
        ),
        options.Sets("repair.require"),
    ] = None,
    goal: options.Goal = None,
    batches: options.Batches = None,
    max_batches: options.MaxBatches = None,
    device: options.Device = None,
    autocast: options.Autocast = None,
    threshold: options.Threshold = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Weights (.safetensors); the record and reports are written beside them.",
            rich_help_panel=options.REPORT,
            metavar="FILE",
        ),
    ] = None,
    force: options.Force = False,
    format_: options.ReportFormat = None,
    output_dir: options.OutputDir = None,
    verbose: options.Verbose = False,
    show_all: options.ShowAll = False,
) -> None:
    """Convert the layers that a scan flags, fine-tune, measure the gain over plain BN, and write deployable weights.

    Exit codes: 0 repaired, or nothing to repair; 1 --check found layers, a requirement is not met, training diverged,
    or the weights score worse than as loaded and were not written; 2 error in usage, spec or your code; 3 nothing could
    be probed, or training was stopped.
    """
    from bnprobe.cli.delivery import Delivery
    from bnprobe.config.load import build_spec
    from bnprobe.config.targets import TARGETS, require_used
    from bnprobe.records import Plan
    from bnprobe.report.repair import RepairReport

    given = options.overrides(context)
    if layers and report:
        raise UsageError("--layers and --report both select the layers to convert: give one.")
    if not finetune:
        _refuse_untrained(steps=steps, epochs=epochs, lr=rate, seeds=seeds, resume=resume)
    spec = _with_rate(_with_length(build_spec(target, given), steps, epochs), rate)
    settings = {name: given.get(f"repair.{name}") for each in TARGETS for name in each.settings}
    require_used(spec.repair.to, settings, _as_option)
    where = partial(Delivery, "convert", formats=format_, folder=output_dir, force=force)
    delivery = partial(where, show_all=show_all, verbose=verbose)
    if check or dry_run:
        option = "--check" if check else "--dry-run"
        useless = force and output_dir is None
        _refuse_beside(option, finetune=finetune, output=output, resume=resume, require=require, force=useless)
        raise typer.Exit(_show_plan(spec, check, delivery(Plan)))
    if output is None:
        raise UsageError("convert writes weights: give -o FILE.safetensors, or --dry-run or --check for the plan only.")
    raise typer.Exit(_repair(spec, output, delivery(RepairReport), finetune=finetune, resume=resume, force=force))


def _as_option(name: str, value: Any) -> str:
    return f"--{name.replace('_', '-')} {value}"


def _refuse_untrained(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise UsageError(f"--{name} has an effect only with --finetune: add --finetune, or leave it out.")


def _with_length(spec: Spec, steps: int | None, epochs: int | None) -> Spec:
    """The spec with another length of training; steps replace epochs of the spec file, and the reverse."""
    if (steps is None) == (epochs is None):
        return spec
    return spec.model_copy(update={"train": spec.train.model_copy(update={"steps": steps, "epochs": epochs})})


def _with_rate(spec: Spec, rate: float | None) -> Spec:
    """The spec with another learning rate of its optimizer."""
    if rate is None:
        return spec
    optimizer = spec.train.optimizer
    optimizer = optimizer.model_copy(update={"args": {**optimizer.args, "lr": rate}})
    return spec.model_copy(update={"train": spec.train.model_copy(update={"optimizer": optimizer})})


def _refuse_beside(option: str, **others: Any) -> None:
    for name, value in others.items():
        if value:
            raise UsageError(
                f"{option} only prints what would change, and --{name} has no effect with it: leave one out."
            )


def _show_plan(spec: Spec, check: bool, delivery: Delivery) -> int:
    """Print the plan; the exit code."""
    from bnprobe.cli.console import progress_bar
    from bnprobe.cli.processes import importing

    delivery.check()
    with progress_bar() as show:
        with importing():
            from bnprobe.commands.convert import plan_spec
        plan = plan_spec(spec, show)
    delivery.deliver(plan)
    return EXIT_FINDINGS if check and (plan.changes or plan.refused) else EXIT_CLEAN


def _repair(spec: Spec, output: Path, delivery: Delivery, *, finetune: bool, resume: bool, force: bool) -> int:
    """Repair, write and print; the exit code."""
    from bnprobe.cli.artifacts import Artifacts
    from bnprobe.config.requirements import parse_requirement
    from bnprobe.files import is_blank
    from bnprobe.paths import is_folder

    for text in spec.repair.require:
        parse_requirement(text)
    artifacts = Artifacts(output, force, trains=finetune)
    resume = resume and is_folder(artifacts.state) and not is_blank(artifacts.state)
    with artifacts.alone() if is_main() else nullcontext():
        if is_main():
            artifacts.check(resume)
            delivery.check()
        return _repair_alone(spec, artifacts, delivery, finetune=finetune, resume=resume, force=force)


def _repair_alone(
    spec: Spec, artifacts: Artifacts, delivery: Delivery, *, finetune: bool, resume: bool, force: bool
) -> int:
    """The same, as the only run that writes there."""
    from bnprobe.cli.console import repair_bars, typed_command
    from bnprobe.cli.processes import importing
    from bnprobe.report.repair import RepairReport

    with repair_bars(shown=is_main()) as (show, show_step):
        with importing():
            from bnprobe.commands.convert import ConvertOptions, repair_spec
            from bnprobe.distributed import connected
        state = artifacts.state.absolute() if finetune else None
        options = ConvertOptions(finetune, state, resume, force, artifacts.tensorboard, typed_command())
        with connected() as world:
            repaired = repair_spec(spec, options, show, show_step, world)
    if not is_main():
        return EXIT_CLEAN
    if repaired is None:
        say("No layer needs repair: nothing was changed or written.")
        return EXIT_CLEAN
    record, files = artifacts.write(repaired.record, repaired.weights, repaired.before, repaired.after)
    delivery.deliver(RepairReport(record, repaired.before, repaired.after, files))
    from bnprobe.analysis.comparison import is_proven

    return EXIT_CLEAN if is_proven(record) and record.weights is not None else EXIT_FINDINGS
