"""``bnprobe drift``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnprobe.cli import options
from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS


def drift(
    context: typer.Context,
    profile: Annotated[Path, typer.Argument(help="The file that bnprobe profile wrote.", metavar="PROFILE")],
    target: options.Target,
    checkpoint: options.Checkpoint = None,
    key: options.Key = None,
    strip_prefix: options.StripPrefix = None,
    model_arg: options.ModelArg = None,
    unsafe_load: options.UnsafeLoad = False,
    data: Annotated[
        str | None,
        options.option(
            options.DATA,
            "--data",
            "The data to compare, as a scan takes it (default: as bnprobe profile takes it, held-out data first).",
            "TARGET",
        ),
        options.Sets("data.target"),
    ] = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = None,
    batches: Annotated[
        int | None,
        options.option(options.RUN, "--batches", "Read at most N batches (default: all).", "N"),
        options.Sets("data.batches"),
    ] = None,
    alpha: Annotated[
        float,
        options.option(options.JUDGE, "--alpha", "Probability of an alarm where the data is like the profile.", "P"),
    ] = 0.01,
    device: options.Device = None,
    autocast: options.Autocast = None,
    format_: options.ReportFormat = None,
    output: options.Output = None,
    output_dir: options.OutputDir = None,
    force: options.ForceReport = False,
    show_all: options.ShowAll = False,
    exit_zero: options.ExitZero = False,
) -> None:
    """Compare data with a profile, layer by layer: is it like what the model is healthy on, and what moved how far?

    It is read in random order where that is possible; a stream as it comes.

    Exit codes: 0 no alarm; 1 alarm; 2 error in usage, spec or your code, or the profile is of other weights; 3 nothing
    could be compared.
    """
    from bnprobe.cli.console import progress_bar
    from bnprobe.cli.delivery import Delivery
    from bnprobe.cli.processes import importing
    from bnprobe.config.load import build_spec
    from bnprobe.records import DriftReport, Profile
    from bnprobe.report.json import read_as

    delivery = Delivery("drift", DriftReport, format_, output=output, folder=output_dir, force=force, show_all=show_all)
    delivery.check([profile])
    spec = build_spec(target, options.overrides(context))
    delivery.check([profile, target, *spec.files()])
    read = read_as(profile, Profile)
    with progress_bar() as show:
        with importing():
            from bnprobe.commands.drift import drift_spec
        found = drift_spec(spec, read, alpha, held_out=data is None, progress=show)
    delivery.deliver(found)
    raise typer.Exit(EXIT_FINDINGS if found.alarm is not None and not exit_zero else EXIT_CLEAN)
