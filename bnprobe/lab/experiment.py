"""What an experiment is: conditions, a trial of one condition with one seed, and what all trials show."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from bnprobe.numbers import percent, score
from bnprobe.records import Claim, ClaimVerdict, Estimate, LabChart, LabSeries, LabTable, Setting, Trial
from bnprobe.records.lab import FEWEST_SEEDS
from bnprobe.report.figures import estimate
from bnprobe.stats.intervals import half_width

Condition = Mapping[str, Setting]
"""What is different from trial to trial: plain values by name."""

Bounds = tuple[float | None, float | None]
"""The least and the most that a figure can be by what it is; None: there is no such bound."""

SHARE: Bounds = (0.0, 1.0)
"""The bounds of an accuracy and the like."""

NOT_NEGATIVE: Bounds = (0.0, None)

_ROUNDING = 1e-12
"""Relative half width of an interval below which figures are all the same."""

Values = Mapping[str, float | Sequence[float | None] | None]
"""What a trial measured, by name; what is not finite is kept as None."""


@dataclass(frozen=True)
class Budget:
    """How much work a run may be.

    Attributes:
        factor: A multiple of the default, which takes two cores ten minutes at most, with the digits.
        seeds: Trials of each condition.
        data: What ``--data`` names; None: the digits of scikit-learn.
    """

    factor: float = 1.0
    seeds: int = 5
    data: str | None = None

    def of(self, amount: int, least: int = 1) -> int:
        """So many steps, samples or repetitions, where the default is ``amount``."""
        return max(least, round(amount * self.factor))


class Experiment(ABC):
    """An experiment; it has no state, so that trials can run in any order and in any process.

    What is made of the trials is made whatever they show; some of them may have no figures.
    """

    @abstractmethod
    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """What is compared."""

    @abstractmethod
    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Measure one condition; everything random was seeded with ``seed``, and torch has one thread."""

    def answer(self, results: Results, budget: Budget) -> str:
        """What the figures answer to the question of the experiment, a sentence or two; empty: they give no answer.

        A figure that is missing, as a `MissingFigureError` says, leaves the question without one.
        """
        return ""

    @abstractmethod
    def claims(self, results: Results, budget: Budget) -> Iterable[Claim]:
        """What the trials show or refute, the most important first."""

    @abstractmethod
    def charts(self, results: Results, budget: Budget) -> Iterable[LabChart]:
        """Their figures; the first chart stands for the experiment in lists."""

    def tables(self, results: Results, budget: Budget) -> Iterable[LabTable]:
        """Figures that no chart shows."""
        return ()

    def notes(self, results: Results, budget: Budget) -> Iterable[str]:
        """What the reader should know, a sentence each."""
        return ()


class MissingFigureError(LookupError):
    """No trial has a figure that is asked for."""


class Results:
    """The trials of an experiment, to be asked by condition.

    Args:
        trials: All with the same seeds.
    """

    def __init__(self, trials: Iterable[Trial]) -> None:
        self.trials = tuple(trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    def where(self, **condition: Setting) -> Results:
        """Those with these settings."""
        wanted = condition.items()
        return Results(trial for trial in self.trials if wanted <= trial.condition.items())

    def levels(self, setting: str) -> list[Setting]:
        """The values of a setting, in their order."""
        return list(dict.fromkeys(trial.condition[setting] for trial in self.trials if setting in trial.condition))

    def by_seed(self, name: str) -> dict[int, float]:
        """A figure of each trial by its seed; trials without it are left out.

        Raises:
            ValueError: Several trials have one seed: the condition does not name one of the things compared.
        """
        found: dict[int, float] = {}
        for trial in self.trials:
            if trial.seed in found:
                raise ValueError(f"Several trials of seed {trial.seed} have {name}: name the whole condition.")
            value = trial.values.get(name)
            if isinstance(value, int | float):
                found[trial.seed] = float(value)
        return found

    def value(self, name: str, **condition: Setting) -> float:
        """A figure of the one trial with these settings, where the trials are of one seed.

        Raises:
            MissingFigureError: There is no such trial, or it has no such figure.
        """
        values = list(self.where(**condition).by_seed(name).values())
        if not values:
            raise MissingFigureError(name)
        return values[0]

    def values(self, name: str) -> list[float]:
        """A figure of all trials that have it, in their order."""
        found = (trial.values.get(name) for trial in self.trials)
        return [float(value) for value in found if isinstance(value, int | float)]

    def largest(self, *names: str) -> float:
        """`worst` of these figures, of all trials."""
        return worst(trial.number(name) for name in names for trial in self.trials if name in trial.values)

    def mean(self, name: str) -> Estimate | None:
        """The mean of a figure over seeds with its 95% t interval; None: no trial has it."""
        return mean_of(list(self.by_seed(name).values()))

    def averaged(self, name: str) -> Estimate | None:
        """As `mean`, of the mean of a figure over all conditions of a seed."""
        return self.mean_over_seeds(lambda of_seed: average(of_seed.values(name)))

    def mean_over_seeds(self, figure: Callable[[Results], float]) -> Estimate | None:
        """As `mean`, of what a function makes of the trials of each seed; a seed that misses a figure is left out."""
        found = []
        for seed in dict.fromkeys(trial.seed for trial in self.trials):
            with suppress(MissingFigureError):
                found.append(figure(Results(trial for trial in self.trials if trial.seed == seed)))
        return mean_of(found)

    def less(self, name: str, other: Results, its: str | None = None) -> Estimate | None:
        """The mean difference of a figure from one of other trials of the same seeds, paired by seed.

        Args:
            name: Of the figure.
            other: The other trials, or the same.
            its: Name of their figure; None: the same.
        """
        return mean_of([here - there for here, there in self.paired(name, other, its)])

    def over(self, name: str, other: Results, its: str | None = None) -> Estimate | None:
        """The mean ratio of a figure to one of other trials, as `less`; seeds in which that one is 0 are left out."""
        return mean_of([here / there for here, there in self.paired(name, other, its) if there])

    def paired(self, name: str, other: Results, its: str | None = None) -> list[tuple[float, float]]:
        """A figure and one of other trials, of each seed that has both; arguments as of `less`."""
        here, there = self.by_seed(name), other.by_seed(its or name)
        return [(here[seed], there[seed]) for seed in here if seed in there]

    def series(self, figure: str, over: str, name: str, **condition: Setting) -> LabSeries:
        """The mean of a figure over seeds, at each value of a setting.

        Args:
            figure: Name of the figure.
            over: The setting, along x.
            name: What the series is called.
            condition: The other settings.
        """
        chosen = self.where(**condition)
        levels = chosen.levels(over)
        x = [level if isinstance(level, str) else float(level) for level in levels]
        return series(name, x, [chosen.where(**{over: level}).mean(figure) for level in levels])

    def several_series(self, over: str, names: Mapping[str, str]) -> tuple[LabSeries, ...]:
        """As `series`, of several figures at each value of one setting; the names are by figure."""
        return tuple(self.series(figure, over, name) for figure, name in names.items())

    def along(self, figure: str, x: Sequence[float], name: str) -> LabSeries:
        """The mean over seeds of a figure that has a value at each x, e.g. at each epoch; diverged runs are left out.

        Args:
            figure: Name of the figure.
            x: Where its values are.
            name: What the series is called.
        """
        lists = [value for trial in self.trials if isinstance(value := trial.values.get(figure), tuple)]
        places = [[value for each in lists if (value := each[place]) is not None] for place in range(len(x))]
        return series(name, x, [mean_of(values) for values in places])


def average(values: Sequence[float]) -> float:
    """The mean.

    Raises:
        MissingFigureError: There are no values.
    """
    if not values:
        raise MissingFigureError
    return math.fsum(values) / len(values)


def mean_of(values: Sequence[float]) -> Estimate | None:
    """The mean with its 95% t interval, which fewer than three values do not have; None: there are no values."""
    if not values:
        return None
    mean = average(values)
    half = half_width(len(values), 0.0, math.fsum((value - mean) ** 2 for value in values))  # centred: no cancellation
    if half is None or len(values) < FEWEST_SEEDS:
        return Estimate(mean, None)
    half = half if half > _ROUNDING * abs(mean) else 0.0
    return Estimate(mean, (mean - half, mean + half))


def worst(values: Iterable[float | None]) -> float:
    """The largest; NaN: there are none, or one of them is no number, which ``max`` would pass over."""
    found = [math.nan if value is None else value for value in values]
    return math.nan if any(map(math.isnan, found)) else max(found, default=math.nan)


def series(name: str, x: Sequence[float | str], y: Sequence[Estimate | None]) -> LabSeries:
    """Estimates against x."""
    ends = [(None, None) if value is None or value.interval is None else value.interval for value in y]
    return LabSeries(
        name,
        tuple(x),
        tuple(None if value is None else value.mean for value in y),
        tuple(low for low, _ in ends),
        tuple(high for _, high in ends),
    )


def cell(found: Estimate | None, bounds: Bounds = (None, None)) -> str:
    """A figure in a table, which is within bounds by what it is; empty: no trial has it."""
    if found is None:
        return ""
    low, high = found.interval or (None, None)
    ends = None if low is None or high is None else (_cut(low, bounds), _cut(high, bounds))
    return estimate(Estimate(found.mean, ends))


def told(found: Estimate | float | None, bounds: Bounds = (None, None)) -> str:
    """A figure in an answer, which is within bounds by what it is.

    Raises:
        MissingFigureError: No trial has it.
    """
    if found is None:
        raise MissingFigureError
    return cell(found, bounds) if isinstance(found, Estimate) else score(found)


def bounded(chart: LabChart) -> LabChart:
    """The chart with intervals that end at the bounds of its figures; on a logarithmic axis none is negative."""
    least, most = chart.bounds
    bounds = (0.0 if chart.y_scale == "log" and least is None else least, most)

    def cut(ends: Sequence[float | None]) -> tuple[float | None, ...]:
        return tuple(None if each is None else _cut(each, bounds) for each in ends)

    return replace(chart, series=tuple(replace(one, low=cut(one.low), high=cut(one.high)) for one in chart.series))


def _cut(end: float, bounds: Bounds) -> float:
    least, most = bounds
    end = end if least is None else max(end, least)
    return end if most is None else min(end, most)


def formula(name: str, x: Sequence[float], y: Callable[[float], float]) -> LabSeries:
    """What a formula gives at each x."""
    nothing = (None,) * len(x)
    return LabSeries(name, tuple(x), tuple(y(each) for each in x), nothing, nothing, theory=True)


def _ends(found: Estimate | None) -> tuple[float, float]:
    """Of its interval; of none, an interval that holds every figure."""
    low, high = (None, None) if found is None or found.interval is None else found.interval
    return (-math.inf, math.inf) if low is None or high is None else (low, high)


def above(text: str, what: str, found: Estimate | None, limit: float = 0.0, *, trained: bool = True) -> Claim:
    """A claim that holds if a figure is above a limit: shown or refuted where its interval does not hold the limit.

    Args:
        text: The claim.
        what: What the figure is, with its unit, to begin the sentence of evidence with.
        found: The figure; None: there is none.
        limit: See above.
        trained: Whether it is about what networks learn, which less than budget 1 does not decide.
    """
    low, high = _ends(found)
    verdict: ClaimVerdict = "shown" if low > limit else "refuted" if high < limit else "open"
    return Claim(text, verdict, _evidence(found, what, f"the claim needs more than {score(limit)}"), trained)


def below(text: str, what: str, found: Estimate | None, limit: float = 0.0, *, trained: bool = True) -> Claim:
    """A claim that holds if a figure is below a limit; as `above`."""
    low, high = _ends(found)
    verdict: ClaimVerdict = "shown" if high < limit else "refuted" if low > limit else "open"
    return Claim(text, verdict, _evidence(found, what, f"the claim needs less than {score(limit)}"), trained)


def within(text: str, what: str, found: float, limit: float) -> Claim:
    """A claim of exactness: shown where the largest deviation found is at most ``limit``, else refuted; NaN: open."""
    if math.isnan(found):
        return Claim(text, "open", f"{what}: not a number in every trial.")
    verdict: ClaimVerdict = "shown" if found <= limit else "refuted"
    return Claim(text, verdict, f"{what}: {score(found)}, where at most {score(limit)} is allowed.")


def near(
    text: str, what: str, found: Estimate | None, tolerance: float, expected: float = 1.0, *, trained: bool = False
) -> Claim:
    """A claim that a figure is what a formula says: a test of equivalence.

    Shown where the whole interval lies within the tolerance of what is expected, refuted where all of it lies outside.

    Args:
        text, what, found: As of `above`.
        tolerance: Relative to what is expected.
        expected: By the formula; 1: the figure is over the formula's.
        trained: As of `above`; what a formula gives is decided at any budget.
    """
    low, high = _ends(found)
    least, most = expected - tolerance * abs(expected), expected + tolerance * abs(expected)
    verdict: ClaimVerdict = "open"
    if least <= low and high <= most:
        verdict = "shown"
    elif high < least or low > most:
        verdict = "refuted"
    needed = f"the formula gives {score(expected)}, and {percent(tolerance)} are allowed"
    return Claim(text, verdict, _evidence(found, what, needed), trained)


def near_everywhere(text: str, what: str, found: Mapping[str, Estimate | None], tolerance: float) -> Claim:
    """A claim that each of several figures, all over a formula's, is 1: as `near`, decided by the one that is worst.

    Args:
        text, what, tolerance: As of `near`.
        found: The figures, by where they were taken, e.g. "at rate 0.5".
    """
    ends = {where: _ends(each) for where, each in found.items()}
    farthest = sorted(found, key=lambda where: max(1 - ends[where][0], ends[where][1] - 1), reverse=True)
    return _worst_of(
        [near(text, f"{what} {where}, which of {len(found)} decides", found[where], tolerance) for where in farthest]
    )


def below_everywhere(
    text: str, what: str, found: Mapping[str, Estimate | None], limit: float, *, trained: bool = True
) -> Claim:
    """A claim that each of several figures is below a limit: as `near_everywhere`, but `below`."""
    farthest = sorted(found, key=lambda where: _ends(found[where])[1], reverse=True)
    return _worst_of(
        [
            below(text, f"{what} {where}, which of {len(found)} decides", found[where], limit, trained=trained)
            for where in farthest
        ]
    )


def _worst_of(claims: Sequence[Claim]) -> Claim:
    return min(claims, key=lambda claim: ("refuted", "open", "shown").index(claim.verdict))


def _evidence(found: Estimate | None, what: str, needed: str) -> str:
    if found is None:
        return f"{what}: not measured."
    return f"{what}: {estimate(found)}; {needed}."
