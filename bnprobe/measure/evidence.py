"""What a scan measures: one record, filled step by step, merged over the processes of a launch, and read at the end.

Sums are added, extremes compared, histograms added: float64 sums over micro-batches, each of which one process
measured whole. No mean and no variance is averaged, so that the result is that of one process to rounding. What
depends on order (replicates, the pool of samples) is numbered as in one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnprobe.errors import BnprobeError
from bnprobe.measure.accumulators import LayerMismatch, MismatchSums
from bnprobe.measure.batch import MicroBatch
from bnprobe.measure.chance import KeptOutputs
from bnprobe.measure.forward_pass import Pass, Recorded, Slot
from bnprobe.measure.layers import LayerSet
from bnprobe.measure.outputs import Contributions, OutputSums
from bnprobe.measure.path_evidence import AllCalls, PathEvidence
from bnprobe.measure.physical_batch import Batching
from bnprobe.measure.scores import Found, ScoreTable
from bnprobe.measure.session import PATHS, PathName
from bnprobe.records import Output, StopReason
from bnprobe.rules.shares import COMPOSITION_P
from bnprobe.stats.composition import analyse
from bnprobe.stats.intervals import Sums
from bnprobe.stats.ladder import blend, mismatch, running, settled

_COLUMNS = 2**13
"""Channels whose figures are computed at once: with a row for each replicate they fit into a CPU's cache."""

_FEWEST_COLUMNS = 16
"""Narrower layers count as this wide, since some tensors have a column for each layer."""

K = TypeVar("K")
V = TypeVar("V")


def by_layer(calls: Iterable[Slot]) -> dict[int, list[Slot]]:
    """The calls of each layer, by its index."""
    found: dict[int, list[Slot]] = {}
    for slot in calls:
        found.setdefault(slot[0], []).append(slot)
    return found


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
        kept_outputs: What the model gave for the first micro-batches.
        alone: All were measured in this process, one after the other: figures of micro-batches are in their order.
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
    kept_outputs: KeptOutputs = field(default_factory=KeptOutputs)
    alone: bool = True
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
        total = reduce(add, squares).sum(0)
        within = (total / samples - means.d[0].square()) / size
        excess = segments.mean(between - within).clamp(min=0)
        unknown = segments.mean(total) == 0  # of a family that groups rows itself no samples are added
        return torch.where((torch.stack(p_values).amin(0) * tests >= COMPOSITION_P) | unknown, 0.0, excess)

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
                if record.by_batch:
                    self.by_batch[name].add(slot[0])
            self.entered |= pass_.entered
            self.functional |= pass_.functional
        for name in ("train", "steady"):
            if name in passes:
                self.paths[name].add(self._comparable(passes[name], by_batch=True), self.layers.layers)
        records = self._comparable(passes["eval"], by_batch=False)
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
        self.alone = False
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

    def _comparable(self, pass_: Pass, by_batch: bool) -> dict[Slot, Recorded]:
        """The calls that normalize as this path should, of selected layers with running statistics."""
        layers = self.layers.layers
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
