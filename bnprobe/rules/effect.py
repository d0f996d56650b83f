"""What the measured loss and metric mean: is inference worse than training, is held-out data, does a remedy help?

A change counts where its 95% interval excludes zero and it is larger than a floor: 2 points of a metric that lies
between 0 and 1, otherwise 5% of the value. Below that a change may be significant on enough samples, but it is no
reason to act: two trainings of the same network differ by more. The floor of a loss is also 0.5% of what the network
has learned, the distance to the loss of outputs that belong to other samples, since a loss close to 0 may double
without any consequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bnprobe.numbers import score
from bnprobe.records import (
    Chance,
    ChanceValues,
    Estimate,
    FreeRemedy,
    Gap,
    Goal,
    Interval,
    Measure,
    Remedy,
    Scan,
    Score,
    Severity,
    leading,
)
from bnprobe.rules.facts import Facts
from bnprobe.wording import either, option

FLOOR = 0.02
"""The smallest change that matters, of a metric between 0 and 1."""

PART = 0.05
"""The same for a loss, and for a metric whose scale is not known: this part of the value."""

MUCH = 5.0
"""Floors (2 points of a metric between 0 and 1) by which held-out data is worse than for every network."""

LITTLE = 0.15
"""Weights that make less than this part of the possible difference have hardly been trained."""

MOVES = 0.02
"""Relative L2 distance from which on outputs really change."""

LITTLE_HARM = 0.4
"""Floors of a significant harm from which on a report is not called clean."""

MENDED = 0.5
"""A remedy that wins back this part of what is lost mends the cause for the most part."""

UNSCORED = "needs a loss or metric"
"""Why a rule is skipped that judges by what a change does to loss and metric."""


def loss_decides() -> str:
    """What is to be known where the loss judges in place of a metric, sentences."""
    smaller = either("--goal min (repair: {goal: min} in a spec)", 'goal="min"')
    return (
        "Whether a larger or a smaller metric is better was not said. A larger one was taken to be, and the loss says"
        f" the opposite: so the loss decides, not the metric. If a smaller metric is better, give {smaller}, otherwise"
        f" {option('--goal', 'max')}."
    )


MODES = ("training", "inference")

STATISTICS = ("with batch statistics", "with running statistics")
"""What the two ends of an inconsistency are: random layers are off in both, so that the first is not quite training."""

WITH_FROZEN: FreeRemedy = "recalibrated with frozen layers"
"""Compared with recalibrating the other layers alone, where there are others."""

FEWEST_SCORED = 5
"""Scored micro-batches that inference is blamed by at least: samples of one share its statistics, and hang together."""

TO_99 = 1.31
"""Width of a 99% interval, in widths of the 95% interval (normal distribution)."""

TOLERANCE = 2.0
"""A change is known to be no harm, or no gain, where its interval ends within this many floors on that side."""

PART_OF_LEARNED = 0.005
"""And of a loss this part of the distance to that of other samples' outputs, which is large for a sure network."""

SMALLEST = 1e-12
"""Keeps the floor of a loss of 0 above 0."""

CONVERSIONS: dict[FreeRemedy, str] = {
    "example weighing": "example-weighing",
    "instance renorm": "instance-renorm",
    "instance statistics": "instance-renorm",
    "statistics per call": "per-domain",
}
"""Remedies without training for which layers are converted, and the repair targets."""

TRIED_TARGETS = frozenset(CONVERSIONS.values())
"""The repair targets that a scan tries without training, on the half of the held-out data that chooses nothing."""

COMMANDS: dict[FreeRemedy, str] = {"recalibrated": "recalibrate", WITH_FROZEN: "recalibrate --include-frozen"}
"""The commands that take running statistics anew, after "bnprobe "."""

MICRO_BATCHES: dict[FreeRemedy, str] = {
    "micro-batch statistics, averaged": "micro-batch-averaged",
    "micro-batch statistics, pooled": "micro-batch-pooled",
}
"""Running statistics of batches as in training, and the paths of ``bnprobe recalibrate`` that take them."""

ADVISED: tuple[FreeRemedy, ...] = (*CONVERSIONS, *MICRO_BATCHES)
"""Remedies of which a report advises at most one."""

Standing = Literal["worse", "better", "same", "unclear", "not measured"]
"""Surely worse; surely better; surely not much worse; measured, but not precisely enough; not measured."""

NO_WORSE: tuple[Standing, ...] = ("better", "same")
"""Measured well enough to know that it does no harm."""


@dataclass(frozen=True)
class Change:
    """A change of a loss or metric, in the direction of harm.

    Attributes:
        measure: "loss" or "metric".
        before, after: The two values.
        harm: By how much the second is worse; negative: better.
        interval: 95% interval of ``harm``; None: not known.
        floor: The smallest harm that matters.
    """

    measure: Measure
    before: float
    after: float
    harm: float
    interval: Interval | None
    floor: float

    @property
    def standing(self) -> Standing:
        """Whether the second value is worse."""
        if self.interval is None:
            return "unclear"
        low, high = self.interval
        if low > 0 and self.harm > self.floor:
            return "worse"
        if high is None:
            return "unclear"
        if high < 0 and -self.harm > self.floor:
            return "better"
        return "same" if self.harm <= self.floor and high <= TOLERANCE * self.floor else "unclear"

    @property
    def is_sure(self) -> bool:
        """Whether it is worse, or better, and a 99% interval excludes zero, too."""
        if self.interval is None or self.standing not in ("worse", "better"):
            return False
        end = self.interval[0] if self.standing == "worse" else self.interval[1]
        return end is not None and abs(self.harm) > TO_99 * abs(self.harm - end)

    @property
    def is_no_gain(self) -> bool:
        """Whether it is known to be no improvement that counts."""
        known = self.interval is not None and self.interval[0] >= -TOLERANCE * self.floor
        return known and self.harm > -self.floor

    @property
    def weight(self) -> float:
        """Harm in floors: what compares the loss and the metric."""
        return self.harm / self.floor

    def words(self, start: str, end: str) -> str:
        """E.g. "the metric is 0.94 in training and 0.46 at inference"; values that look the same are said once."""
        before, after = score(self.before), score(self.after)
        return f"the {self.measure} is {before} {start} and {'' if before == after else f'{after} '}{end}"


@dataclass(frozen=True)
class Effect:
    """All changes of one kind, of the loss and the metric."""

    changes: tuple[Change, ...]

    @property
    def standing(self) -> Standing:
        """Worse if the loss or the metric is; of the others the one that says most."""
        found = {change.standing for change in self.changes}
        order: tuple[Standing, ...] = ("worse", "better", "same", "unclear")
        return next((standing for standing in order if standing in found), "not measured")

    @property
    def is_worse(self) -> bool:
        return self.standing == "worse"

    @property
    def is_no_worse(self) -> bool:
        """Whether it was measured well enough to know that it does no harm."""
        return self.standing in NO_WORSE

    @property
    def is_sure_gain(self) -> bool:
        """Whether it is better by a measure with 99% confidence: several remedies are tried, by two measures each."""
        return self.standing == "better" and any(each.standing == "better" and each.is_sure for each in self.changes)

    @property
    def is_no_gain(self) -> bool:
        """Whether it was measured well enough to know that it does harm, or is by no measure a gain that counts."""
        return self.is_worse or (bool(self.changes) and all(change.is_no_gain for change in self.changes))

    @property
    def gains_little(self) -> bool:
        """Whether it is significantly better by a measure, however little."""
        ends = [change.interval[1] for change in self.changes if change.interval is not None]
        return any(end is not None and end < 0 for end in ends)

    @property
    def blemish(self) -> Change | None:
        """What is significantly worse by a part of the floor: too little to act on, but not clean."""
        return _first(
            each for each in self.changes if each.interval and each.interval[0] > 0 and each.weight > LITTLE_HARM
        )

    @property
    def main(self) -> Change | None:
        """The change that the standing rests on: of the metric, where it has one that counts as much."""
        return _first(change for change in self.changes if change.standing == self.standing)


def _first(changes: Iterable[Change]) -> Change | None:
    """The one to quote."""
    found = {change.measure: change for change in changes}
    first = leading(found.keys())
    return None if first is None else found[first]


def inconsistency(gaps: Sequence[Gap], chance: Sequence[Chance] = ()) -> Effect:
    """From batch statistics to running statistics, on the training data, all else in eval mode."""
    return Effect(
        tuple(
            _of_gap(gap, (gap.without_noise, gap.inference), gap.inconsistency_interval, gap.inconsistency, chance)
            for gap in judged(gaps, chance)
        )
    )


def surely_worse(facts: Facts) -> Change | None:
    """The change by which inference is surely worse than training, the metric first; None where that is not sure.

    It is the one bar for blaming inference where no layer is flagged: for a finding of its own (BN211), and for naming
    a cause that is within its limits. Beyond ``Effect.is_worse`` it asks for at least ``FEWEST_SCORED`` micro-batches,
    and for a 99% interval that excludes zero: a scan tests two measures, and accuses a network that looks healthy
    otherwise. Less makes the finding on a layer that is flagged anyway more serious.
    """
    return _surely("worse", facts)


def surely_better(facts: Facts) -> Change | None:
    """The change by which inference is surely better than training, by the bar of ``surely_worse``."""
    return _surely("better", facts)


def _surely(standing: Standing, facts: Facts) -> Change | None:
    changes = inconsistency(facts.gaps, facts.chance).changes
    sure = [each for each in changes if each.standing == standing and each.is_sure]
    return None if is_scored_on_few(facts) else _first(sure)


def is_scored_on_few(facts: Facts) -> bool:
    """Whether loss and metric were taken on too few micro-batches to blame inference."""
    enough = FEWEST_SCORED * (1 if facts.scan is None else facts.scan.batch_size)
    return 0 < max((gap.samples for gap in facts.gaps), default=0) < enough


def generalization(gaps: Sequence[Gap], chance: Sequence[Chance] = ()) -> Effect:
    """From training to held-out data, both with running statistics.

    In the metric; without one, in the loss, which every overfit raises.
    """
    gaps = judged(gaps, chance)
    first = leading([gap.measure for gap in gaps if gap.held_out is not None])
    return Effect(
        tuple(
            _of_gap(gap, (gap.inference, gap.held_out), gap.generalization_interval, gap.generalization, chance)
            for gap in gaps
            if gap.measure == first and gap.held_out is not None and gap.generalization is not None
        )
    )


def judged(gaps: Sequence[Gap], chance: Sequence[Chance] = ()) -> tuple[Gap, ...]:
    """The gaps that say which values are better: all but a metric that the loss contradicts.

    Where the user did not state its goal, a larger metric is taken to be better, as an accuracy is, unless the loss
    surely moves the other way in one of the steps. Then the loss alone judges.
    """
    if all(gap.goal_is_known for gap in gaps):
        return tuple(gaps)
    steps = zip(*(_steps(gap, chance) for gap in gaps), strict=True)
    if not any(_contradict([change for change in step if change is not None]) for step in steps):
        return tuple(gaps)
    return tuple(gap for gap in gaps if gap.goal_is_known)


def goal_of(gaps: Sequence[Gap], chance: Sequence[Chance] = ()) -> Goal | None:
    """Whether a larger or a smaller metric is better; None: it was not stated, and the loss contradicts the guess."""
    if all(gap.measure != "metric" for gap in gaps):
        return "max"
    return next((gap.goal for gap in judged(gaps, chance) if gap.measure == "metric"), None)


def doubt_of_goal(
    gaps: Sequence[Gap], remedies: Iterable[Remedy] = (), chance: Sequence[Chance] = ()
) -> Literal["no loss", "contradicted"] | None:
    """Why a guess of what is better in a metric is in doubt; None where it was stated, or the loss bears it out."""
    if all(gap.goal_is_known for gap in gaps):
        return None
    if all(gap.measure != "loss" for gap in gaps):
        return "no loss"
    tried = any(_contradict(tuple(_changes_of(remedy, "max", chance))) for remedy in remedies)
    return "contradicted" if tried or goal_of(gaps, chance) is None else None


def _steps(gap: Gap, chance: Sequence[Chance]) -> tuple[Change | None, ...]:
    """Every step from training to held-out data as a change; None where it was not measured."""
    noise, steady = (gap.training, gap.without_noise), (gap.without_noise, gap.inference)
    found = [
        _of_gap(gap, noise, gap.training_noise_interval, gap.training_noise, chance),
        _of_gap(gap, steady, gap.inconsistency_interval, gap.inconsistency, chance),
    ]
    if gap.held_out is None or gap.generalization is None:
        return (*found, None)
    last = (gap.inference, gap.held_out)
    return (*found, _of_gap(gap, last, gap.generalization_interval, gap.generalization, chance))


def _contradict(changes: Sequence[Change]) -> bool:
    """Whether one measure is surely worse and the other surely better, each by what a report may tell."""
    moved = [change for change in changes if excludes_zero(change.interval) and abs(change.weight) > LITTLE_HARM]
    return len({change.harm > 0 for change in moved}) > 1


def excludes_zero(interval: Interval | None) -> bool:
    """Whether a change with this interval is significant."""
    return interval is not None and (interval[0] > 0 or (interval[1] is not None and interval[1] < 0))


def _of_gap(
    gap: Gap, values: tuple[float, float], interval: Interval | None, difference: float, chance: Sequence[Chance]
) -> Change:
    return _change(gap.measure, gap.goal, values, interval, difference, learned(chance, gap.measure))


def of_remedy(remedy: Remedy, gaps: Sequence[Gap], chance: Sequence[Chance] = ()) -> Effect:
    """From the model as loaded to the model with a remedy, on held-out data.

    Where loss and metric contradict each other, the metric decides if its goal was stated, otherwise the loss.
    """
    goal = goal_of(gaps, chance)
    changes = tuple(_changes_of(remedy, goal or "max", chance))
    if goal is not None and not _contradict(changes):
        return Effect(changes)
    stated = goal is not None and all(gap.goal_is_known for gap in gaps)
    return Effect(tuple(change for change in changes if change.measure == ("metric" if stated else "loss")))


def gain(facts: Facts, name: FreeRemedy | None) -> Effect:
    """What a remedy without training does to held-out data; of one that was not tried, nothing is known."""
    remedy = tried(facts.remedies, name)
    return Effect(()) if remedy is None else of_remedy(remedy, facts.gaps, facts.chance)


def best_gain(
    names: Iterable[str], remedies: Iterable[Remedy], gaps: Sequence[Gap], chance: Sequence[Chance] = ()
) -> Remedy | None:
    """The best of the named remedies that are surely a gain, by the metric if it can judge; None if none is."""
    wanted = set(names)
    sure = [each for each in remedies if each.name in wanted and of_remedy(each, gaps, chance).is_sure_gain]
    goal = goal_of(gaps, chance)
    measure = leading({measure for each in sure for measure in each.after.known}, goal is not None)
    if measure is None:
        return None
    sign = -1.0 if measure == "metric" and goal == "max" else 1.0
    return min(sure, key=lambda each: math.inf if (value := each.after.of(measure)) is None else sign * value)


def advised(remedies: Sequence[Remedy], gaps: Sequence[Gap], chance: Sequence[Chance] = ()) -> Remedy | None:
    """The best of ``ADVISED`` that is surely a gain, and more of one than recalibrating; None: none is.

    Blends are scored on the same samples. Statistics of the sample alone are scored on others, and count where no blend
    is a gain. Running statistics of micro-batches cost nothing at inference, and are plain BN: a conversion must be
    better by more than the floor.
    """
    usual = tried(remedies, "recalibrated")
    found = [each for each in remedies if each.name in ADVISED and _beats(each, usual, gaps, chance)]
    convertible = [each for each in found if each.blend is not None or each.domains is not None]
    blends = best_gain(CONVERSIONS, [each for each in convertible if each.blend != 1], gaps, chance)
    conversion = blends or best_gain(CONVERSIONS, convertible, gaps, chance)
    plain = best_gain(MICRO_BATCHES, found, gaps, chance)
    if plain is None or conversion is None:
        return plain or conversion
    return conversion if advantage(conversion, plain, gaps, chance) > 1.0 else plain


def _beats(one: Remedy, usual: Remedy | None, gaps: Sequence[Gap], chance: Sequence[Chance]) -> bool:
    """Whether a gain, where it is one, is more than that of recalibrated statistics."""
    if one.recalibrated or usual is None or of_remedy(usual, gaps, chance).standing != "better":
        return True  # they are its control, or no alternative
    return advantage(one, usual, gaps, chance) > 1.0


def arguments_of(remedy: Remedy, scan: Scan) -> str:
    """What carries out one of ``ADVISED``, after "bnprobe ", but for the layers and the file."""
    if remedy.name in MICRO_BATCHES:
        return f"recalibrate --path {MICRO_BATCHES[remedy.name]} --batches {scan.batches}"
    setting = f"--domains {remedy.domains}" if remedy.domains is not None else f"--blend {remedy.blend:g}"
    return f"convert --to {CONVERSIONS[remedy.name]} {setting}"  # type: ignore[index]


def without_training(facts: Facts) -> str:
    """What is advised without training, a sentence; empty if nothing is."""
    found = advised(facts.remedies, facts.gaps, facts.chance)
    if found is None or facts.scan is None:
        return ""
    what = "let every sample's own statistics take part at inference too"
    if found.domains is not None:
        what = "give every domain statistics of its own"
    elif found.name in MICRO_BATCHES:
        what = "take the running statistics of batches as in training"
    return (
        f"Without training, {what} (bnprobe {arguments_of(found, facts.scan)}), which is surely better on"
        f" {found.scored_on} data."
    )


def advantage(one: Remedy, other: Remedy, gaps: Sequence[Gap], chance: Sequence[Chance] = ()) -> float:
    """By how many floors the one remedy is better than the other: of the metric, else of the loss."""
    known: dict[Measure, Goal | None] = {"metric": goal_of(gaps, chance), "loss": "min"}
    for measure, goal in known.items():
        before, after = other.after.of(measure), one.after.of(measure)
        if goal is not None and before is not None and after is not None:
            return floors_better(measure, goal, before, after)
    return 0.0


def of_frozen(facts: Facts) -> str | None:
    """What new statistics in frozen layers, too, do to held-out data, a clause; None where that was not measured."""
    found, change = tried(facts.remedies, WITH_FROZEN), gain(facts, WITH_FROZEN).main
    if found is None or change is None:
        return None
    start = "as loaded" if found.control is None else "with the other layers recalibrated"
    return f"on {found.scored_on} data {change.words(start, 'with recalibrated statistics in the frozen layers')}"


def severity_of_setting(facts: Facts, flagged: bool) -> Severity:
    """How serious a setting is that makes running statistics wrong: as they are, where that was measured."""
    if gain(facts, "recalibrated").is_sure_gain:
        return "error"
    return "error" if flagged and not inconsistency(facts.gaps, facts.chance).is_no_worse else "warning"


def tried(remedies: Iterable[Remedy], name: str | None) -> Remedy | None:
    """The remedy of that name, where it was tried."""
    return next((remedy for remedy in remedies if name is not None and remedy.name == name), None)


def recovered(remedy: Remedy, gaps: Sequence[Gap]) -> float | None:
    """The part of what held-out data loses against training data that a remedy wins back; None if nothing is lost."""
    known = {
        gap.measure: (gap.without_noise - before, after - before)
        for gap in judged(gaps)
        if (before := remedy.before.of(gap.measure)) is not None and (after := remedy.after.of(gap.measure)) is not None
    }
    first = leading(known.keys())
    lost, won = (0.0, 0.0) if first is None else known[first]
    return won / lost if lost else None


def wins_back_most(facts: Facts, name: FreeRemedy | None) -> bool | None:
    """Whether a remedy that surely helps wins back most of what held-out data loses; None: it does not, or unknown."""
    remedy = tried(facts.remedies, name)
    part = None if remedy is None else recovered(remedy, facts.gaps)
    return None if part is None or gain(facts, name).standing != "better" else part >= MENDED


def is_at_chance(chance: Sequence[Chance]) -> bool:
    """Whether the weights predict nothing, by every measure that can tell.

    In one mode outputs say no more about their own sample than about another one; in the other mode they say less than
    ``LITTLE`` of what there is to say.
    """
    modes = [[(each.measure, found) for each in chance if (found := getattr(each, mode))] for mode in MODES]
    if not all(modes):
        return False
    at_chance = [not any(_is_above_chance(*each) for each in values) for values in modes]
    return any(at_chance) and all(_part_learned(*each) < LITTLE for values in modes for each in values)


def learned(chance: Sequence[Chance], measure: str) -> float | None:
    """The distance of a loss or metric to that of outputs of other samples, in the mode where it is larger.

    None where not measured.
    """
    found = [getattr(each, mode) for each in chance if each.measure == measure for mode in MODES]
    return max((abs(values.change.mean) for values in found if values is not None), default=None)


def _part_learned(measure: str, found: ChanceValues) -> float:
    """The difference that the own sample makes, of the distance to the best value: 0, or of a metric up to 1 also 1."""
    ends = [abs(found.other)]
    if measure == "metric" and 0 <= found.other <= 1 and 0 <= found.own <= 1:
        ends.append(abs(1 - found.other))
    return abs(found.change.mean) / max(*ends, SMALLEST)


def _is_above_chance(measure: str, found: ChanceValues) -> bool:
    """In either direction: a metric may be one of which smaller values are better."""
    interval = found.change.interval
    sure = interval is None or not interval[0] <= 0 <= (interval[1] or 0.0)
    return sure and abs(found.change.mean) > _floor(measure, (found.own, found.other), None)


def _change(
    measure: Measure,
    goal: str,
    values: tuple[float, float],
    interval: Interval | None,
    difference: float,
    known: float | None,
) -> Change:
    sign = 1.0 if goal == "min" else -1.0
    floor = _floor(measure, values, known)
    return Change(measure, *values, sign * difference, _signed(interval, sign), floor)


def _changes_of(remedy: Remedy, goal: str, chance: Sequence[Chance]) -> Iterable[Change]:
    baseline: Score = remedy.control or remedy.before
    measures: tuple[tuple[Measure, str, Estimate | None], ...] = (
        ("loss", "min", remedy.loss_change),
        ("metric", goal, remedy.metric_change),
    )
    for measure, aim, change in measures:
        before, after = getattr(baseline, measure), getattr(remedy.after, measure)
        if before is None or after is None:
            continue
        interval = None if change is None else change.interval
        yield _change(measure, aim, (before, after), interval, after - before, learned(chance, measure))


def floors_better(measure: Measure, goal: Goal, before: float, after: float) -> float:
    """By how many floors the second value is better than the first; negative: worse."""
    return (1.0 if goal == "max" else -1.0) * (after - before) / _floor(measure, (before, after), None)


def _signed(interval: Interval | None, sign: float) -> Interval | None:
    if interval is None or sign > 0:
        return interval
    low, high = interval
    return (float("-inf") if high is None else -high), -low


def _floor(measure: str, values: Sequence[float], known: float | None) -> float:
    largest = max(map(abs, values))
    if measure == "metric":
        return FLOOR if all(0 <= value <= 1 for value in values) else PART * largest
    return max(PART * largest, PART_OF_LEARNED * (known or 0.0), SMALLEST)
