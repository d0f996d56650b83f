"""One remedy after the other on the same held-out data, scored against the model as loaded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any, Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.errors import BnprobeError
from bnprobe.measure.batch import CannotEmulateError, MicroBatch, join
from bnprobe.measure.draw import PARTS, Draw, draw_of
from bnprobe.measure.forward_pass import Blend, LayerStatistics, Pass, Slot
from bnprobe.measure.memory import Footprint, fits_in_memory
from bnprobe.measure.physical_batch import Batching, as_sentence
from bnprobe.measure.population import LARGE, Population, population_by_layer, steady_population
from bnprobe.measure.scores import MOST_SAMPLES, ScoreTable, run_together, score_batches
from bnprobe.measure.session import Session, no_progress
from bnprobe.records import FREE_REMEDIES, MEASURES, Estimate, Goal, Measure, Remedy, Score, leading
from bnprobe.stats.scores import paired_difference, with_draw

(
    _RECALIBRATED,
    _EVALUATION_STATISTICS,
    _BATCH_STATISTICS,
    _INSTANCE_STATISTICS,
    _INSTANCE_RENORM,
    _EXAMPLE_WEIGHING,
    _AVERAGED,
    _POOLED,
    _WITH_FROZEN,
    _PER_CALL,
) = FREE_REMEDIES

LARGER = (4, 16)
"""Factors by which batches are made larger than those scanned."""

BLEND = 0.5
"""The blend that instance renorm is tried with: that of ``bnprobe convert``."""

WEIGHTS = (0.125, 0.25, 0.5, 0.75)
"""Weights of the sample's own moments among which one is chosen for example weighing. 1 is "instance statistics"."""

_CHOOSING = 64
"""Samples that every weight is scored on: they need only tell the weights apart, other samples score the one chosen."""

_ALIKE = 0.01
"""Running statistics that are no farther apart than this, in D, in any layer are tried once."""

_HALF = slice(None, None, 2)
"""The micro-batches that score conversions; the others choose what there is to choose."""

_QUARTER = slice(None, None, PARTS)
"""The micro-batches that score each of these statistics, one pass over the scored data in all; and those that score a
remedy first where passes are dear. From all over the data, since it may be sorted."""

_FEWEST_FIRST = 8
"""Micro-batches at least that show a remedy to be worse before it is scored on all: so many give an interval."""

_PASS = "a pass over the data"
_OF_SAMPLES = "the moments of every sample at inference, and weights that plain BN cannot use"
_OF_CALLS = "a pass over the data, and weights that plain BN cannot use"
_OF_BATCHES = "outputs that depend on the other samples of the batch"

Kind = tuple[Literal["call", "domain"], int]
"""What the data of a call of a shared layer belongs to, by number."""

REFUSALS = (CannotEmulateError, BnprobeError)
"""What a model raises that cannot be run as a trial wants it."""

RAISES = "The model raises"

_CLOCK = 1e-6
"""Seconds that no score takes less than, where the clock of a thread is coarse."""


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


@dataclass(frozen=True)
class MicroBatchStatistics:
    """Running statistics that a layer would have of micro-batches as in training, with all but the norms in eval mode.

    Attributes:
        averaged: The variance is the mean of those that the micro-batches were normalized with, biased.
        pooled: It also has the spread of their means: that of all values together.
        detail: What they were taken of, a phrase.
        parts: Both for all but one of some equal parts of the micro-batches, for each part.
        sampled: As in ``Draw``.
    """

    averaged: LayerStatistics
    pooled: LayerStatistics
    detail: str
    parts: Sequence[tuple[LayerStatistics, LayerStatistics]] = ()
    sampled: float = 0.0


@dataclass(frozen=True)
class _Statistics:
    """Statistics by layer, how they were taken, a phrase, and how they vary with what they were taken of."""

    values: LayerStatistics
    detail: str
    draw: Draw


@dataclass(frozen=True)
class Trial:
    """Scores remedies one by one.

    Attributes:
        found, untried: The results.
        base: Statistics and scores that a conversion starts from, other than those as loaded; none: as loaded.
        means: What is known to be a mean over samples.
        brief: Passes are dear: remedies that promise nothing on one in ``PARTS`` of the micro-batches are scored on no
            more, and statistics without a part of their data are put together from those of the other parts.
        together: Samples that run at once at least where micro-batches may run together and are scored only.
        population: Samples of the training data, where it is a finite set, of which none was read twice.
    """

    session: Session
    batching: Batching
    goal: Goal
    goal_is_known: bool
    scored_on: Literal["held-out", "training"]
    batches: Sequence[MicroBatch]
    found: list[Remedy] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    base: list[tuple[LayerStatistics, ScoreTable]] = field(default_factory=list)
    population: int | None = None
    means: frozenset[Measure] = frozenset()
    brief: bool = False
    together: int = 1

    @property
    def half(self) -> Trial:
        """Of the micro-batches that choose nothing."""
        return replace(self, batches=self.batches[_HALF])

    @property
    def samples(self) -> int:
        return _samples(self.batches)

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
        except REFUSALS as error:
            self.untried.append(f'"{name}" was not tried. {as_sentence(error, RAISES)}')

    def tried(self, training: Sequence[MicroBatch], frozen: Mapping[str, float]) -> Tried:
        """All that was found, with the samples that it took; nothing where no layer is concerned."""
        if not self.found and not self.untried:
            return Tried()
        samples = self.samples + _samples(training)
        return Tried(tuple(self.found), tuple(self.untried), samples, frozen)

    def score(
        self,
        by_batch: frozenset[int] = frozenset(),
        statistics: LayerStatistics | None = None,
        group: int | None = None,
        blend: Blend | None = None,
        most: int = MOST_SAMPLES,
    ) -> ScoreTable:
        batching = self.batching
        return score_batches(
            self.session,
            "eval",
            self.batches,
            replace(batching, at_once=max(batching.at_once, self.together // batching.batch_size)),
            by_batch=by_batch,
            statistics=statistics,
            group=group,
            blend=blend,
            most=most,
            means=self.means,
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
            remedy, statistics, control = self.best(_RECALIBRATED, statistics_of(frozenset()), before)
            if not self._is_worse(remedy):
                self.base.append((statistics, control))
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

        def taken(batches: Sequence[MicroBatch]) -> Population:
            return steady_population(self.session, batches, batching, frozen=frozen)[0]

        def draw(values: LayerStatistics, batches: Sequence[MicroBatch]) -> Draw:
            of = self.population, self.brief
            return draw_of(lambda some: taken(some).statistics(), values, batches, batching, *of)

        population = taken(training)
        values = population.statistics()
        found = [_Statistics(values, detail(samples), draw(values, training))]
        if population.mixed:
            return found
        some = training[: max(2, most // (len(values) * size))]
        try:
            by_layer = population_by_layer(self.session, some, frozenset(values), no_progress)
        except REFUSALS:  # among others where they do not converge
            return found
        told = f"{detail(sum(batch.samples for batch in some))}, layer by layer"
        # Layer by layer the parts would take too long. What the choice of samples does is much the same on both paths.
        return [*found, _Statistics(by_layer.statistics, told, draw(by_layer.statistics, some))]

    def _with_draw(self, remedy: Remedy, draw: Draw) -> Remedy:
        """The same with intervals that cover the choice of the data, too, where they would be sure without it."""
        changes = remedy.loss_change, remedy.metric_change
        if draw.sampled == 1 or not any(map(_direction, changes)):
            return remedy
        some, scores = replace(self, batches=self.batches[_QUARTER]), list[Score]()
        with suppress(*REFUSALS):  # then it is not known
            scores = [some.score(statistics=each, most=0).score("eval") for each in draw.without()]

        def covering(measure: Measure, change: Estimate | None) -> Estimate | None:
            values = [math.nan if (value := score.of(measure)) is None else value for score in scores]
            return change and with_draw(change, torch.tensor(values, dtype=torch.float64), draw.sampled)

        loss, metric = (covering(*each) for each in zip(MEASURES, changes, strict=True))
        return replace(remedy, loss_change=loss, metric_change=metric)

    def best(
        self, name: str, candidates: Sequence[_Statistics], before: ScoreTable, control: ScoreTable | None = None
    ) -> tuple[Remedy, LayerStatistics, ScoreTable]:
        """The statistics that score best, and their scores."""
        tables = [self.score(statistics=each.values) for each in candidates]
        tried = [
            (self._remedy(name, frozenset(each.values), before, table, control, each.detail), each.values, table)
            for each, table in zip(candidates, tables, strict=True)
        ]
        best = min(range(len(tried)), key=lambda place: self._badness(tried[place][0].after))
        remedy, values, table = tried[best]
        return self._with_draw(replace(remedy, cost=_PASS), candidates[best].draw), values, table

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

    def with_statistics(self, name: str, found: _Statistics, before: ScoreTable) -> Remedy:
        score = partial(Trial.score, statistics=found.values)
        remedy = self._scored(score, name, frozenset(found.values), before, None, found.detail)
        return self._with_draw(replace(remedy, cost=_PASS), found.draw)

    def _scored(
        self,
        score: Callable[[Trial], ScoreTable],
        name: str,
        layers: frozenset[int],
        before: ScoreTable,
        control: ScoreTable | None,
        detail: str,
        by_batch: bool = False,
    ) -> Remedy:
        """The remedy, scored on all micro-batches, or where passes are dear until it promises nothing."""
        if not self.brief or len(self.batches) < PARTS * _FEWEST_FIRST:
            return self._remedy(name, layers, before, score(self), control, detail, by_batch)
        first = replace(self, batches=self.batches[_QUARTER])
        after, baseline = score(first), control and control.part(_QUARTER)
        remedy = first._remedy(name, layers, before.part(_QUARTER), after, baseline, detail, by_batch)
        if self._promises_nothing(remedy):
            return replace(remedy, cut_short=True)
        others = [batch for place, batch in enumerate(self.batches) if place % PARTS]
        after = _interleaved(after, score(replace(self, batches=others)))
        return self._remedy(name, layers, before, after, control, detail, by_batch)

    def _promises_nothing(self, remedy: Remedy) -> bool:
        """Whether it is surely worse, and not even on average better by a measure that says what is better."""
        changes: dict[Measure, Estimate | None] = {"loss": remedy.loss_change, "metric": remedy.metric_change}
        harm = {measure: self._signs[measure] * change.mean for measure, change in changes.items() if change}
        if not self.goal_is_known and "loss" in harm:
            harm.pop("metric", None)
        return self._is_worse(remedy) and all(each >= 0 for each in harm.values())

    def of_evaluation_data(self, own: Population, before: ScoreTable) -> None:
        """The statistics of the samples that are scored."""
        detail = f"pooled mean and unbiased variance of the same {self.samples} held-out samples"

        def take(batches: Sequence[MicroBatch]) -> LayerStatistics:
            return steady_population(self.session, batches, self.batching)[0].statistics()

        values = own.statistics()
        found = _Statistics(values, detail, draw_of(take, values, self.batches, self.batching, None, self.brief))
        self.attempt(_EVALUATION_STATISTICS, lambda: self.with_statistics(_EVALUATION_STATISTICS, found, before))

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
        score = partial(Trial.score, by_batch=layers, group=group)
        detail = f"batches of {group} {self.scored_on} samples, each normalized with its own statistics"
        if group == 1:
            detail = f"every {self.scored_on} sample normalized with its own statistics"
        remedy = self._scored(score, name, layers, before, control, detail, by_batch=group > 1)
        return replace(remedy, blend=1.0, cost=_OF_SAMPLES) if group == 1 and self._convertible(layers) else remedy

    def by_sample(self, layers: frozenset[int], own: Population, before: ScoreTable) -> None:
        """Conversions after which every sample is normalized in part by its own statistics."""
        usual = max(batch.samples for batch in self.batches)
        if own.most_values() / usual <= 1 or not self._convertible(layers):
            return
        self.attempt(_INSTANCE_RENORM, lambda: self.instance_renorm(layers, before))
        if len(self.batches) > 1:
            self.attempt(_EXAMPLE_WEIGHING, lambda: self.example_weighing(layers, before))

    def _convertible(self, layers: frozenset[int]) -> bool:
        modules = [layer.module for layer in self.session.layers.layers if layer.index in layers]
        return all(isinstance(module, _BatchNorm) for module in modules)

    def instance_renorm(self, layers: frozenset[int], before: ScoreTable) -> Remedy:
        detail = "outputs with the statistics of every sample and with the running ones, half and half"
        return self._converted(_INSTANCE_RENORM, Blend(layers, BLEND, "outputs"), before, detail)

    def example_weighing(self, layers: frozenset[int], before: ScoreTable) -> Remedy:
        """The weight is chosen on the micro-batches that score nothing, of which a few are enough."""
        few = max(1, _CHOOSING // max(batch.samples for batch in self.batches))
        choosing = replace(self, batches=self.batches[1::2][:few])
        statistics, _ = self._start(before)
        tried: dict[float, Score] = {}
        for weight in WEIGHTS:
            blend = Blend(layers, weight, "moments")
            tried[weight] = choosing.score(statistics=statistics, blend=blend, most=0).score("eval")
            losses = [math.inf if score.loss is None else score.loss for score in tried.values()]
            if self.brief and losses[-1] > min(losses):
                break  # it is much like a parabola in the weight: more would be worse still
        best = min(tried, key=lambda weight: self._badness(tried[weight]))
        weights = ", ".join(f"{weight:g}" for weight in tried)
        detail = (
            f"moments of every sample mixed into the running ones with weight {best:g}, of {weights} the best on"
            f" {choosing.samples} other {self.scored_on} samples"
        )
        return self._converted(_EXAMPLE_WEIGHING, Blend(layers, best, "moments"), before, detail)

    def _start(self, before: ScoreTable) -> tuple[LayerStatistics | None, ScoreTable]:
        """What a conversion starts from."""
        return self.base[0] if self.base else (None, before)

    def _converted(self, name: str, blend: Blend, before: ScoreTable, detail: str) -> Remedy:
        statistics, control = self._start(before)
        score, baseline = partial(Trial.score, statistics=statistics, blend=blend), control.part(_HALF)
        remedy = self.half._scored(score, name, blend.layers, before.part(_HALF), baseline, detail)
        recalibrated = statistics is not None
        return replace(remedy, blend=blend.weight, recalibrated=recalibrated, cost=_OF_SAMPLES)

    def by_call(
        self, shared: frozenset[int], training: Sequence[MicroBatch], batching: Batching, before: ScoreTable
    ) -> None:
        """Statistics of their own for the calls of layers that are called more than once."""
        if shared and training and self._convertible(shared):
            self.attempt(_PER_CALL, lambda: self.per_call(shared, training, batching, before))

    def per_call(
        self, shared: frozenset[int], training: Sequence[MicroBatch], batching: Batching, before: ScoreTable
    ) -> Remedy:
        """As ``bnprobe convert --to per-domain`` takes them: these layers use batch statistics, others running ones."""
        statistics, control = self._start(before)
        own, kinds = self._by_kind(shared, training, batching, statistics)
        values: LayerStatistics = {**(statistics or {}), **own}
        score = partial(Trial.score, statistics=values)
        domains = {number for name, number in kinds.values() if name == "domain"}
        known = len(domains) > 1 and all(name == "domain" for name, _ in kinds.values())
        what = "domain" if known else "call"
        detail = f"each {what} with the statistics of its own data, of {_samples(training)} training samples"
        remedy = self.half._scored(score, _PER_CALL, shared, before.part(_HALF), control.part(_HALF), detail)
        number = max(domains) + 1 if known else None
        remedy = replace(remedy, recalibrated=statistics is not None, domains=number, cost=_OF_CALLS)

        def take(batches: Sequence[MicroBatch]) -> LayerStatistics:
            return {**(statistics or {}), **self._by_kind(shared, batches, batching, statistics)[0]}

        draw = draw_of(take, values, training, batching, self.population, self.brief)
        return self.half._with_draw(remedy, draw)

    def _by_kind(
        self,
        shared: frozenset[int],
        training: Sequence[MicroBatch],
        batching: Batching,
        statistics: LayerStatistics | None,
    ) -> tuple[LayerStatistics, dict[Slot, Kind]]:
        """The statistics of each call of shared layers, those of its own data, and what data that is."""
        kinds: dict[Slot, Kind] = {}
        populations: dict[Kind, Population] = {}

        def gather(batches: list[Any], size: int, outputs: Any, pass_: Pass) -> None:
            for slot, record in pass_.records.items():
                if slot[0] in shared:
                    domain = pass_.domains[slot]
                    kind: Kind = ("call", slot[1]) if domain is None else ("domain", domain)
                    if kinds.setdefault(slot, kind) != kind:
                        raise CannotEmulateError("a call is of one domain in one batch and of another in the next")
                    populations.setdefault(kind, Population()).add({slot: record}, len(batches))

        run_together(self.session, "eval", training, batching, gather, by_batch=shared, statistics=statistics)
        return {slot: populations[kind].statistics()[slot[0]] for slot, kind in kinds.items()}, kinds

    def of_micro_batches(self, layers: frozenset[int], found: MicroBatchStatistics, before: ScoreTable) -> None:
        """Statistics of micro-batches, those that are unlike all that were tried before."""
        known = [statistics for statistics, _ in self.base]
        for place, name, statistics in ((1, _POOLED, found.pooled), (0, _AVERAGED, found.averaged)):
            if statistics.keys() == layers and all(self._differ(statistics, other) for other in known):
                draw = Draw(partial(map, itemgetter(place), found.parts), found.sampled)
                one = _Statistics(statistics, found.detail, draw)
                self.attempt(name, partial(self.with_statistics, name, one, before))
                known.append(statistics)

    def _differ(self, one: LayerStatistics, other: LayerStatistics) -> bool:
        """Whether any layer would give other outputs, as D measures them."""
        for layer in self.session.layers.layers:
            if layer.index in one and layer.index in other:
                (mean, variance), (reference, spread) = one[layer.index], other[layer.index]
                eps = layer.info.eps
                std, usual = (variance + eps).sqrt(), (spread + eps).sqrt()
                distance = ((mean - reference).square() + (std - usual).square()) / usual.square()
                if not bool(distance.mean() <= _ALIKE):
                    return True
        return False

    def _is_worse(self, remedy: Remedy) -> bool:
        """Whether it is surely worse than as loaded, in the metric, or in the loss while the metric is no better."""
        loss, metric = _direction(remedy.loss_change), _direction(remedy.metric_change)
        metric = metric if self.goal == "min" else -metric
        if not self.goal_is_known and loss:
            return loss > 0
        return metric > 0 or (loss > 0 and metric == 0)

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

    def _badness(self, score: Score) -> tuple[float, ...]:
        """By the measure that comes first, then by the other."""
        first = leading(MEASURES, self.goal_is_known)
        order = sorted(MEASURES, key=lambda measure: measure != first)
        given = [measure for measure in order if getattr(self.session.functions, measure) is not None]
        return tuple(math.inf if (value := score.of(each)) is None else self._signs[each] * value for each in given)

    @property
    def _signs(self) -> dict[Measure, float]:
        """What turns a measure into one of which less is better."""
        return {"loss": 1.0, "metric": -1.0 if self.goal == "max" else 1.0}

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
        loss_change, metric_change = (_change(measure, after, baseline, by_batch) for measure in MEASURES)
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
            cost=_OF_BATCHES if by_batch else "",
            loss_change=loss_change,
            metric_change=metric_change,
        )


def _direction(change: Estimate | None) -> int:
    """1: surely up, -1: surely down."""
    if change is None or change.interval is None:
        return 0
    low, high = change.interval
    return 1 if low > 0 else -1 if high is not None and high < 0 else 0


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


def _interleaved(quarter: ScoreTable, others: ScoreTable) -> ScoreTable:
    """The scores of the ``_QUARTER`` and of all others, in the order of the micro-batches."""
    rows = {key: list(each) for key, each in others.rows.items()}
    for key, each in quarter.rows.items():
        for place, row in enumerate(each):
            rows[key].insert(PARTS * place, row)
    return replace(quarter, rows=rows)


def _close(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and math.isclose(one, other, rel_tol=1e-6))


def _samples(batches: Sequence[MicroBatch]) -> int:
    return sum(batch.samples for batch in batches)
