"""Drive the two paths over the user's batches until enough is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bnprobe.errors import BnprobeError, DataError, DeviceError, UsageError, UserCodeError
from bnprobe.probing.accumulate import Path
from bnprobe.probing.evidence import Evaluation, Evidence, channels_of, layer_sums, path_evidence
from bnprobe.probing.feed import Feed
from bnprobe.probing.measurement import Measurement
from bnprobe.probing.output import OutputSums
from bnprobe.probing.plan import plan
from bnprobe.probing.replicates import ImagePool, ReplicateSums
from bnprobe.probing.runner import Runner
from bnprobe.records import StopReason
from bnprobe.spec import ScanSettings
from bnprobe.stats.theory import mismatch_iid
from bnprobe.stats.uncertainty import mean_interval, standing

Progress = Callable[[int, int], None]
"""Called with the micro-batches measured, and the number after which the scan looks again."""

FIRST_LOOK = 16
"""Micro-batches before the first look at what is decided; the number doubles from look to look."""

FEWEST = 8
"""Micro-batches wanted of every size in --batch-sizes before the scan may stop by itself."""


@dataclass(frozen=True)
class Source:
    """Micro-batches to draw.

    Attributes:
        batches: Yields batches of ``batch_size`` images; the last one may be partial.
        most: Draw at most so many; None: as the scan decides.
        keep: Keep the first of them for what is measured afterwards.
    """

    batches: Iterable[Any]
    batch_size: int
    most: int | None = None
    keep: int = 0


STOPPING_CONFIDENCE = 0.99
"""Of the intervals by which a scan stops: it looks up to five times, and every look may be wrong by chance."""


def probe(
    runner: Runner, data: Source, settings: ScanSettings, progress: Progress, evaluation: Source | None = None
) -> Evidence:
    """Measure both paths on the same micro-batches, and the eval path on the evaluation data; ``runner`` is installed.

    Ctrl-C and errors of the user's code end the measurement and keep what there is, if there is anything.

    Raises:
        KeyboardInterrupt, DataError, UserCodeError, DeviceError: Before the first micro-batch was measured; see
            ``Feed``, ``Runner`` and ``Measurement``. Later errors are in ``Evidence.failure``.
    """
    started = time.perf_counter()
    feed = Feed(data.batches, data.batch_size, data.keep)
    measurement = _prepare(runner, feed, settings)
    held_out: Evaluation | None = None
    failure: BnprobeError | None = None
    try:
        stopped = _measure_until_done(measurement, feed, settings, progress)
        feed.fill()
        if evaluation is not None:
            held_out = _evaluate(measurement, evaluation, progress)
    except KeyboardInterrupt:
        if measurement.batches == 0:
            raise
        stopped = "interrupted"
    except (UserCodeError, DataError, DeviceError) as error:
        if measurement.batches == 0:
            raise
        stopped, failure = "failed", error
    return _evidence(measurement, feed, held_out, stopped, failure, time.perf_counter() - started)


def _evaluate(measured: Measurement, source: Source, progress: Progress) -> Evaluation:
    """The eval path on as many micro-batches of evaluation data as were measured, or on all that there are."""
    started = time.perf_counter()
    feed = Feed(source.batches, source.batch_size, source.keep)
    runner, layers = measured.runner, measured.runner.layers.layers
    path = Path(layers, source.batch_size, runner.device, ReplicateSums())
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
    planned = measured.batches if source.most is None else source.most
    while measurement.batches < planned:
        progress(measurement.batches, planned)
        micro_batches = feed.take(min(measurement.at_once, planned - measurement.batches))
        if not micro_batches:
            break
        measurement.step(micro_batches)
    feed.fill()
    images = measurement.batches * source.batch_size
    seconds = time.perf_counter() - started
    return Evaluation(
        path_evidence(path), measurement.output.score("eval"), images, seconds, source.batch_size, feed.kept
    )


def _prepare(runner: Runner, feed: Feed, settings: ScanSettings) -> Measurement:
    size, layers, device = feed.batch_size, runner.layers.layers, runner.device
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
        train=Path(layers, size, device, ReplicateSums()),
        steady=Path(layers, size, device, ReplicateSums()),
        eval=Path(layers, size, device, ReplicateSums(), ImagePool(settings.seed)),
        batch_sizes={other: Path(layers, other, device) for other in settings.batch_sizes},
        output=OutputSums(),
    )


def _measure_until_done(measurement: Measurement, feed: Feed, settings: ScanSettings, progress: Progress) -> StopReason:
    for look in _looks(settings):
        while measurement.batches < look:
            progress(measurement.batches, look)
            micro_batches = feed.take(min(measurement.at_once, look - measurement.batches))
            if not micro_batches:
                return "data_exhausted"
            measurement.step(micro_batches)
        progress(measurement.batches, look)
        if settings.batches is None and _all_decided(measurement, settings):
            return "decided"
    return "requested" if settings.batches else "max_batches"


def _looks(settings: ScanSettings) -> Iterator[int]:
    if settings.batches:
        yield settings.batches
        return
    look = FIRST_LOOK
    while look < settings.max_batches:
        yield look
        look *= 2
    yield settings.max_batches


def _all_decided(measurement: Measurement, settings: ScanSettings) -> bool:
    """Whether no layer's interval straddles its threshold: more batches would change no verdict."""
    if measurement.batches * measurement.batch_size < FEWEST * max(settings.batch_sizes, default=0):
        return False
    paths = [layer_sums(path) for path in (measurement.train, measurement.eval)]
    for layer in measurement.runner.layers.selected:
        limit = mismatch_iid(settings.threshold_of(layer.name, *layer.aliases))
        found = [path[layer.index] for path in paths if layer.index in path]
        intervals = [mean_interval(sums.count, sums.total, sums.square, STOPPING_CONFIDENCE) for sums in found]
        if standing(intervals, limit) == "undecided":
            return False
    return True


def _evidence(
    measurement: Measurement,
    feed: Feed,
    held_out: Evaluation | None,
    stopped: StopReason,
    failure: BnprobeError | None,
    seconds: float,
) -> Evidence:
    pool = measurement.eval.pool
    assert pool is not None  # _prepare gave the eval path one
    return Evidence(
        layers=measurement.runner.layers,
        train=path_evidence(measurement.train),
        eval=path_evidence(measurement.eval),
        steady=path_evidence(measurement.steady) if measurement.random else None,
        steady_seconds=measurement.steady_seconds,
        evaluation=held_out,
        pool=pool.per_call(channels_of(measurement.eval)),
        pool_bytes=pool.bytes,
        scores={path: measurement.output.score(path) for path in measurement.by_batch},
        batch_sizes={size: path_evidence(path) for size, path in measurement.batch_sizes.items()},
        values=measurement.values,
        by_batch={name: frozenset(indices) for name, indices in measurement.by_batch.items()},
        entered=frozenset(measurement.entered),
        functional=frozenset(measurement.functional),
        output=measurement.output.result(),
        batch_size=measurement.batch_size,
        batches=measurement.batches,
        left_out=feed.left_out,
        physical_batch=measurement.largest,
        kept=feed.kept,
        at_once=measurement.at_once,
        trust=measurement.emulation,
        emulated=measurement.largest > measurement.batch_size,
        emulation=measurement.emulation.reason,
        self_check=measurement.emulation.check,
        stopped=stopped,
        failure=failure,
        seconds=seconds,
    )
