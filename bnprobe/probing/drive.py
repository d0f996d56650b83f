"""Drive the two paths over the user's batches until enough is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bnprobe.distributed import ALONE, EVERYTHING, Share, World
from bnprobe.errors import UsageError
from bnprobe.probing.accumulate import Path
from bnprobe.probing.evidence import Evidence, layer_sums
from bnprobe.probing.feed import Feed
from bnprobe.probing.interrupts import deferred_interrupts
from bnprobe.probing.looks import CAUGHT, Ending, Look, ended_by, meet, together
from bnprobe.probing.measurement import Measurement
from bnprobe.probing.merge import HeldOut, Part, merge
from bnprobe.probing.output import OutputSums
from bnprobe.probing.parts import evidence_of, held_out_of, part_of
from bnprobe.probing.plan import plan
from bnprobe.probing.replicates import ImagePool, ReplicateSums
from bnprobe.probing.runner import Runner
from bnprobe.records import StopReason
from bnprobe.spec import ScanSettings
from bnprobe.stats.theory import mismatch_iid
from bnprobe.stats.uncertainty import mean_interval, standing

Progress = Callable[[int, int], None]
"""Called with the micro-batches measured, and the number after which the scan looks again."""


def no_progress(done: int, planned: int) -> None:
    """Report progress to nobody."""


FIRST_LOOK = 16
"""Micro-batches before the first look at what is decided; the number doubles from look to look."""

FEWEST = 8
"""Micro-batches wanted of every size in --batch-sizes before the scan may stop by itself."""

STOPPING_CONFIDENCE = 0.99
"""Of the intervals by which a scan stops: it looks up to five times, and every look may be wrong by chance."""


@dataclass(frozen=True)
class Source:
    """Micro-batches to draw.

    Attributes:
        batches: Yields batches of ``batch_size`` images; the last one may be partial.
        most: Draw at most so many; None: as the scan decides.
        keep: Keep the first of them for what is measured afterwards.
        share: Which of them are this process's.
        dealt: ``batches`` gives only those that this process reads.
    """

    batches: Iterable[Any]
    batch_size: int
    most: int | None = None
    keep: int = 0
    share: Share = EVERYTHING
    dealt: bool = False

    def feed(self) -> Feed:
        """Draw from the beginning."""
        return Feed(self.batches, self.batch_size, self.keep, self.share, self.dealt)


def probe(
    runner: Runner,
    data: Source,
    settings: ScanSettings,
    progress: Progress,
    evaluation: Source | None = None,
    world: World = ALONE,
) -> Evidence | None:
    """Measure both paths on the same micro-batches, and the eval path on the evaluation data; ``runner`` is installed.

    Ctrl-C and errors of the user's code end the measurement and keep what there is, if there is anything. In several
    processes each measures its share; they meet when the scan looks at what is decided and at the end.

    Returns:
        What all processes measured, in process 0; None in the others.

    Raises:
        KeyboardInterrupt, DataError, UserCodeError, DeviceError: Before the first micro-batch was measured; see
            ``Feed``, ``Runner`` and ``Measurement``. Later errors are in ``Evidence.failure``.
        ProcessError: Another process is gone.
    """
    started = time.perf_counter()
    feed = data.feed()
    measurement = _prepare(runner, feed, settings)
    ending, total = _measure_until_done(measurement, feed, settings, progress, world)
    held_out: HeldOut | None = None
    if not ending.early:
        try:
            feed.fill()
            held_out = None if evaluation is None else _evaluate(measurement, evaluation, total, progress, world)
        except CAUGHT as error:
            ending = ended_by(error, world)
    whole, ending = _put_together(part_of(measurement, feed, held_out), ending, world)
    if whole is None:
        return None
    seconds = time.perf_counter() - started
    return evidence_of(whole, runner.layers, feed.batch_size, ending.stopped or "requested", ending.error, seconds)


def _put_together(part: Part, ending: Ending, world: World) -> tuple[Part | None, Ending]:
    """In process 0 what all measured, and how it ended for all; the part of a process is dropped once it is added."""
    whole, endings = None, [ending]
    try:
        with deferred_interrupts():
            for position, (received, other) in enumerate(world.to_main((part, ending.portable()))):
                whole = received if whole is None else merge(whole, received)
                if position:
                    endings.append(other)
    except KeyboardInterrupt:
        endings.append(Ending("interrupted"))
    return whole, together(endings)


def _evaluate(measured: Measurement, source: Source, batches: int, progress: Progress, world: World) -> HeldOut:
    """The eval path on as many micro-batches of evaluation data as were measured, or on all that there are."""
    started = time.perf_counter()
    feed, share = source.feed(), source.share
    runner, layers = measured.runner, measured.runner.layers.layers
    path = Path(layers, source.batch_size, runner.device, ReplicateSums(share))
    measurement = Measurement(
        runner=runner,
        batch_size=source.batch_size,
        emulation=measured.emulation,
        at_once=max(1, measured.largest // source.batch_size) if measured.emulation.trusted else 1,
        train=path,
        steady=path,
        eval=path,
        batch_sizes={},
        output=OutputSums(),
        paths=("eval",),
        random=False,
    )
    planned = batches if source.most is None else source.most
    _measure(planned, measurement, feed, progress, world)
    feed.fill()
    return held_out_of(measurement, feed, time.perf_counter() - started)


def _prepare(runner: Runner, feed: Feed, settings: ScanSettings) -> Measurement:
    size, layers, device, share = feed.batch_size, runner.layers.layers, runner.device, feed.share
    emulation, at_once = plan(runner, feed, settings)
    if settings.batch_sizes and not emulation.trusted:
        raise UsageError(
            f"--batch-sizes needs images that can be regrouped, and here they cannot. {emulation.reason}"
            " Scan each size by itself with --batch-size."
        )
    return Measurement(
        runner=runner,
        batch_size=size,
        emulation=emulation,
        at_once=at_once,
        train=Path(layers, size, device, ReplicateSums(share)),
        steady=Path(layers, size, device, ReplicateSums(share)),
        eval=Path(layers, size, device, ReplicateSums(share), ImagePool(settings.seed)),
        batch_sizes={other: Path(layers, other, device) for other in settings.batch_sizes},
        output=OutputSums(),
    )


def _measure_until_done(
    measurement: Measurement, feed: Feed, settings: ScanSettings, progress: Progress, world: World
) -> tuple[Ending, int]:
    """Measure from look to look; how that ended, and the micro-batches of all processes.

    Every process is at the same look: one that was stopped goes to the next one without measuring.
    """
    own, seen, stopped = Ending(), Look(Ending(), 0, {}, {}), None
    for look in _looks(settings):
        own = own if own.early else _measure_to(look, measurement, feed, progress, world)
        try:
            with deferred_interrupts():
                sums = layer_sums(measurement.train), layer_sums(measurement.eval)
                seen = meet(Look(own, measurement.batches, *sums), world)
                stopped = seen.ending.stopped or _decided(measurement, seen, settings)
        except KeyboardInterrupt as error:
            own = ended_by(error, world)
        if stopped:
            break
    ending = own if own.early else replace(seen.ending, stopped=stopped or _planned_end(settings))
    if ending.early and seen.batches == 0:
        raise ending.error or KeyboardInterrupt
    return ending, seen.batches


def _planned_end(settings: ScanSettings) -> StopReason:
    return "requested" if settings.batches else "max_batches"


def _measure_to(total: int, measurement: Measurement, feed: Feed, progress: Progress, world: World) -> Ending:
    """As ``_measure``; what went wrong is how it ended."""
    try:
        return _measure(total, measurement, feed, progress, world)
    except CAUGHT as error:
        return ended_by(error, world)


def _measure(total: int, measurement: Measurement, feed: Feed, progress: Progress, world: World) -> Ending:
    """Measure this process's micro-batches among the first ``total`` of all.

    Raises:
        KeyboardInterrupt: Here, or another process asked all to stop.
    """
    share = feed.share
    mine = share.count(total)
    while measurement.batches < mine:
        if world.halted:
            raise KeyboardInterrupt
        progress(share.position(measurement.batches), total)
        micro_batches = feed.take(min(measurement.at_once, mine - measurement.batches))
        if not micro_batches:
            return Ending("data_exhausted")
        measurement.step(micro_batches)
    progress(total, total)
    return Ending()


def _looks(settings: ScanSettings) -> Iterator[int]:
    if settings.batches:
        yield settings.batches
        return
    look = FIRST_LOOK
    while look < settings.max_batches:
        yield look
        look *= 2
    yield settings.max_batches


def _decided(measurement: Measurement, seen: Look, settings: ScanSettings) -> StopReason | None:
    """Whether no layer's interval straddles its threshold: more batches would change no verdict."""
    few = seen.batches * measurement.batch_size < FEWEST * max(settings.batch_sizes, default=0)
    if settings.batches is not None or few:
        return None
    for layer in measurement.runner.layers.selected:
        limit = mismatch_iid(settings.threshold_of(layer.name, *layer.aliases))
        found = [path[layer.index] for path in (seen.train, seen.eval) if layer.index in path]
        intervals = [mean_interval(sums.count, sums.total, sums.square, STOPPING_CONFIDENCE) for sums in found]
        if standing(intervals, limit) == "undecided":
            return None
    return "decided"
