"""Decide how a scan runs: real or emulated micro-batches, and how many at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bnprobe.distributed import OPENING
from bnprobe.errors import UsageError, UserCodeError
from bnprobe.probing.batches import to_device
from bnprobe.probing.emulation import Emulation, check_images, self_check
from bnprobe.probing.feed import Feed
from bnprobe.probing.memory import Footprint, is_out_of_memory, plan_images
from bnprobe.probing.runner import Runner
from bnprobe.spec import ScanSettings

Check = Callable[[Runner, list[Any], int], tuple[Emulation, Footprint]]


def plan(runner: Runner, feed: Feed, settings: ScanSettings) -> tuple[Emulation, int]:
    """Whether micro-batches may run together, and how many do.

    Raises:
        UsageError: The physical batch asked for does not hold one micro-batch.
    """
    size = feed.batch_size
    if settings.physical_batch and settings.physical_batch < size:
        raise UsageError(
            f"--physical-batch {settings.physical_batch} does not hold one micro-batch of {size} images."
            " Statistics need the whole micro-batch at once: give at least so many, or a smaller --batch-size."
        )
    if not settings.emulate:
        return _real("As asked for."), 1
    most = settings.physical_batch or plan_images(Footprint(0, 0), runner.device)
    if most // size < OPENING and not settings.batch_sizes:
        # The train path runs as it is; that images are independent on the eval path is still to be known.
        emulation, _ = _check(runner, feed, check_images)
        reason = "One micro-batch fills a physical batch." if emulation.trusted else emulation.reason
        return replace(emulation, reason=reason), 1
    emulation, image = _check(runner, feed, self_check)
    if not emulation.trusted:
        return emulation, 1
    images = settings.physical_batch or plan_images(image, runner.device)
    return emulation, max(1, images // size)


def _check(runner: Runner, feed: Feed, check: Check) -> tuple[Emulation, Footprint]:
    """Run the self-check on the first micro-batches, which are measured afterwards."""
    unknown = Footprint(0, 0)
    checked = feed.look_ahead(OPENING)
    if len(checked) < OPENING:
        return _real("The data gives only one micro-batch."), unknown
    try:
        return check(runner, [to_device(batch, runner.device) for batch in checked], feed.batch_size)
    except UserCodeError:
        if runner.autocast is None:
            raise
        return _real("The self-check runs without autocast, and the model does not."), unknown
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _real("There is no memory for two micro-batches at once."), unknown


def _real(reason: str) -> Emulation:
    return Emulation(trusted=False, reason=reason, check=None, layouts={})
