"""``bnprobe profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnprobe.cli import options

PROFILE = "Profile"


def profile(
    context: typer.Context,
    target: options.Target,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="The profile, a new file (.json).", rich_help_panel=options.REPORT, metavar="FILE"
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
    batches: Annotated[
        int | None,
        options.option(PROFILE, "--batches", "Read at most N batches (default: as many as a profile holds).", "N"),
        options.Sets("data.batches"),
    ] = None,
    block: Annotated[
        int,
        options.option(
            PROFILE,
            "--block",
            "Samples in a block, whose mean is compared; larger ones show smaller shifts, later.",
            "N",
        ),
    ] = 8,
    device: options.Device = None,
    autocast: options.Autocast = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    force: options.ForceReport = False,
) -> None:
    """Record what healthy samples look like in every BN layer, for bnprobe drift and bnprobe.ShiftMonitor.

    Samples are those of the held-out data; without any, of the training data, to which a model answers otherwise.

    Exit codes: 0 written, 2 error in usage, spec or your code, 3 no layer can be profiled.
    """
    from bnprobe.cli.console import progress_bar
    from bnprobe.cli.delivery import Delivery
    from bnprobe.cli.processes import importing
    from bnprobe.config.load import build_spec
    from bnprobe.records import Profile

    delivery = Delivery("profile", Profile, ["json"], output=output, force=force)
    delivery.check()
    spec = build_spec(target, options.overrides(context))
    delivery.check([target, *spec.files()])
    with progress_bar() as show:
        with importing():
            from bnprobe.commands.profile import profile_spec
        found = profile_spec(spec, block, show)
    delivery.deliver(found)
