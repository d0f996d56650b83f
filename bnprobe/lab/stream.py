"""``stream``: running statistics of data that drifts, as the batches of a video do: how far off, and which momentum.

The formulas, their numbers and the rules are those of ``bnprobe.lab.drift``. Each formula is held against what running
statistics do on many streams side by side: after a step, behind a steady drift, on random walks, and where the values
of a batch are correlated. Drifts of many kinds are made to break the bound, and so are drifts that a search finds.
Last, three rules choose the momentum; they are compared with the momentum of a grid that has the least D in hindsight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from bnprobe.lab.drift import (
    averaged,
    best_momentum,
    chosen_momenta,
    correlated_values,
    drawn,
    effective_batch,
    error_of_correlated,
    error_of_walk,
    lag,
    least_so_far,
    noise_bounds,
    noise_of_batch,
    random_walk,
    unbiased,
    worst_drift,
)
from bnprobe.lab.experiment import (
    Budget,
    Condition,
    Experiment,
    Results,
    Values,
    above,
    average,
    below_everywhere,
    cell,
    formula,
    near,
    told,
    within,
)
from bnprobe.lab.layers import EPS
from bnprobe.numbers import joined, score
from bnprobe.records import Claim, LabChart, LabTable
from bnprobe.stats.ema import Statistics, Stream, replay, weights

STEP, WALK, LINEAR, BOUND, CORRELATED, CHOICE = "step", "random walk", "linear", "bounded", "correlated", "choice"

STREAMS = 4096
"""Channels that are simulated side by side; each is a stream of its own."""

# Step and linear drift.
MOMENTA = (0.01, 0.03, 0.1, 0.3)
BATCH = 32
STEP_SIZE, FACTOR = 4.0, 4.0
"""By how many standard deviations the mean moves, and by what factor the variance."""
FAST = MOMENTA[1:]
"""Those that bounded drifts are tried with: a search among long drifts takes long."""
AFTER = (0, 1, 2, 5, 10, 20, 50, 100, 200)
DRIFT = 0.1
"""Standard deviations a batch: the linear drift, and the most that a bounded one moves."""

# Random walks.
SPEEDS = (0.01, 0.1, 1.0)
MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Momenta, over the best one by the formula."""
LARGE = 1024
"""Values of a batch there: so many that (3), which is of first order in 1 / B, holds."""

# Bounded drifts.
CHANCE = 1e-12
"""Probability p of (4), for each error that is compared, so that none of the millions in a run should exceed it."""
SEARCHED = "found by search"

# Correlated values.
RHOS = (0.0, 0.5, 0.9, 0.97)
CLIPS, VIDEO = "a clip for each batch", "one video"

# The choice of momentum.
APART = 16
CHANNELS, BATCHES, SETTLED = 32, 1000, 100
"""Channels and batches of a stream, and how many batches at its start are not scored."""
GRID = (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
USUAL = 0.1
GAIN = f"D over the least, momentum {USUAL:g} less two lengths"
NEIGHBOURS, TWO_LENGTHS, LEAST = "variance within batches", "increments of two lengths", "least D so far"
RULES = (NEIGHBOURS, TWO_LENGTHS, LEAST)


class DriftingStreams(Experiment):
    """Drifts that formulas cover, drifts made to break the bound, and three rules that choose the momentum."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """Every part of the experiment, with what it sweeps."""
        found: list[Condition] = [{"part": part, "momentum": each} for part in (STEP, LINEAR) for each in MOMENTA]
        found += [{"part": WALK, "speed": speed, "over best": each} for speed in SPEEDS for each in MULTIPLES]
        found += [{"part": BOUND, "drift": drift, "momentum": each} for drift in (*BOUNDED, SEARCHED) for each in FAST]
        found += [{"part": CORRELATED, "batches": each, "correlation": rho} for each in (CLIPS, VIDEO) for rho in RHOS]
        return [*found, *({"part": CHOICE, "drift": drift} for drift in KINDS)]

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Figures of one part."""
        part, momentum, streams = condition["part"], float(condition.get("momentum", USUAL)), budget.of(STREAMS, 16)
        if part == STEP:
            return _step(momentum, streams)
        if part == LINEAR:
            return _linear(momentum, streams)
        if part == WALK:
            return _walk(float(condition["speed"]), float(condition["over best"]), streams)
        if part == BOUND:
            return _bounded(str(condition["drift"]), momentum, budget.of(64, 4))
        if part == CORRELATED:
            return _correlated(condition["batches"] == VIDEO, float(condition["correlation"]), momentum, streams)
        return _choice(KINDS[str(condition["drift"])], budget.of(8))

    def answer(self, results: Results, budget: Budget) -> str:
        """What the best momentum is worth, and what the rules cost."""
        ratio = results.where(part=WALK).mean_over_seeds
        costs = []
        for rule in RULES:
            by_kind = [results.where(drift=kind).mean(f"D over the least, {rule}") for kind in KINDS]
            worst = max((found for found in by_kind if found is not None), key=lambda found: found.mean, default=None)
            costs.append(f"{told(worst)} by {rule}")
        largest = told(results.largest("largest error without noise over the lag"))
        half, more = (told(ratio(partial(_over_best, multiple))) for multiple in (0.5, 1.5))
        return (
            f"The largest error that a drift of at most v a batch made without noise is {largest} times v (1 - m) / m."
            f" On random walks D is {half} and {more} times as large at 0.5 and 1.5 times the momentum with"
            " m^2 / (1 - m) = q. Momenta chosen without tuning have, on the stream that is worst for each, so many"
            f" times the D of the best fixed momentum: {joined(costs)}."
        )

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """The best momentum, the rules, the bound, and each formula beside what was measured."""
        yield from _claims_of_best(results)
        yield from _claims_of_rules(results)
        yield from _claims_of_bound(results)
        yield from _claims_of_formulas(results)
        yield from _claims_of_correlation(results)

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """Random walks, the step, the bound, and the rules."""
        yield _chart_of_walks(results.where(part=WALK))
        chosen = {f"momentum {momentum:g}": momentum for momentum in MOMENTA[:3]}
        step = results.where(part=STEP)
        yield LabChart(
            "step",
            "What is left of a step in the running mean",
            "batches after the step",
            "error over the step",
            (
                *(
                    step.where(momentum=m).along("left of the step of the mean", AFTER, name)
                    for name, m in chosen.items()
                ),
                *(formula(f"formula for {name}", AFTER, partial(math.pow, 1 - m)) for name, m in chosen.items()),
            ),
        )
        bounded, figure = results.where(part=BOUND), "largest error of the mean over the bound"
        yield LabChart(
            "bound",
            f"The largest error under drifts of at most {DRIFT:g} standard deviations a batch",
            "drift",
            "largest error of the running mean over its bound",
            tuple(bounded.series(figure, "drift", f"momentum {each:g}", momentum=each) for each in FAST),
            (f"The bound is v (1 - m) / m and the noise that is exceeded with a probability of {CHANCE:g}.",),
        )
        names = {f"D over the least, {rule}": f"rule: {rule}" for rule in RULES}
        names[f"D over the least, momentum {USUAL:g}"] = f"momentum {USUAL:g}"
        yield LabChart(
            "rules",
            "Momenta chosen without tuning",
            "stream",
            "D over that of the best fixed momentum",
            results.where(part=CHOICE).several_series("drift", names),
            (
                f"The best fixed momentum is that of least D in hindsight, of {len(GRID)} from {GRID[0]:g} to"
                f" {GRID[-1]:g}, for each layer by itself.",
            ),
            y_scale="log",
        )

    def tables(self, results: Results, budget: Budget) -> Iterator[LabTable]:
        """What correlated values are worth."""
        arms = {
            (batches, rho): results.where(part=CORRELATED, batches=batches, correlation=rho)
            for batches in (CLIPS, VIDEO)
            for rho in RHOS
        }
        yield LabTable(
            f"Batches of {BATCH} correlated values",
            ("values", "effective batch size", "by the formula", "running variance", "squared error over independent"),
            tuple(
                (
                    f"{batches}, rho = {rho:g}",
                    cell(arm.mean("effective batch size")),
                    score(effective_batch(BATCH, rho)),
                    cell(arm.mean("running variance")),
                    cell(arm.mean("error of the running mean over that of independent values")),
                )
                for (batches, rho), arm in arms.items()
            ),
            (f"Correlated as rho^k at a distance of k values, of variance 1; momentum {USUAL:g}.",),
        )

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """How streams are drawn, and D computed."""
        yield (
            "Means and variances of batches are drawn from their own distributions (normal, chi-squared), but for"
            " correlated values, which are drawn one by one."
        )
        yield (
            f"The rules choose the momentum of a batch from those before it. They take E_L, how far batches L apart"
            " differ, as L S + 2 N, with the drift S of a batch and the noise N, and choose the momentum with"
            f" m^2 / (1 - m) = S / N, but at least 1 / t at batch t. The rule by {NEIGHBOURS} has N = 1 / B +"
            f" 1 / (2 (B - 1)) and S from E_1. The rule by {TWO_LENGTHS} has both from E_1 and E_{APART}. The rule by"
            f" {LEAST} keeps running statistics with each momentum of the grid, and uses those with the least mean D up"
            " to the batch before."
        )
        yield "D of random walks and of the rules is computed by the code of bnprobe's momentum sweep."


def _claims_of_best(results: Results) -> Iterator[Claim]:
    for multiple in (0.5, 1.5):
        yield above(
            f"The momentum with m^2 / (1 - m) = q has a smaller D than {multiple:g} times it.",
            "D over that at this momentum, mean over speeds",
            results.where(part=WALK).mean_over_seeds(partial(_over_best, multiple)),
            1.0,
            trained=False,
        )
    yield near(
        "At this momentum D is that against exact statistics over 1 - m.",
        "D over the formula's, mean over speeds",
        results.where(**{"over best": 1.0}).averaged("D over the formula"),
        0.05,
    )


def _over_best(multiple: float, of_seed: Results) -> float:
    """D at a multiple of the best momentum over that at the best one, mean over speeds."""
    here, best = (of_seed.where(**{"over best": each}) for each in (multiple, 1.0))
    return average([here.value("D over N", speed=speed) / best.value("D over N", speed=speed) for speed in SPEEDS])


def _claims_of_rules(results: Results) -> Iterator[Claim]:
    walks = "on the random walks that it is made for", [kind for kind in KINDS if "random walk" in kind]
    every = "on any of the streams", list(KINDS)
    for rule, (where, kinds) in ((NEIGHBOURS, walks), (TWO_LENGTHS, walks), *((rule, every) for rule in RULES)):
        yield below_everywhere(
            f"A momentum chosen without tuning, by {rule}, costs at most 5% of D {where}.",
            "D over that of the best fixed momentum in hindsight",
            {f'on "{kind}"': results.where(drift=kind).mean(f"D over the least, {rule}") for kind in kinds},
            1.05,
            trained=False,
        )
    yield above(
        f"The rule by {TWO_LENGTHS} is nearer to the best than the usual momentum of {USUAL:g}.",
        f"D over the least, with {USUAL:g} less with the rule, mean over streams",
        results.averaged(GAIN),
        trained=False,
    )


def _claims_of_bound(results: Results) -> Iterator[Claim]:
    without = "largest error without noise over the lag"
    yield within(
        "No drift of at most v a batch takes a running statistic further off than v (1 - m) / m without noise.",
        "Largest error over the bound",
        results.largest(without),
        1 + 1e-9,
    )
    for name in ("mean", "variance"):
        yield within(
            f"With noise, no error of the running {name} is above the bound that each keeps with a probability of"
            f" 1 - {CHANCE:g}.",
            "Largest error over the bound, of all drifts, momenta, batches and seeds",
            results.largest(f"largest error of the {name} over the bound"),
            1.0,
        )
    for kind, reached in (("steady", "a steady drift"), (SEARCHED, "the worst drift that a search finds")):
        yield above(
            f"The bound without noise is reached to within 1% by {reached}.",
            "Largest error over the bound, mean over momenta",
            results.where(drift=kind).averaged(without),
            0.99,
            trained=False,
        )


def _claims_of_formulas(results: Results) -> Iterator[Claim]:
    for name in ("mean", "variance"):
        yield near(
            f"A step is forgotten by the running {name} with the time constant -1 / ln(1 - m).",
            "Measured over the formula's, mean over momenta",
            results.averaged(f"time constant of the {name} over the formula"),
            0.02,
        )
    yield near(
        "Behind a steady drift v the running mean lags by v (1 - m) / m.",
        "Lag over the formula's, mean over momenta",
        results.averaged("lag over the formula"),
        0.02,
    )
    for name in ("mean", "variance"):
        yield near(
            f"On a random walk the squared error of the running {name} is, in units of the noise of a batch,"
            " m / (2 - m) + q (1 - m)^2 / (m (2 - m)).",
            "Error over the formula's, mean over speeds and momenta",
            results.averaged(f"error of the {name} over the formula"),
            0.05,
        )


def _claims_of_correlation(results: Results) -> Iterator[Claim]:
    yield near(
        "The mean of a batch of correlated values is worth that of B_eff independent ones.",
        "Effective batch size over the formula's, mean over correlations",
        results.averaged("effective batch size over the formula"),
        0.05,
    )
    yield near(
        "The running variance of correlated values is too small by the factor (1 - 1 / B_eff) B / (B - 1).",
        "Running variance over the formula's, mean over correlations",
        results.averaged("running variance over the formula"),
        0.05,
    )
    yield near(
        "The squared error of the running mean of correlated values is that of B_eff independent ones, and more by the"
        " covariance of batches where one goes on where the last one ended.",
        "Error over the formula's, mean over correlations",
        results.averaged("error of the running mean over the formula"),
        0.05,
    )


def _chart_of_walks(walk: Results) -> LabChart:
    best = ", ".join(f"{best_momentum(speed):.2g}" for speed in SPEEDS)
    return LabChart(
        "momentum",
        "D on a random walk",
        "momentum over the best",
        "D over that against exact statistics",
        (
            *(walk.series("D over N", "over best", f"q = {speed:g}", speed=speed) for speed in SPEEDS),
            *(formula(f"formula for q = {speed:g}", MULTIPLES, partial(_mismatch_of_walk, speed)) for speed in SPEEDS),
        ),
        (
            "q is the variance of a step over that of the noise of a batch, for the mean and for the variance.",
            f"The best momentum by the formula, where m^2 / (1 - m) = q, is {best}.",
        ),
        x_scale="log",
        y_scale="log",
    )


def _mismatch_of_walk(speed: float, over_best: float) -> float:
    """D over N, (3)."""
    return error_of_walk(over_best * best_momentum(speed), speed) + speed + 1


# --- Trials -----------------------------------------------------------------------------------------------------------


def _step(momentum: float, streams: int) -> Values:
    """What is left of a step after so many batches, as a share of it, and the time constant."""
    constant = -1 / math.log(1 - momentum)
    long = max(AFTER[-1], round(constant))
    old = torch.zeros(streams, dtype=torch.float64)
    new = torch.full((long, streams), STEP_SIZE, dtype=torch.float64)
    stream = drawn(new, torch.full_like(new, FACTOR), BATCH)
    found: dict[str, float | list[float | None]] = {}
    moved = (("mean", stream.mean, old, STEP_SIZE), ("variance", unbiased(stream), old + 1, FACTOR))
    for name, values, start, after in moved:
        running = torch.cat([start[None], averaged(values, start, momentum)]).mean(1)
        left = (after - running) / (after - start.mean())
        at = round(constant)
        found[f"time constant of the {name}, batches"] = -at / math.log(abs(float(left[at])))
        found[f"time constant of the {name} over the formula"] = -at / math.log(abs(float(left[at]))) / constant
        found[f"left of the step of the {name}"] = [float(left[after]) for after in AFTER]
    return found


def _linear(momentum: float, streams: int) -> Values:
    """The lag behind a steady drift, once it has settled."""
    batches = round(10 / momentum) + 50
    mean = DRIFT * torch.arange(1, batches + 1, dtype=torch.float64)[:, None].expand(batches, streams).contiguous()
    stream = drawn(mean, torch.ones_like(mean), BATCH)
    running = averaged(stream.mean, torch.zeros(streams, dtype=torch.float64), momentum)
    behind = float((mean - running)[-50:].mean())
    return {"lag": behind, "lag over the formula": behind / lag(DRIFT, momentum)}


def _walk(speed: float, over_best: float, streams: int) -> Values:
    """Errors in the steady state, in units of the noise of a batch; D over N. Mean and variance walk alike."""
    momentum = over_best * best_momentum(speed)
    batches = round(4 / momentum) + 100
    mean, deviation = random_walk(speed, batches, streams, LARGE)
    stream = drawn(mean, deviation.square(), LARGE)
    nothing = torch.zeros(streams, dtype=torch.float64)
    errors = (averaged(stream.mean, nothing, momentum) - mean) / deviation
    relative = averaged(unbiased(stream), nothing + 1, momentum) / deviation.square() - 1
    start = Statistics(nothing, nothing + 1)
    mismatch = replay(stream, start, weights([momentum], batches, 0), EPS).mismatch[-100:].mean()
    of_mean = float(errors[-100:].square().mean()) * LARGE
    of_variance = float(relative[-100:].square().mean()) * (LARGE - 1) / 2
    in_noise = float(mismatch) / noise_of_batch(LARGE)
    expected = error_of_walk(momentum, speed)
    return {
        "momentum": momentum,
        "error of the mean": of_mean,
        "error of the variance": of_variance,
        "D over N": in_noise,
        "error of the mean over the formula": of_mean / expected,
        "error of the variance over the formula": of_variance / expected,
        "D over the formula": in_noise / _mismatch_of_walk(speed, over_best),
    }


# --- Drifts that are bounded ------------------------------------------------------------------------------------------


def _to_and_fro(period: int) -> Callable[[int], Tensor]:
    """Up for so many batches, then down for as many."""
    return lambda batches: DRIFT * (1 - 2 * (torch.arange(batches) // period % 2).double())


BOUNDED: Mapping[str, Callable[[int], Tensor]] = {
    "steady": lambda batches: torch.full((batches,), DRIFT, dtype=torch.float64),
    "up, then it stops": lambda batches: DRIFT * (torch.arange(batches) < batches // 2).double(),
    "sawtooth of 100 batches": _to_and_fro(50),
    "up and down in turn": _to_and_fro(1),
    "random signs": lambda batches: DRIFT * (2 * torch.randint(2, (batches,)).double() - 1),
    "wave of 100 batches": lambda batches: DRIFT * (torch.arange(batches).double() * math.pi / 50).cos(),
}
"""The drift of each batch, by the name of its kind; none is more than ``DRIFT``."""


def _bounded(kind: str, momentum: float, streams: int) -> Values:
    """The largest error over its bound, of every batch and stream; without noise too, where the bound is the lag."""
    batches = round(10 / momentum)
    drift = worst_drift(momentum, round(5 / momentum), DRIFT) if kind == SEARCHED else BOUNDED[kind](batches)
    path = drift.cumsum(0)
    mean = path[:, None].expand(len(path), streams).contiguous()
    variance = 1 + mean - path.min().clamp(max=0)
    stream = drawn(mean, variance, BATCH)
    of_mean, of_variance = noise_bounds(momentum, BATCH, CHANCE)
    largest = float(variance.max())
    behind = lag(DRIFT, momentum)
    start = (mean[0] - drift[0], variance[0] - drift[0])
    without = averaged(mean, start[0], momentum) - mean
    by_mean = (averaged(stream.mean, start[0], momentum) - mean).abs() / (behind + math.sqrt(largest) * of_mean)
    by_variance = averaged(unbiased(stream), start[1], momentum) - variance
    return {
        "largest error without noise over the lag": float(without.abs().max()) / behind,
        "largest error of the mean over the bound": float(by_mean.max()),
        "largest error of the variance over the bound": float(by_variance.abs().max())
        / (behind + largest * of_variance),
    }


# --- Correlated values ------------------------------------------------------------------------------------------------


def _correlated(goes_on: bool, rho: float, momentum: float, streams: int) -> Values:
    values = correlated_values(150, BATCH, streams // 2, rho, goes_on)
    means = values.mean(1)
    running = averaged(means, torch.zeros(means.shape[1], dtype=torch.float64), momentum)[-75:]
    worth = 1 / float(means.square().mean())
    variance = float(values.var(1).mean())
    expected = effective_batch(BATCH, rho)
    return {
        "effective batch size": worth,
        "running variance": variance,
        "effective batch size over the formula": worth / expected,
        "running variance over the formula": variance / ((1 - 1 / expected) * BATCH / (BATCH - 1)),
        "error of the running mean over the formula": float(running.square().mean())
        / error_of_correlated(momentum, BATCH, rho, goes_on),
        "error of the running mean over that of independent values": float(running.square().mean())
        / error_of_correlated(momentum, BATCH, 0.0, goes_on),
    }


# --- Rules that choose ------------------------------------------------------------------------------------------------


def _walking(speed: float) -> Callable[[], Stream]:
    def make() -> Stream:
        mean, deviation = random_walk(speed, BATCHES, CHANNELS, BATCH)
        return drawn(mean, deviation.square(), BATCH)

    return make


def _at_means(means: Tensor) -> Stream:
    return drawn(means, torch.ones_like(means), BATCH)


def _of_scenes() -> Stream:
    """Every 100 batches a new mean for each channel."""
    return _at_means(torch.randn(BATCHES // 100, CHANNELS, dtype=torch.float64).repeat_interleave(100, 0))


def _of_steady_drift() -> Stream:
    slopes = DRIFT * torch.randn(CHANNELS, dtype=torch.float64)
    return _at_means(torch.arange(BATCHES, dtype=torch.float64)[:, None] * slopes)


def _of_video() -> Stream:
    values = correlated_values(BATCHES, BATCH, CHANNELS, 0.9, goes_on=True)
    return Stream(values.mean(1), values.var(1, unbiased=False), torch.full((BATCHES,), float(BATCH)))


KINDS: Mapping[str, Callable[[], Stream]] = {
    "no drift": _walking(0.0),
    **{f"random walk, q = {speed:g}": _walking(speed) for speed in SPEEDS},
    "steady drift": _of_steady_drift,
    "scenes of 100 batches": _of_scenes,
    "video, rho = 0.9": _of_video,
}


def _choice(make: Callable[[], Stream], layers: int) -> Values:
    """D of each rule and of the usual momentum over that of the best fixed one in hindsight, mean over layers."""
    ratios: dict[str, list[float]] = {name: [] for name in (*RULES, f"momentum {USUAL:g}")}
    best: list[float] = []
    last: list[float] = []
    for _ in range(layers):
        stream = make()
        rules = [chosen_momenta(stream, lengths) for lengths in ((1,), (1, APART))]
        tried = torch.cat([torch.stack(rules, 1), weights(GRID, BATCHES, 0)], 1)
        start = Statistics(stream.mean[0], stream.unbiased(0))
        mismatch = replay(stream, start, tried, EPS).mismatch
        by_grid = mismatch[:, len(rules) :]
        scored = torch.cat([mismatch[:, : len(rules)], least_so_far(by_grid)[:, None], by_grid], 1)
        found = scored[SETTLED:].mean(0).tolist()
        fixed = found[len(RULES) :]
        for name, value in zip(ratios, (*found[: len(RULES)], fixed[GRID.index(USUAL)]), strict=True):
            ratios[name].append(value / min(fixed))
        best.append(GRID[fixed.index(min(fixed))])
        last.append(float(rules[1][-1]))
    means = {f"D over the least, {name}": average(values) for name, values in ratios.items()}
    return {
        **means,
        GAIN: means[f"D over the least, momentum {USUAL:g}"] - means[f"D over the least, {TWO_LENGTHS}"],
        "best fixed momentum": average(best),
        f"last momentum, {TWO_LENGTHS}": average(last),
    }
