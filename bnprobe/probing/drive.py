"""Drive the two paths over the user's batches until enough is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from bnprobe.errors import BnprobeError, DataError, DeviceError, UsageError, UserCodeError
from bnprobe.probing.accumulate import Path
from bnprobe.probing.batches import CannotEmulateError, join, to_device
from bnprobe.probing.emulation import Emulation, as_sentence
from bnprobe.probing.evidence import Evidence, layer_sums, path_evidence
from bnprobe.probing.feed import Feed
from bnprobe.probing.intercept import Pass, Recorded, Slot
from bnprobe.probing.interrupts import deferred_interrupts
from bnprobe.probing.memory import is_out_of_memory
from bnprobe.probing.output import Contributions, OutputSums, user_values
from bnprobe.probing.plan import plan
from bnprobe.probing.runner import PathName, Runner
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

STOPPING_CONFIDENCE = 0.99
"""Of the intervals by which a scan stops: it looks up to five times, and every look may be wrong by chance."""


@dataclass
class Measurement:
    """The state of a running scan: everything is added at the end of a step, wholly or not at all.

    Attributes:
        batches: Micro-batches measured on both paths.
        at_once: Micro-batches per physical batch.
        largest: Images of the largest physical batch that ran.
        emulation: Whether micro-batches may run together.
        values, by_batch, entered, functional: As in ``Evidence``.
    """

    runner: Runner
    batch_size: int
    emulation: Emulation
    at_once: int
    train: Path
    eval: Path
    batch_sizes: dict[int, Path]
    output: OutputSums
    batches: int = 0
    largest: int = 0
    values: dict[Slot, int] = field(default_factory=dict)
    by_batch: dict[PathName, set[int]] = field(default_factory=lambda: {"train": set(), "eval": set()})
    entered: set[int] = field(default_factory=set)
    functional: set[str] = field(default_factory=set)

    def step(self, micro_batches: list[Any]) -> None:
        """Measure micro-batches that are not on the device yet, as one physical batch where that works.

        Raises:
            DeviceError: Not even one micro-batch fits into memory.
        """
        smaller = self._try(micro_batches)
        for part in smaller:
            self.step(part)

    def _try(self, micro_batches: list[Any]) -> list[list[Any]]:
        """Measure; returns what to measure in smaller parts instead, if anything."""
        try:
            self._measure(micro_batches)
            return []
        except CannotEmulateError as error:
            self.emulation = Emulation(False, as_sentence(error), self.emulation.check, {})
            self.at_once = 1
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._halve(len(micro_batches))
        # Outside the handler the failed step's tensors are no longer referenced by the traceback.
        return [micro_batches[i : i + self.at_once] for i in range(0, len(micro_batches), self.at_once)]

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise DeviceError(
                f"Not even one micro-batch of {self.batch_size} images fits into the memory of {self.runner.device}."
                " Use a smaller --batch-size, --autocast, or another --device."
            )
        self.at_once = tried // 2
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, micro_batches: list[Any]) -> None:
        joined = to_device(join(micro_batches), self.runner.device)
        apart = self.runner.functions.loss or self.runner.functions.metric
        batches = [to_device(batch, self.runner.device) for batch in micro_batches] if apart else []
        outputs, passes, inputs = {}, {}, set()
        contributions: Contributions = {}
        paths: tuple[PathName, PathName] = ("train", "eval")
        for path in paths:
            passes[path] = self._pass(path, len(micro_batches))
            outputs[path], recorded = self.runner.forward(path, joined, passes[path])
            inputs |= {position for key in recorded for position in key}
            contributions |= user_values(self.runner, path, batches, recorded, self.batch_size)
        contributions |= self.output.measure(joined, inputs, outputs["train"], outputs["eval"])
        with deferred_interrupts():
            self._add(passes["train"], passes["eval"])
            self.output.add(contributions)
            self.batches += len(micro_batches)
            self.largest = max(self.largest, len(micro_batches) * self.batch_size)

    def _pass(self, path: PathName, micro_batches: int) -> Pass:
        images = micro_batches * self.batch_size
        per_image = path == "eval" and self.emulation.trusted
        return Pass(images, self.batch_size, per_image=per_image, layouts=dict(self.emulation.layouts.get(path, {})))

    def _add(self, train: Pass, eval_: Pass) -> None:
        for slot, record in {**eval_.records, **train.records}.items():
            self.values.setdefault(slot, record.values)
        self.entered |= train.entered | eval_.entered
        self.train.add(self._comparable("train", train, by_batch=True))
        records = self._comparable("eval", eval_, by_batch=False)
        # Real micro-batches say nothing about batches of another size.
        others = self.batch_sizes.values() if self.emulation.trusted else ()
        for path in (self.eval, *others):
            path.add(records)
        self.functional |= train.functional | eval_.functional

    def _comparable(self, path: PathName, pass_: Pass, by_batch: bool) -> dict[Slot, Recorded]:
        """The calls that normalize as this path should, of selected layers with running statistics."""
        layers = self.runner.layers.layers
        self.by_batch[path] |= {index for (index, _), record in pass_.records.items() if record.by_batch}
        return {
            slot: record
            for slot, record in pass_.records.items()
            if record.by_batch == by_batch
            and layers[slot[0]].selected
            and layers[slot[0]].info.running_mean is not None
        }


def probe(
    runner: Runner, batches: Iterable[Any], batch_size: int, settings: ScanSettings, progress: Progress
) -> Evidence:
    """Measure both paths on the same micro-batches.

    Ctrl-C and errors of the user's code end the measurement and keep what there is, if there is anything.

    Raises:
        KeyboardInterrupt, DataError, UserCodeError, DeviceError: Before the first micro-batch was measured; see
            ``Feed``, ``Runner`` and ``Measurement``. Later errors are in ``Evidence.failure``.
    """
    started = time.perf_counter()
    feed = Feed(batches, batch_size)
    with runner.installed():
        measurement = _prepare(runner, feed, settings)
        failure: BnprobeError | None = None
        try:
            stopped = _measure_until_done(measurement, feed, settings, progress)
        except KeyboardInterrupt:
            if measurement.batches == 0:
                raise
            stopped = "interrupted"
        except (UserCodeError, DataError, DeviceError) as error:
            if measurement.batches == 0:
                raise
            stopped, failure = "failed", error
    return _evidence(measurement, feed, stopped, failure, time.perf_counter() - started)


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
        train=Path(layers, size, device),
        eval=Path(layers, size, device),
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
    measurement: Measurement, feed: Feed, stopped: StopReason, failure: BnprobeError | None, seconds: float
) -> Evidence:
    return Evidence(
        layers=measurement.runner.layers,
        train=path_evidence(measurement.train),
        eval=path_evidence(measurement.eval),
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
        emulated=measurement.largest > measurement.batch_size,
        emulation=measurement.emulation.reason,
        self_check=measurement.emulation.check,
        stopped=stopped,
        failure=failure,
        seconds=seconds,
    )
