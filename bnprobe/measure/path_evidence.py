"""The statistics of one path at one batch size: steps wait for each other, and are added together."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnprobe.distributed import EVERYTHING, Share
from bnprobe.errors import UsageError
from bnprobe.measure.accumulators import (
    STATISTICS,
    CorrectionD,
    CorrectionR,
    CorrectionValues,
    LayerMismatch,
    Mismatch,
    MismatchSums,
    SamplePool,
    Values,
)
from bnprobe.measure.forward_pass import Recorded, Slot
from bnprobe.measure.interrupts import deferred_interrupts
from bnprobe.measure.layers import ProbedLayer
from bnprobe.measure.statistic import Calls, CallTable, Columns, SampleStep, Scope, Statistic, Step
from bnprobe.stats.composition import Images
from bnprobe.stats.intervals import REPLICATES, Sums
from bnprobe.stats.ladder import BatchSums
from bnprobe.stats.moments import Moments, corrections, pool_moments

_CHUNK_VALUES = 2**19
"""Values per temporary tensor, which bounds the memory of a step for any number of channels and samples."""

_WAITING_VALUES = 2**18
"""Values beyond which steps wait no longer to be added together: to wait for more takes memory and saves little."""

AllCalls = tuple[Calls, ...]
"""The calls of many layers side by side: the first call of each, then the second one of each, and so on."""

S = TypeVar("S", bound=Statistic)


@dataclass
class _Waiting:
    """Steps that wait to be added together: of the same calls, with the same numbers of values.

    Attributes:
        values: Of each call its values per channel in a group.
        columns: The channels of the calls.
        groups: Of each micro-batch, where families group rows themselves: a row is a group.
        samples: A row is a sample.
        rows_per_batch: Rows of a micro-batch.
        moments: Mean and variance of each step, shape (rows, columns).
        steps, numbers: Of each micro-batch that is whole: the step that completed it, and its number.
    """

    values: dict[Slot, int]
    columns: Columns
    groups: int | None
    samples: bool
    rows_per_batch: int
    moments: list[Moments] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return sum(mean.shape[0] for mean, _ in self.moments)

    @property
    def is_full(self) -> bool:
        """Whether the next step is not to wait with these."""
        return self.rows * self.columns.eps.numel() > _WAITING_VALUES

    def add(self, records: Mapping[Slot, Recorded], step: int, first: int) -> int:
        """Add a step, the next micro-batch of which is number ``first``; return how many micro-batches it completes."""
        ordered = [records[slot] for slot in self.columns.slots]  # a pass may make its calls in another order
        mean, variance = (torch.cat([getattr(each, name) for each in ordered], 1) for name in ("mean", "variance"))
        self.moments.append((mean, variance))
        completed = self.rows // self.rows_per_batch - len(self.steps)
        self.steps += [step] * completed
        self.numbers += range(first, first + completed)
        return completed

    def take(self) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """The mean and variance of the rows of whole micro-batches, and the step and the number of each micro-batch.

        The other rows wait for the next step with the same calls.
        """
        mean, variance = (torch.cat(parts) for parts in zip(*self.moments, strict=True))
        steps, numbers, whole = self.steps, self.numbers, len(self.steps) * self.rows_per_batch
        self.moments, self.steps, self.numbers = [], [], []
        if whole < mean.shape[0]:
            self.moments = [(mean[whole:].clone(), variance[whole:].clone())]
            mean, variance = mean[:whole], variance[:whole]
        return mean, variance, steps, numbers


class PathEvidence:
    """The statistics of one path at one batch size, of whatever calls the forward passes make.

    Args:
        scope: Which statistics are gathered.
        batch_size: Samples per micro-batch.
        share: Which micro-batches these are: each goes to the replicate that it would go to in one process.
        seed: For statistics that draw at random.

    Attributes:
        batches: Micro-batches added.
    """

    def __init__(self, scope: Scope, batch_size: int, share: Share = EVERYTHING, seed: int = 0) -> None:
        self.batch_size, self.batches = batch_size, 0
        self._scope, self._share, self._steps = scope, share, 0
        self._table = CallTable()
        self._gathered = {row.name: row(seed) for row in STATISTICS if scope in row.scopes}
        self._waiting: dict[int | None, _Waiting] = {}
        self._known: dict[str, Any] = {}

    def add(self, records: Mapping[Slot, Recorded], layers: tuple[ProbedLayer, ...]) -> None:
        """Add one physical batch: at once, or together with others.

        Args:
            records: Of calls of layers with running statistics. All whose groups are micro-batches have the same unit:
                samples, or micro-batches of ``batch_size``.
            layers: All probed layers.
        """
        self._known.clear()
        if any(waiting.is_full for waiting in self._waiting.values()):
            self.settle()
        batches, new = 0, not records.keys() <= self._table.calls.keys()
        if new:
            self._make_room(records, layers)
        # Micro-batches of this size are counted by the calls that have such, where there are any: they come last.
        for groups in sorted({record.groups for record in records.values()}, key=lambda each: (each is None, each)):
            chosen = {slot: record for slot, record in records.items() if record.groups == groups}
            batches = self._waiting_for(chosen, layers, groups).add(chosen, self._steps, self.batches)
        if records:
            self.batches += batches
            self._steps += 1
        if new:  # by itself: the pool takes its origin from it, and what a statistic cannot take is seen at once
            self.settle()

    def settle(self) -> None:
        """Add the steps that wait, together: many rows take no more operators than few. Whoever reads does it first."""
        ready = [waiting for waiting in self._waiting.values() if waiting.steps]
        if ready:
            with deferred_interrupts():
                for waiting in ready:
                    self._add(waiting)

    def _make_room(self, records: Mapping[Slot, Recorded], layers: tuple[ProbedLayer, ...]) -> None:
        """For calls that were not seen before; the columns of those that wait may stand elsewhere then."""
        self.settle()
        for slot in records:
            self._table.add(slot, layers[slot[0]].info.channels)
        device = next(iter(records.values())).mean.device
        for statistic in self._gathered.values():
            statistic.grow(self._table, device)
        for waiting in self._waiting.values():
            waiting.columns = Columns.of(layers, waiting.values, self._table, device)

    def _waiting_for(
        self, records: Mapping[Slot, Recorded], layers: tuple[ProbedLayer, ...], groups: int | None
    ) -> _Waiting:
        """What waits of these calls, which have the same number of groups per micro-batch, and are in the table."""
        first, slots = next(iter(records.values())), sorted(records, key=self._table.calls.__getitem__)
        values = {slot: records[slot].values for slot in slots}  # in one order, so that the pool knows its calls again
        samples = groups is None and first.unit == 1
        rows = groups or (self.batch_size if samples else 1)
        waiting = self._waiting.get(groups)
        if waiting is not None and (waiting.values, waiting.samples, waiting.rows_per_batch) == (values, samples, rows):
            return waiting
        self.settle()
        columns = Columns.of(layers, values, self._table, first.mean.device)
        found = _Waiting(values, columns, groups, samples, rows)
        if waiting is not None and (waiting.columns.slots, waiting.rows_per_batch) == (columns.slots, rows):
            found.moments = waiting.moments
        self._waiting[groups] = found
        return found

    @property
    def _statistics(self) -> dict[str, Statistic]:
        """The statistics, with all that was added."""
        self.settle()
        return self._gathered

    def _add(self, waiting: _Waiting) -> None:
        columns = waiting.columns
        mean, variance, steps, numbers = waiting.take()
        positions = [self._share.position(number) for number in numbers]
        replicates = [position % REPLICATES for position in positions]
        if waiting.groups is None:
            if waiting.samples and self._scope != "other sizes":  # a step may not fill micro-batches of these
                self._add_samples(columns, mean, variance, replicates, positions)
            if waiting.rows_per_batch > 1:
                mean, variance = pool_moments(mean, variance, waiting.rows_per_batch)
        divided = waiting.groups or 1
        at_once = max(1, _CHUNK_VALUES // mean.shape[1] // divided)
        reference = (
            columns.mean,
            columns.variance,
            columns.eps,
            columns.r_max,
            columns.d_max,
            columns.gate,
            columns.factor,
            columns.std_eps,
        )
        for start in range(0, len(steps), at_once):
            here, rows = slice(start, start + at_once), slice(start * divided, (start + at_once) * divided)
            values = corrections(mean[rows], variance[rows], *reference)
            step = Step(columns, values, divided, steps[here], replicates[here])
            for statistic in self._gathered.values():
                statistic.update(step)

    def merge(self, other: PathEvidence) -> None:
        """Add what another process measured. Both are on the host."""
        self._known.clear()
        for slot, (start, stop) in other._table.channels.items():
            self._table.add(slot, stop - start)
        for name, statistic in self._statistics.items():
            statistic.grow(self._table)
            statistic.merge(other._statistics[name], self._table, other._table)
        self.batches += other.batches

    def on_host(self, *kinds: type[Statistic]) -> PathEvidence:
        """The same in host memory, without the samples that wait for the next step; of these statistics, or of all."""
        found, names = copy.copy(self), {kind.name for kind in kinds} or self._statistics.keys()
        found._known, found._waiting = {}, {}
        found._gathered = {name: each.on_host() for name, each in self._statistics.items() if name in names}
        return found

    def __getitem__(self, kind: type[S]) -> S:
        """One of the statistics."""
        found = self._statistics[kind.name]
        assert isinstance(found, kind)
        return found

    def __contains__(self, slot: object) -> bool:
        """Whether a call was measured."""
        return slot in self._table.calls

    @property
    def calls(self) -> Calls:
        """The calls that were measured, in the order in which they were first seen."""
        return tuple(self._table.calls)

    def mismatch(self, slot: Slot) -> Sums:
        """D of a call that was measured."""
        sums: Sums = self._every(Mismatch)[slot][0]
        return sums

    def first_bad(self, slot: Slot) -> int | None:
        """The physical batch in which a non-finite value of a call was first seen; None if there was none."""
        step: int | None = self._every(Mismatch)[slot][1] if slot in self else None
        return step

    def layer_sums(self) -> dict[int, Sums]:
        """D of each layer that was measured by its index, averaged over the calls of a micro-batch."""
        found: dict[int, Sums] = self._every(LayerMismatch)
        return found

    def layer(self, index: int) -> Sums | None:
        """D of a layer, averaged over the calls of a micro-batch; None if it was not measured."""
        return self.layer_sums().get(index)

    def r(self, slots: Sequence[Slot]) -> Values:
        """r over those of some calls that were measured."""
        return self._values(CorrectionR, slots)

    def d(self, slots: Sequence[Slot]) -> Values:
        """d over those of some calls that were measured."""
        return self._values(CorrectionD, slots)

    def _values(self, kind: type[CorrectionValues], slots: Sequence[Slot]) -> Values:
        every: dict[Slot, Values] = self._every(kind)
        return reduce(add, (every[slot] for slot in slots if slot in every))

    def moments(self, slots: Calls) -> BatchSums:
        """Sums per channel of one call of each of many layers, which were measured."""
        return self._sums_and_squares(slots)[0]

    def sample_squares(self, slots: Calls) -> Tensor:
        """The squared means of samples (as d) of the same, summed, shape (replicates, channels)."""
        return self._sums_and_squares(slots)[1]

    def together(self, calls: AllCalls) -> BatchSums:
        """Sums over all calls of layers, which share the running statistics; of those that were measured."""
        return reduce(add, (self.moments(slots) for slots in calls if slots[0] in self))

    def _sums_and_squares(self, slots: Calls) -> tuple[BatchSums, Tensor]:
        return self[MismatchSums].side_by_side(self._table, slots)

    @property
    def regroupable(self) -> Calls:
        """The calls whose samples can be regrouped; none if samples could not be told apart."""
        return self[SamplePool].slots

    def pool(self, calls: AllCalls) -> Images:
        """Samples for regrouping of all calls of layers."""
        images = [self[SamplePool].samples(slots) for slots in calls]
        names = ("mean", "variance", "replicate")
        return Images(*(torch.cat([getattr(each, name) for each in images]) for name in names))

    def by_sample(self, calls: AllCalls) -> BatchSums:
        """Like ``together``, over the samples in the pool."""
        images = self.pool(calls)
        origins = [self[SamplePool].origins(slots).expand(self[SamplePool].held, -1) for slots in calls]
        return self.moments(calls[0]).by_sample(images.mean + torch.cat(origins), images.variance)

    def reported(self, slots: list[Slot]) -> dict[str, Any]:
        """Results of statistics that are reported under their own names, for calls of one layer.

        Raises:
            UsageError: A result is nothing that JSON can hold.
        """
        rows = [statistic for statistic in self._statistics.values() if statistic.reported]
        found = {statistic.name: statistic.of(self._table, slots) for statistic in rows}
        return {name: _as_json(name, result) for name, result in found.items() if result is not None}

    def _every(self, kind: type[Mismatch] | type[LayerMismatch] | type[CorrectionValues]) -> Any:
        """What a statistic says of every call or layer: read from its states once, until something is added."""
        if kind.name not in self._known:
            self._known[kind.name] = self[kind].every(self._table)
        return self._known[kind.name]

    def _add_samples(
        self, columns: Columns, mean: Tensor, variance: Tensor, replicates: Sequence[int], positions: Sequence[int]
    ) -> None:
        """Add the samples of whole micro-batches, before the micro-batches are added."""
        wanted = [statistic for statistic in self._gathered.values() if statistic.takes_samples]
        if not wanted:
            return
        d, ratio = (mean - columns.mean) / columns.square_std.sqrt(), variance / columns.square_std
        step = SampleStep(columns, d, ratio, self.batch_size, replicates, positions)
        for statistic in wanted:
            statistic.update_samples(step)


def _as_json(name: str, result: Any) -> Any:
    """The result of a statistic as it is read back from a report: tuples are lists there."""
    try:
        return json.loads(json.dumps(result, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f'The statistic "{name}" gave {result!r}, which JSON cannot hold ({error}): its compute() returns finite'
            " numbers, strings, lists or dictionaries of them, and None for what does not exist."
        ) from error
