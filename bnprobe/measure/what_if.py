"""What each free remedy would give, measured on held-out data. The model's own statistics do not change."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from bnprobe.errors import BnprobeError, UsageError
from bnprobe.measure.batch import CannotEmulateError, MicroBatch, join
from bnprobe.measure.forward_pass import LayerStatistics
from bnprobe.measure.memory import Footprint, fits_in_memory
from bnprobe.measure.physical_batch import Batching, as_sentence
from bnprobe.measure.population import LARGE, Population, settle_by_layer, steady_population
from bnprobe.measure.scores import ScoreTable, score_batches
from bnprobe.measure.session import Session, no_progress
from bnprobe.records import FREE_REMEDIES, MEASURES, Estimate, Goal, Measure, Remedy, leading
from bnprobe.stats.scores import paired_difference

_RECALIBRATED, _EVALUATION_STATISTICS, _BATCH_STATISTICS, _INSTANCE_STATISTICS, _WITH_FROZEN = FREE_REMEDIES

LARGER = (4, 16)
"""Factors by which batches are made larger than those scanned."""

_LAYER_PASSES = 4096
"""Samples times layers for the statistics that are taken layer by layer, each in a pass of its own."""

_REFUSALS = (CannotEmulateError, BnprobeError)
"""What a model raises that cannot be run as a trial wants it."""

_RAISES = "The model raises"

_CLOCK = 1e-6
"""Seconds that no score takes less than, where the clock of a thread is coarse."""

_FEWEST_TRIED = 8
"""Micro-batches that remedies are tried on at least, where there are so many."""


@dataclass(frozen=True)
class Tried:
    """What the trials gave.

    Attributes:
        remedies: Those that could be tried.
        untried: Why others could not, one sentence each.
        samples: Samples that statistics were taken of or that were scored, each counted once.
        frozen: By name of a layer that training leaves in eval mode, the mismatch D of its running statistics against
            the population statistics of the training data, every earlier layer on its own; empty where not measured.
    """

    remedies: tuple[Remedy, ...] = ()
    untried: tuple[str, ...] = ()
    samples: int = 0
    frozen: Mapping[str, float] = field(default_factory=dict)


def what_if(
    session: Session,
    training: Sequence[MicroBatch],
    held_out: Sequence[MicroBatch],
    batching: Batching,
    scoring: Batching | None = None,
    *,
    goal: Goal = "max",
    goal_is_known: bool = True,
    scored_on: Literal["held-out", "training"] = "held-out",
    larger: bool = True,
    seconds: float | None = None,
) -> Tried:
    """Loss and metric on the held-out batches, eval path, as loaded and with each remedy.

    * "recalibrated": the population statistics of the training data as running statistics. Where samples cannot be
      mixed, they are taken on the train path and on the eval path, and the better ones count, as in
      ``bnprobe recalibrate``.
    * "evaluation statistics": those of the held-out data.
    * "batch statistics": every held-out batch normalizes with its own statistics, in batches of the scanned size
      where the held-out batches divide into such.
    * "instance statistics": every sample with its own, where it gives every layer more than one value per channel.
    * "recalibrated with frozen layers": as "recalibrated", but in the layers, too, that model.train() leaves in eval
      mode; only where there are such layers. The control is "recalibrated", where that changes any layer: what is left
      is the effect of the frozen ones.
    * "batch statistics, batches of N": the same in larger batches, as far as data and memory allow and samples of
      different batches may be mixed. Loss and metric see these larger batches, and a metric may not be a mean over
      samples: the control is the model as loaded, scored in batches of the same size.

    The layers concerned are those that are selected, keep running statistics and, but for the frozen ones, update them
    in training. Population statistics are pooled over all samples, their variance is unbiased, like that of the
    buffers, and they are cast to the buffers' dtype; see ``steady_population``.

    A remedy that cannot be tried, because the model mixes samples or raises on other batches than the loader's, is left
    out with the reason.

    Args:
        session: Installed.
        training, held_out: Both are bounded by the caller.
        batching: How the training batches run.
        scoring: How the held-out batches run; None: the same way.
        goal: Whether a larger or a smaller metric is better.
        goal_is_known: Whether the user said so.
        scored_on: Where ``held_out`` comes from. Statistics of training data as evaluation data say nothing.
        larger: Whether to try larger batches too.
        seconds: What scoring the model once may take, by the first two micro-batches; others are left out, down to 8.
            None: no limit.

    Returns:
        In this order, but that frozen layers come right after "recalibrated"; none if no layer is concerned. Both need
        training batches.

    Raises:
        UsageError: There is neither loss nor metric, or no held-out batch.
    """
    _require_a_measure(session, held_out)
    trial, most = _Trial(session, scoring or batching, goal, goal_is_known, scored_on, held_out), _LAYER_PASSES
    try:
        if seconds is not None:
            each = trial.seconds_per_sample()
            trial, training = replace(trial, batches=_within(held_out, seconds, each)), _within(training, seconds, each)
            most = min(most, int(seconds / each))
        before = trial.score()
        own, footprint = steady_population(session, trial.batches, trial.batching)
    except _REFUSALS as error:
        return Tried(untried=(f"No remedy was tried. {as_sentence(error, _RAISES)}",))
    layers = frozenset(own.statistics())
    frozen: dict[str, float] = {}
    if training:
        statistics_of = partial(trial.statistics_of, training, batching, footprint, most)
        frozen = trial.recalibrations(statistics_of, layers, before)
    if not layers:
        return trial.tried(training, frozen)
    if scored_on == "held-out":
        detail = f"pooled mean and unbiased variance of the same {trial.samples} held-out samples"
        statistics = own.statistics()
        trial.attempt(
            _EVALUATION_STATISTICS, lambda: trial.with_statistics(_EVALUATION_STATISTICS, statistics, before, detail)
        )
    trial.by_batch(layers, batching.batch_size, own, before)
    if larger:
        trial.larger_batches(layers, before, footprint)
    return trial.tried(training, frozen)


def _within(batches: Sequence[MicroBatch], seconds: float, each: float) -> Sequence[MicroBatch]:
    """The first micro-batches, whose samples take ``each`` so long, that fit into the time."""
    usual = max(batch.samples for batch in batches) if batches else 1
    return batches[: max(_FEWEST_TRIED, int(seconds / (each * usual)))]


@dataclass(frozen=True)
class _Statistics:
    """Statistics by layer, and how they were taken, a phrase."""

    values: LayerStatistics
    detail: str


@dataclass(frozen=True)
class _Trial:
    """Scores remedies one by one.

    Attributes:
        found, untried: The results.
    """

    session: Session
    batching: Batching
    goal: Goal
    goal_is_known: bool
    scored_on: Literal["held-out", "training"]
    batches: Sequence[MicroBatch]
    found: list[Remedy] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(batch.samples for batch in self.batches)

    def seconds_per_sample(self) -> float:
        """Of this thread, so that other programs on the machine do not change what is tried."""
        some = replace(self, batches=self.batches[:2])
        started = time.thread_time()
        some.score()
        return max(time.thread_time() - started, _CLOCK) / some.samples

    def attempt(self, name: str, run: Callable[[], Remedy | None]) -> None:
        """Add what a trial gives, or why it fails; None: it concerns no layer."""
        try:
            remedy = run()
            self.found.extend([] if remedy is None else [remedy])
        except _REFUSALS as error:
            self.untried.append(f'"{name}" was not tried. {as_sentence(error, _RAISES)}')

    def tried(self, training: Sequence[MicroBatch], frozen: Mapping[str, float]) -> Tried:
        """All that was found, with the samples that it took; nothing where no layer is concerned."""
        if not self.found and not self.untried:
            return Tried()
        samples = self.samples + sum(batch.samples for batch in training)
        return Tried(tuple(self.found), tuple(self.untried), samples, frozen)

    def score(
        self,
        by_batch: frozenset[int] = frozenset(),
        statistics: LayerStatistics | None = None,
        group: int | None = None,
    ) -> ScoreTable:
        return score_batches(
            self.session, "eval", self.batches, self.batching, by_batch=by_batch, statistics=statistics, group=group
        )

    def recalibrations(
        self, statistics_of: Callable[[frozenset[int]], list[_Statistics]], layers: frozenset[int], before: ScoreTable
    ) -> dict[str, float]:
        """Try the population statistics of training data in ``layers``, and in frozen layers, too.

        Returns:
            How far the statistics of frozen layers are from these, as in ``Tried``.
        """
        distances: dict[str, float] = {}
        control = before

        def usual() -> Remedy:
            nonlocal control
            remedy, control = self.best(_RECALIBRATED, statistics_of(frozenset()), before)
            return remedy

        def with_frozen() -> Remedy | None:
            found = statistics_of(self.frozen)
            if not self.frozen & found[0].values.keys():  # the model calls none of them
                return None
            distances.update(self._distances(found[0].values))
            return self.best(_WITH_FROZEN, found, before, control if layers else None)[0]

        if layers:
            self.attempt(_RECALIBRATED, usual)
        # Without that control nobody can say which layers a change comes from.
        if self.frozen and not self.untried:
            self.attempt(_WITH_FROZEN, with_frozen)
        return distances

    @property
    def frozen(self) -> frozenset[int]:
        """Selected layers with running statistics that training leaves in eval mode."""
        selected = self.session.layers.selected
        keeping = frozenset(layer.index for layer in selected if layer.info.running_mean is not None)
        return keeping & self.session.frozen

    def statistics_of(
        self,
        training: Sequence[MicroBatch],
        batching: Batching,
        footprint: Footprint,
        most: int,
        frozen: frozenset[int],
    ) -> list[_Statistics]:
        """Population statistics of the training data; where samples cannot be mixed, those of the eval path, too.

        Args:
            training, batching: As in ``what_if``.
            footprint: Memory of a sample.
            most: Samples times layers for statistics layer by layer.
            frozen: Layers whose statistics are taken although training leaves them in eval mode.
        """
        size, samples = batching.batch_size, sum(batch.samples for batch in training)
        if fits_in_memory(footprint, LARGE, self.session.device):
            batching = replace(batching, at_once=max(batching.at_once, LARGE // size))
        detail = "pooled mean and unbiased variance of {} training samples".format
        population, _ = steady_population(self.session, training, batching, frozen=frozen)
        values = population.statistics()
        found = [_Statistics(values, detail(samples))]
        if population.mixed:
            return found
        some = training[: max(2, most // (len(values) * size))]
        try:
            settled = settle_by_layer(self.session, some, frozenset(values), no_progress)
        except _REFUSALS:  # among others where they do not converge
            return found
        told = f"{detail(sum(batch.samples for batch in some))}, layer by layer"
        return [*found, _Statistics(settled.statistics, told)]

    def best(
        self, name: str, candidates: Sequence[_Statistics], before: ScoreTable, control: ScoreTable | None = None
    ) -> tuple[Remedy, ScoreTable]:
        """The statistics that score best, and their scores."""
        tables = [self.score(statistics=each.values) for each in candidates]
        tried = [
            (self._remedy(name, frozenset(each.values), before, table, control, each.detail), table)
            for each, table in zip(candidates, tables, strict=True)
        ]
        return min(tried, key=lambda found: self._badness(found[0]))

    def _distances(self, statistics: LayerStatistics) -> dict[str, float]:
        """Mismatch D of the running statistics of frozen layers against others."""
        found = {}
        for layer in self.session.layers.layers:
            info = layer.info
            if layer.index not in self.frozen & statistics.keys():
                continue
            assert info.running_mean is not None  # only layers with running statistics get here
            assert info.running_variance is not None
            scale = (info.running_variance.double() + info.eps).sqrt()
            mean, variance = statistics[layer.index]
            shift, ratio = (mean - info.running_mean.double()) / scale, (variance + info.eps).sqrt() / scale
            found[layer.name] = float((shift.square() + (ratio - 1).square()).mean())
        return {name: mismatch for name, mismatch in found.items() if math.isfinite(mismatch)}

    def with_statistics(self, name: str, statistics: LayerStatistics, before: ScoreTable, detail: str) -> Remedy:
        return self._remedy(name, frozenset(statistics), before, self.score(statistics=statistics), None, detail)

    def by_batch(self, layers: frozenset[int], size: int, own: Population, before: ScoreTable) -> None:
        """Batch statistics in batches of the scanned size, and those of single samples."""
        whole = self.batching.batch_size
        group = size if self.batching.emulation.trusted and whole % size == 0 else whole
        if group > 1:
            self.attempt(_BATCH_STATISTICS, lambda: self.of_groups(_BATCH_STATISTICS, group, layers, before))
        if (whole == 1 or self.batching.emulation.trusted) and own.fewest_values() / whole > 1:
            self.attempt(_INSTANCE_STATISTICS, lambda: self.of_groups(_INSTANCE_STATISTICS, 1, layers, before))

    def of_groups(
        self, name: str, group: int, layers: frozenset[int], before: ScoreTable, control: ScoreTable | None = None
    ) -> Remedy:
        after = self.score(by_batch=layers, group=group)
        detail = f"batches of {group} {self.scored_on} samples, each normalized with its own statistics"
        if group == 1:
            detail = f"every {self.scored_on} sample normalized with its own statistics"
        return self._remedy(name, layers, before, after, control, detail, by_batch=group > 1)

    def larger_batches(self, layers: frozenset[int], before: ScoreTable, footprint: Footprint) -> None:
        """Batch statistics in larger batches, where the model is known not to mix samples of different batches."""
        for factor in LARGER:
            size = factor * self.batching.batch_size
            enough = len(self.batches) >= factor and fits_in_memory(footprint, size, self.session.device)
            if self.batching.emulation.trusted and enough:
                name = f"{_BATCH_STATISTICS}, batches of {size}"
                self.attempt(name, partial(self._of_larger, name, factor, layers, before))

    def _of_larger(self, name: str, factor: int, layers: frozenset[int], before: ScoreTable) -> Remedy:
        size = factor * self.batching.batch_size
        batching = Batching(size, self.batching.emulation, max(1, self.batching.at_once // factor))
        starts = range(0, len(self.batches) // factor * factor, factor)
        trial = replace(self, batching=batching, batches=[_joined(self.batches[i : i + factor]) for i in starts])
        return trial.of_groups(name, size, layers, before, trial.score())

    def _badness(self, remedy: Remedy) -> float:
        measure = leading(remedy.before.known, self.goal_is_known)
        value = None if measure is None else remedy.after.of(measure)
        if value is None:
            return math.inf
        return -value if measure == "metric" and self.goal == "max" else value

    def _remedy(
        self,
        name: str,
        layers: frozenset[int],
        before: ScoreTable,
        after: ScoreTable,
        control: ScoreTable | None,
        detail: str,
        by_batch: bool = False,
    ) -> Remedy:
        baseline = control or before
        changes = {f"{measure}_change": _change(measure, after, baseline, by_batch) for measure in MEASURES}
        score, other = before.score("eval"), baseline.score("eval")
        same = _close(score.loss, other.loss) and _close(score.metric, other.metric)
        return Remedy(
            name=name,
            layers=tuple(layer.name for layer in self.session.layers.layers if layer.index in layers),
            before=score,
            after=after.score("eval"),
            control=None if same else other,
            images=self.samples,
            detail=detail,
            scored_on=self.scored_on,
            **changes,
        )


def _joined(batches: Sequence[MicroBatch]) -> MicroBatch:
    """Consecutive micro-batches as one.

    Raises:
        CannotEmulateError: They cannot be joined.
    """
    sizes = [batch.samples for batch in batches]
    return MicroBatch(join([batch.data for batch in batches], sizes), sum(sizes))


def _change(measure: Measure, after: ScoreTable, before: ScoreTable, by_batch: bool) -> Estimate | None:
    one, other = after.scores(measure, "eval"), before.scores(measure, "eval")
    return None if one is None or other is None else paired_difference(one, other, shared=by_batch)


def _close(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and math.isclose(one, other, rel_tol=1e-6))


def _require_a_measure(session: Session, held_out: Sequence[MicroBatch]) -> None:
    if session.functions.loss is None and session.functions.metric is None:
        raise UsageError(
            "What-if compares remedies by a loss or metric, but there is neither. Add loss(model, batch) or"
            " metric(model, batch) to the model file, or name one in the spec."
        )
    if not held_out:
        raise UsageError(
            "What-if measures remedies on held-out data, but there is none. Add load_eval_data(batch_size) to the"
            " model file, or name eval_data in the spec."
        )
