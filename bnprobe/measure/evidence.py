"""What a scan measures: one record, filled step by step, merged over the processes of a launch, and read at the end.

Sums are added, extremes compared, histograms added: float64 sums over micro-batches, each of which one process
measured whole. No mean and no variance is averaged, so that the result is that of one process to rounding. What
depends on order (replicates, the pool of samples) is numbered as in one process.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnprobe.distributed import EVERYTHING, Share
from bnprobe.errors import BnprobeError, UsageError
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
from bnprobe.measure.batch import MicroBatch
from bnprobe.measure.forward_pass import Pass, Recorded, Slot
from bnprobe.measure.interrupts import deferred_interrupts
from bnprobe.measure.layers import LayerSet, ProbedLayer
from bnprobe.measure.outputs import Contributions, OutputSums
from bnprobe.measure.physical_batch import Batching
from bnprobe.measure.scores import Found, ScoreTable
from bnprobe.measure.session import PATHS, PathName
from bnprobe.measure.statistic import Calls, CallTable, Columns, SampleStep, Scope, Statistic, Step
from bnprobe.records import Output, StopReason
from bnprobe.rules.shares import COMPOSITION_P
from bnprobe.stats.composition import Images, analyse
from bnprobe.stats.intervals import REPLICATES, Sums
from bnprobe.stats.ladder import BatchSums, blend, mismatch, running, settled
from bnprobe.stats.moments import Moments, corrections, pool_moments

_CHUNK_VALUES = 2**19
"""Values per temporary tensor, which bounds the memory of a step for any number of channels and samples."""

_WAITING_VALUES = 2**18
"""Values beyond which steps wait no longer to be added together: to wait for more takes memory and saves little."""

_COLUMNS = 2**13
"""Channels whose figures are computed at once: with a row for each replicate they fit into a CPU's cache."""

_FEWEST_COLUMNS = 16
"""Narrower layers count as this wide, since some tensors have a column for each layer."""

AllCalls = tuple[Calls, ...]
"""The calls of many layers side by side: the first call of each, then the second one of each, and so on."""

S = TypeVar("S", bound=Statistic)
K = TypeVar("K")
V = TypeVar("V")


def by_layer(calls: Iterable[Slot]) -> dict[int, list[Slot]]:
    """The calls of each layer, by its index."""
    found: dict[int, list[Slot]] = {}
    for slot in calls:
        found.setdefault(slot[0], []).append(slot)
    return found


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
        for groups in dict.fromkeys(record.groups for record in records.values()):
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


def _no_layers() -> dict[PathName, set[int]]:
    return {"train": set(), "steady": set(), "eval": set()}


@dataclass
class Evidence:
    """All that a scan measured, on the training data or on the held-out data.

    Attributes:
        layers: Of the model; left out where evidence is sent to another process.
        batching: How micro-batches ran in the end.
        paths: "train" and "eval", and "steady" once the model is known to do more in train mode than to normalize by
            batch (random layers, heads that run in training only): otherwise it is the train path. On held-out data
            "eval" alone.
        random: The model draws random numbers in training that it does not draw at inference.
        batch_sizes: The eval path at further batch sizes.
        outputs: The distance of the two paths at the model's outputs.
        scores: Loss and metric on each path; of more micro-batches than the rest, where few decided every layer.
        repeat: Relative L2 distance of two eval-path passes over the same samples; None if not measured.
        batches: Micro-batches measured.
        physical_batch: Samples of the largest physical batch that ran.
        values: Values per channel in one group, by call.
        rows: Rows in one group, by call.
        by_batch: For each path, the layers that normalized with batch statistics there.
        called: For each path, the layers whose normalization was called there.
        entered: Indices of the layers whose forward was called.
        functional: Calls of batch_norm outside any layer: the place in the user's code, and why it is no layer.
        steady_seconds: What measuring the path without random layers took.
        scoring_seconds: What loss and metric of further micro-batches took.
        seconds: What all took.
        left_out: Samples of a partial last batch.
        population: Samples of the whole data set, where it always gives the same ones and each was read at most once;
            None: endless or unknown.
        other_samples: That the processes of a launch read different data, a sentence; None where they do not.
        kept: Micro-batches by position, on the host, for what is measured afterwards.
        sizes: Samples of the micro-batches by position; those that are not named have ``batch_size``.
        held_out: The same on held-out data; None without.
        unscored: Why loss and metric were not taken, where they are given, a sentence; None where they were.
        mixed: The eval path on training samples in batches drawn at random, where those of the batches above cannot be
            regrouped; None where that was not needed or not possible.
        random_order: The loader itself draws every batch at random.
        stopped: Why the scan ended.
        failure: The error that ended it after something was measured.
    """

    layers: LayerSet
    batching: Batching
    paths: dict[PathName, PathEvidence]
    batch_sizes: dict[int, PathEvidence] = field(default_factory=dict)
    outputs: OutputSums = field(default_factory=OutputSums)
    scores: ScoreTable = field(default_factory=ScoreTable)
    random: bool = False
    repeat: float | None = None
    batches: int = 0
    physical_batch: int = 0
    values: dict[Slot, int] = field(default_factory=dict)
    rows: dict[Slot, int | None] = field(default_factory=dict)
    by_batch: dict[PathName, set[int]] = field(default_factory=_no_layers)
    called: dict[PathName, set[int]] = field(default_factory=_no_layers)
    entered: set[int] = field(default_factory=set)
    functional: set[tuple[str, str]] = field(default_factory=set)
    steady_seconds: float = 0.0
    scoring_seconds: float = 0.0
    seconds: float = 0.0
    left_out: int = 0
    population: int | None = None
    other_samples: str | None = None
    kept: dict[int, MicroBatch] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    held_out: Evidence | None = None
    unscored: str | None = None
    mixed: Evidence | None = None
    random_order: bool = False
    stopped: StopReason = "requested"
    failure: BnprobeError | None = None

    @property
    def frozen(self) -> set[int]:
        """Layers that model.train() leaves in eval mode, so that both paths use the running statistics."""
        return {index for index in self.called["train"] if self.is_frozen(index)}

    def is_frozen(self, index: int) -> bool:
        """Whether a layer is one of those."""
        return index in self.called["train"] and index not in self.by_batch["train"]

    def normalizes_alike(self, index: int) -> bool:
        """Whether a layer normalizes in the same way in training and at inference: frozen, or always by its batch."""
        return self.is_frozen(index) or (index in self.by_batch["eval"] and self.eval.layer(index) is None)

    def runs_samples_alone(self, index: int) -> bool:
        """Whether a layer is called once for every sample of a batch, on one row each time."""
        rows = [rows for (layer, _), rows in self.rows.items() if layer == index]
        return self.batch_size > 1 and len(rows) >= self.batch_size and set(rows) == {1}

    def beyond_noise(self) -> dict[int, float]:
        """By layer, how much of D at inference is no noise of i.i.d. batches: wrong statistics, and batches that differ
        significantly from i.i.d. ones. A quick estimate, by which a scan stops; the report has the shares.
        """
        found: dict[int, float] = {}
        for indices, calls in self.side_by_side(by_layer(self.eval.calls)):
            means = self.eval.together(calls).whole()
            values = torch.tensor([self.values[slot] for slot in calls[0]])
            known = settled(means, values, blend(means, values))
            wrong = mismatch(means, running(means)) - mismatch(means, known)
            found |= zip(indices, (wrong[0] + self.composed(calls, self.eval)).tolist(), strict=True)
        return found

    def composed(self, calls: AllCalls, path: PathEvidence) -> Tensor:
        """What batches that differ significantly from i.i.d. ones add to the D of layers; 0 where that is not known.

        Args:
            path: The eval path, at the batch size that was scanned or at another.
        """
        size = path.batch_size
        if size < 2 or path.batches < 2 or not self.batching.emulation.trusted:
            return torch.zeros(len(calls[0]))
        # Those of the samples that fill no batch of this size are counted too, in proportion.
        part = path.batches * size / (self.eval.batches * self.batch_size)
        squares = [part * self.eval.sample_squares(slots) for slots in calls]
        sums = path.together(calls)
        means, segments = sums.whole(), sums.segments
        p_values = [
            segments.least(analyse(path.moments(slots), each, size).p_value)
            for slots, each in zip(calls, squares, strict=True)
        ]
        tests = len(calls) * segments.sizes
        samples = segments.spread(sums.counts.sum(0)) * size
        between = means.d_squared[0] - means.d[0].square()
        within = (reduce(add, squares).sum(0) / samples - means.d[0].square()) / size
        excess = segments.mean(between - within).clamp(min=0)
        return torch.where(torch.stack(p_values).amin(0) * tests >= COMPOSITION_P, 0.0, excess)

    def side_by_side(
        self, calls: Mapping[int, Sequence[Slot]], *known: Container[Slot]
    ) -> Iterator[tuple[list[int], AllCalls]]:
        """Layers that can be evaluated together: as many as memory allows, all of which have the same calls.

        Those that correct their mismatch themselves are left out: what remains after their limits is not a quadratic
        form in the running statistics.

        Args:
            calls: Of each layer.
            known: Where something is known of calls: either of those of all layers or of none.

        Returns:
            The indices of the layers, and their calls.
        """
        alike: dict[Hashable, list[int]] = {}
        for index, slots in calls.items():
            if not self.layers.layers[index].info.corrects:
                alike.setdefault(tuple(tuple(slot in each for each in known) for slot in slots), []).append(index)
        for indices in alike.values():
            chunk, columns = list[int](), 0
            for index in indices:
                chunk.append(index)
                columns += max(self.layers.layers[index].info.channels, _FEWEST_COLUMNS)
                if columns >= _COLUMNS or index == indices[-1]:
                    yield chunk, tuple(zip(*(calls[each] for each in chunk), strict=True))
                    chunk, columns = [], 0

    @property
    def sampled(self) -> float:
        """The part of a finite data set that was measured; 0 for endless data."""
        return 0.0 if self.population is None else min(self.samples / self.population, 1.0)

    def layer(self, path: PathEvidence, index: int) -> Sums | None:
        """D of a layer on a path; None if it was not measured.

        On the train path a layer that no other normalization precedes has the same D: so the samples are known as well.
        """
        sums, inference = path.layer(index), self.eval.layer(index)
        if sums is None:
            return None
        same = inference is not None and math.isclose(sums.total, inference.total, rel_tol=1e-5)
        parts = inference.parts if inference is not None and same else sums.parts
        return replace(sums, parts=parts, sampled=self.sampled)

    def add(
        self, passes: Mapping[PathName, Pass], contributions: Contributions, scores: Found, micro_batches: int
    ) -> None:
        """Add one physical batch, measured on each path."""
        for name, pass_ in passes.items():
            for slot, record in pass_.records.items():
                self.values.setdefault(slot, record.values)
                self.rows.setdefault(slot, record.rows)
                self.called[name].add(slot[0])
            self.entered |= pass_.entered
            self.functional |= pass_.functional
        for name in ("train", "steady"):
            if name in passes:
                self.paths[name].add(self._comparable(name, passes[name], by_batch=True), self.layers.layers)
        records = self._comparable("eval", passes["eval"], by_batch=False)
        # Real micro-batches say nothing about batches of another size.
        others = self.batch_sizes.values() if self.batching.emulation.trusted else ()
        for path in (self.eval, *others):
            path.add(records, self.layers.layers)
        self.outputs.add(contributions)
        self.scores.add(scores)
        self.batches += micro_batches
        self.physical_batch = max(self.physical_batch, micro_batches * self.batch_size)

    def merge(self, other: Evidence) -> None:
        """Add what another process measured. Its micro-batches come after these, and both are on the host."""
        _join(self.paths, other.paths, _merged)
        _join(self.batch_sizes, other.batch_sizes, _merged)
        self.outputs.merge(other.outputs)
        self.scores.merge(other.scores)
        self.repeat = max((each for each in (self.repeat, other.repeat) if each is not None), default=None)
        self.random |= other.random
        self.batches += other.batches
        self.physical_batch = max(self.physical_batch, other.physical_batch)
        self.values = {**other.values, **self.values}
        self.rows = {**other.rows, **self.rows}
        _join(self.by_batch, other.by_batch, set.union)
        _join(self.called, other.called, set.union)
        self.entered |= other.entered
        self.functional |= other.functional
        self.steady_seconds = max(self.steady_seconds, other.steady_seconds)
        self.scoring_seconds = max(self.scoring_seconds, other.scoring_seconds)
        self.seconds = max(self.seconds, other.seconds)
        self.left_out = max(self.left_out, other.left_out)  # a process that only skips it counts it too
        self.kept |= other.kept
        self.sizes |= other.sizes
        self.unscored = self.unscored or other.unscored
        emulation = self.batching.emulation if other.batching.emulation.trusted else other.batching.emulation
        at_once = min(self.batching.at_once, other.batching.at_once)
        self.batching = replace(self.batching, emulation=emulation, at_once=at_once)
        if self.held_out is not None and other.held_out is not None:
            self.held_out.merge(other.held_out)
        self.held_out = self.held_out or other.held_out

    def on_host(self) -> Evidence:
        """A copy in host memory and without the model's layers, which can be sent to another process."""
        return replace(
            self,
            layers=LayerSet((), ()),
            batching=replace(self.batching, emulation=self.batching.emulation.closed),
            paths={name: path.on_host() for name, path in self.paths.items()},
            batch_sizes={size: path.on_host() for size, path in self.batch_sizes.items()},
            outputs=self.outputs.on_host(),
            scores=self.scores.on_host(),
            held_out=None if self.held_out is None else self.held_out.on_host(),
            failure=None,
        )

    def at_a_look(self, paths: Sequence[PathName] = PATHS) -> Evidence:
        """The part of ``on_host`` by which a scan decides whether to go on; without ``paths`` only how far it is."""
        return Evidence(
            layers=LayerSet((), ()),
            batching=replace(self.batching, emulation=self.batching.emulation.closed),
            paths={name: self.paths[name].on_host(LayerMismatch, MismatchSums) for name in paths},
            batches=self.batches,
            values=self.values,
            by_batch=self.by_batch,
            called=self.called,
        )

    @property
    def train(self) -> PathEvidence:
        return self.paths["train"]

    @property
    def eval(self) -> PathEvidence:
        return self.paths["eval"]

    @property
    def steady(self) -> PathEvidence | None:
        """The train path with all but the norm layers in eval mode; None where that is the train path itself."""
        return self.paths.get("steady")

    @property
    def batch_size(self) -> int:
        return self.batching.batch_size

    @property
    def samples(self) -> int:
        """Samples measured."""
        return sum(self.sizes.values()) + (self.batches - len(self.sizes)) * self.batch_size

    @property
    def emulated(self) -> bool:
        """Whether several micro-batches ran in one physical batch."""
        return self.physical_batch > self.batch_size

    @property
    def partial(self) -> bool:
        """Whether the scan was interrupted or failed."""
        return self.stopped in ("interrupted", "failed")

    @property
    def counted(self) -> list[MicroBatch]:
        """The micro-batches that were kept, in their order."""
        return [self.kept[position] for position in sorted(self.kept)]

    @property
    def micro_batches(self) -> list[Any]:
        """The same without their sizes."""
        return [batch.data for batch in self.counted]

    @property
    def output(self) -> Output:
        """How far the outputs of the two paths are apart."""
        return replace(self.outputs.compute(self.scores), repeat=self.repeat)

    def _comparable(self, path: PathName, pass_: Pass, by_batch: bool) -> dict[Slot, Recorded]:
        """The calls that normalize as this path should, of selected layers with running statistics."""
        layers = self.layers.layers
        self.by_batch[path] |= {index for (index, _), record in pass_.records.items() if record.by_batch}
        return {
            slot: record
            for slot, record in pass_.records.items()
            if record.by_batch == by_batch
            and layers[slot[0]].selected
            and layers[slot[0]].info.running_mean is not None
            and layers[slot[0]].unusable is None
        }


def _merged(one: PathEvidence, other: PathEvidence) -> PathEvidence:
    one.merge(other)
    return one


def _join(one: dict[K, V], other: Mapping[K, V], merge: Callable[[V, V], V]) -> None:
    """Merge ``other`` into ``one``, key by key."""
    for key, value in other.items():
        one[key] = merge(one[key], value) if key in one else value


def _as_json(name: str, result: Any) -> Any:
    """The result of a statistic as it is read back from a report: tuples are lists there."""
    try:
        return json.loads(json.dumps(result, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f'The statistic "{name}" gave {result!r}, which JSON cannot hold ({error}): its compute() returns finite'
            " numbers, strings, lists or dictionaries of them, and None for what does not exist."
        ) from error
