"""Batch statistics of the train path, micro-batch by micro-batch, for the momentum sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bnprobe.config.spec import ScanSettings
from bnprobe.errors import UsageError
from bnprobe.measure.batch import MicroBatch, join, to_device
from bnprobe.measure.extremes import Extremes, checked_further
from bnprobe.measure.forward_pass import Recorded
from bnprobe.measure.layers import ONE_VALUE, ProbedLayer
from bnprobe.measure.memory import Chunks, Refusal
from bnprobe.measure.physical_batch import Batching, as_sentence, not_emulated, plan_batching
from bnprobe.measure.reader import Reader
from bnprobe.measure.session import Session
from bnprobe.stats.ema import Statistics, Stream
from bnprobe.wording import option

MEMORY_CAP = 2**28
"""Bytes that a recording may take: 256 MiB."""

FEWEST_RECORDED = 16
"""Micro-batches that a replay needs to say anything."""

_DOUBLE, _SINGLE = 8, 4


@dataclass(frozen=True)
class LayerSeries:
    """One layer's part of a recording.

    Attributes:
        layer: The layer.
        stream: Its batch statistics, calls of one micro-batch one after the other, on the host.
        calls: Updates per micro-batch.
        start: The running statistics it was loaded with, on the host.
    """

    layer: ProbedLayer
    stream: Stream
    calls: int
    start: Statistics


@dataclass(frozen=True)
class Recording:
    """Batch statistics of every layer that training would update.

    Attributes:
        series: In network order.
        omitted: The selected layers that are not in ``series``, and why.
        batches: Micro-batches recorded.
        cut: No more were recorded because they would take more than the cap.
        bytes: Memory that the batch statistics take.
        single: They were kept in float32, since float64 would have taken more than the cap.
    """

    series: tuple[LayerSeries, ...]
    omitted: tuple[tuple[ProbedLayer, str], ...]
    batches: int
    cut: bool
    bytes: int
    single: bool


def storage(values: int, batches: int, cap: int) -> tuple[bool, int]:
    """How to keep a recording within ``cap`` bytes.

    Args:
        values: Numbers kept of one micro-batch.
        batches: Micro-batches wanted.
        cap: Bytes.

    Returns:
        Whether in float32 rather than float64, and for how many micro-batches.
    """
    if values * batches * _DOUBLE <= cap:
        return False, batches
    return True, min(batches, cap // (values * _SINGLE))


def record(
    session: Session,
    reader: Reader,
    settings: ScanSettings,
    progress: Callable[[int, int], None],
) -> Recording:
    """Run the train path over micro-batches and keep their statistics.

    No weight and no running statistic moves: every micro-batch meets the same network.

    Raises:
        UsageError: Fewer than ``FEWEST`` micro-batches could be recorded.
        DataError, UserCodeError, DeviceError: See ``Reader`` and ``Session``.
    """
    with session.installed():
        session.explore(reader.look_ahead(1))
        wanted = settings.batches or settings.max_batches
        batching = plan_batching(session, reader, settings)
        recorder = _Recorder(session, batching, most=wanted)
        while recorder.batches < recorder.most:
            progress(recorder.batches, recorder.most)
            taken = reader.take(min(recorder.batching.at_once, recorder.most - recorder.batches))
            if not taken:
                break
            recorder.step(taken)
        progress(recorder.batches, recorder.batches)
    if recorder.batches < FEWEST_RECORDED:
        raise UsageError(
            f"A sweep of momentum needs at least {FEWEST_RECORDED} micro-batches, and {recorder.batches} of"
            f" {reader.batch_size} samples could be recorded. Give more {option('--batches')}, more data or a smaller"
            f" {option('--batch-size')}."
        )
    return recorder.result(wanted)


@dataclass
class _Recorder:
    """The state of a recording; a step is added wholly or not at all.

    Attributes:
        most: Micro-batches to record; less than asked for once the memory is known not to suffice.
        updates: Per layer index: statistics and values per channel of each step.
        calls: Per layer index: the numbers of updates per micro-batch that were seen.
        extremes: The micro-batches that differ most in size.
    """

    session: Session
    batching: Batching
    most: int
    batches: int = 0
    bytes: int = 0
    dtype: torch.dtype | None = None
    updates: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    calls: dict[int, set[int]] = field(default_factory=dict)
    extremes: Extremes = field(default_factory=Extremes)

    def step(self, micro_batches: list[Any]) -> None:
        """Record micro-batches, as one physical batch where that works."""
        size = self.batching.batch_size
        found = [MicroBatch(batch, size) for batch in micro_batches]
        emulation = checked_further(self.session, self.extremes, self.batching.emulation, found)
        self.batching = replace(self.batching, emulation=emulation)
        chunks = Chunks(self.session.device, size, len(micro_batches) if emulation.trusted else 1)
        chunks.run(micro_batches, lambda chunk: self._add(self._measure(chunk), len(chunk)), self._refused)
        if chunks.at_once < len(micro_batches):
            self.batching = replace(self.batching, at_once=chunks.at_once)

    def _refused(self, error: Refusal) -> None:
        self.batching = replace(self.batching, emulation=not_emulated(as_sentence(error)))

    def _measure(self, micro_batches: list[Any]) -> dict[int, list[Recorded]]:
        """The calls that normalized with batch statistics, by layer, in call order."""
        joined = to_device(join(micro_batches, self.batching.batch_size), self.session.device)
        pass_ = self.batching.pass_over(len(micro_batches), "train")
        self.session.forward("train", joined, pass_)
        found: dict[int, list[Recorded]] = {}
        for (index, _), recorded in pass_.records.items():
            if recorded.by_batch and self.session.layers.layers[index].selected:
                found.setdefault(index, []).append(recorded)
        return found

    def _add(self, found: dict[int, list[Recorded]], micro_batches: int) -> None:
        if self.dtype is None:
            numbers = sum(2 * call.mean.shape[1] * (call.groups or 1) for calls in found.values() for call in calls)
            single, self.most = storage(max(numbers, 1), self.most, MEMORY_CAP)
            self.dtype = torch.float32 if single else torch.float64
        for index, calls in found.items():
            self.calls.setdefault(index, set()).add(sum(call.groups or 1 for call in calls))
            # By micro-batch: the groups of the first call, then those of the next.
            mean, variance = (
                torch.cat([getattr(call, name).unflatten(0, (micro_batches, -1)) for call in calls], 1)
                .flatten(0, 1)
                .to("cpu", self.dtype, copy=True)
                for name in ("mean", "variance")
            )
            values = [float(call.values) for call in calls for _ in range(call.groups or 1)]
            values_of_call = torch.tensor(values, dtype=torch.float64)
            self.updates.setdefault(index, []).append((mean, variance, values_of_call.repeat(micro_batches)))
            self.bytes += 2 * mean.numel() * mean.element_size()
        self.batches += micro_batches

    def result(self, wanted: int) -> Recording:
        """The whole recording."""
        reasons = [(layer, self._reason(layer)) for layer in self.session.layers.selected]
        return Recording(
            series=tuple(self._series(layer) for layer, reason in reasons if reason is None),
            omitted=tuple((layer, reason) for layer, reason in reasons if reason is not None),
            batches=self.batches,
            cut=self.batches == self.most < wanted,
            bytes=self.bytes,
            single=self.dtype == torch.float32,
        )

    def _reason(self, layer: ProbedLayer) -> str | None:
        """Why a layer has no series that could be replayed."""
        if layer.info.running_mean is None:
            return "no running statistics (track_running_stats=False)"
        if layer.unusable is not None:
            return layer.unusable
        if layer.index not in self.updates:
            return "training does not update its running statistics: frozen or never called"
        calls = self.calls[layer.index]
        if len(calls) > 1 or sum(len(values) for *_, values in self.updates[layer.index]) != self.batches * max(calls):
            return "called a different number of times from batch to batch"
        if any(bool((values < 2).any()) for *_, values in self.updates[layer.index]):
            return ONE_VALUE
        return None

    def _series(self, layer: ProbedLayer) -> LayerSeries:
        mean, variance, values = (torch.cat(part) for part in zip(*self.updates[layer.index], strict=True))
        running = [layer.info.running_mean, layer.info.running_variance]
        start = [buffer.detach().to("cpu", torch.float64, copy=True) for buffer in running if buffer is not None]
        return LayerSeries(layer, Stream(mean, variance, values), max(self.calls[layer.index]), Statistics(*start))
