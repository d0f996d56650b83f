"""``stream``: running statistics of data that drifts, as the batches of a video do: how far off, and which momentum.

Batch t has the mean x_t = mu_t + e_t, whose noise e_t has the variance n = sigma^2 / B with B independent values. With
momentum m (the weight a in ``bnprobe.stats.ema``) the error of the running mean, y_t - mu_t, obeys

    y_t - mu_t = (1 - m) (y_{t-1} - mu_{t-1} - delta_t) + m e_t    with the drift delta_t = mu_t - mu_{t-1}.       (1)

All else follows from (1). The running variance obeys it too, with the noise n = 2 sigma^4 / (B - 1) of the unbiased
variance of normal values, and with the drift of sigma^2.

- A step: nothing drifts after it, so the mean error decays as (1 - m)^t, with the time constant -1 / ln(1 - m).
- A steady drift v: (1) has the fixed point error = -v (1 - m) / m, the lag.
- A random walk with steps of variance s^2: the terms of (1) are independent, so the variance of the error obeys
  V = (1 - m)^2 (V + s^2) + m^2 n. With the speed q = s^2 / n, in units of the noise,

    V / n = f(m) = (m^2 + (1 - m)^2 q) / (m (2 - m)) = m / (2 - m) + (1 - m)^2 q / (m (2 - m)).                   (2)

  The derivative of f is 0 where m^2 / (1 - m) = q: the gain of the Kalman filter in its steady state, as it must be,
  since no linear estimate has a smaller error. There f(m) = m.
- The mismatch D of a batch against the running statistics before it is E[d^2 + (1 - r)^2]. To first order this is the
  variance of x_t - y_{t-1} in units of sigma^2, and the same of the logarithm of the standard deviation, with the
  noises 1 / B and 1 / (2 (B - 1)), whose sum is N. Where both walk with speed q,

    D = N (f(m) + q + 1), least at the same m, where D = N / (1 - m).                                             (3)

- Any drift of at most v a batch: by (1) and the triangle inequality the error is at most v (1 - m) / m, and a noise.
  Of normal values the noise of the mean is normal with variance n m / (2 - m), and that of the variance a weighted sum
  of chi-squares, so that with x = ln(2 / p) the probability is at most p (Laurent & Massart 2000, lemma 1) that it
  exceeds

    sigma sqrt(2 x m / ((2 - m) B)) for the mean,
    sigma^2 (2 sqrt(x m / ((2 - m) (B - 1))) + 2 x m / (B - 1)) for the variance, with the largest sigma.         (4)

- Values of a batch that are correlated, AR(1) with rho, are worth fewer: the variance of their mean is
  sigma^2 / B_eff with B_eff = B / (1 + 2 sum_{k<B} (1 - k / B) rho^k), and their variance is, on average,
  sigma^2 (1 - 1 / B_eff) B / (B - 1). Where a batch goes on where the last one ended, means of batches k apart have the
  covariance c rho^((k-1) B) with c = rho (sigma (1 - rho^B) / (B (1 - rho)))^2, and the running mean the variance

    m / (2 - m) (sigma^2 / B_eff + 2 c (1 - m) / (1 - (1 - m) rho^B)).                                            (5)

Last, three rules choose the momentum of each batch from the batches before it, with nothing to tune. Two of them
measure how far batches L apart differ, in units of D: E_L = L S + 2 N on a random walk, where S is the drift of a batch
and q = S / N. The first takes N from the variance within batches, N = 1 / B + 1 / (2 (B - 1)), and S from neighbours.
The second takes both from neighbours and from batches 16 apart, and so needs to know nothing of values within a batch.
Neither goes below 1 / t, the weight of the cumulative average, at batch t. The third assumes nothing of the drift: it
keeps running statistics with each momentum of a grid, and uses those whose D was least, on average, so far. They are
compared with the momentum of that grid that has the least D in hindsight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from bnprobe.lab.experiment import (
    Budget,
    Condition,
    Experiment,
    Findings,
    Results,
    Values,
    above,
    below_everywhere,
    formula,
    mean_of,
    near,
    within,
)
from bnprobe.lab.layers import EPS
from bnprobe.numbers import score
from bnprobe.records import Claim, LabChart, LabTable
from bnprobe.report.figures import estimate
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

    def conclude(self, results: Results, budget: Budget) -> Findings:
        """Each formula beside what was measured; the bound; the rules."""
        step, walk, linear, bounded, correlated, choice = (
            results.where(part=part) for part in (STEP, WALK, LINEAR, BOUND, CORRELATED, CHOICE)
        )
        return Findings(
            claims=(
                *_claims_of_best(walk),
                *_claims_of_rules(choice),
                *_claims_of_bound(bounded),
                *_claims_of_formulas(step, walk, linear),
                *_claims_of_correlation(correlated),
            ),
            charts=(_chart_of_walks(walk), _chart_of_steps(step), _chart_of_bound(bounded), _chart_of_rules(choice)),
            tables=(_table_of_correlation(correlated),),
            notes=(
                "Means and variances of batches are drawn from their own distributions (normal, chi-squared), but for"
                " correlated values, which are drawn one by one.",
                "D of random walks and of the rules is computed by the code of bnprobe's momentum sweep.",
            ),
        )


# --- Theory -----------------------------------------------------------------------------------------------------------


def error_of_walk(momentum: float, speed: float) -> float:
    """Variance of the error in units of the noise of a batch, (2)."""
    return (momentum**2 + (1 - momentum) ** 2 * speed) / (momentum * (2 - momentum))


def best_momentum(speed: float) -> float:
    """The root of m^2 / (1 - m) = q in [0, 1]."""
    return 2 * speed / (speed + math.sqrt(speed * speed + 4 * speed)) if speed > 0 else 0.0


def noise_of_batch(batch: int) -> float:
    """N: D of independent values against exact statistics, to first order."""
    return 1 / batch + 0.5 / (batch - 1)


def lag(drift: float, momentum: float) -> float:
    """Of the running mean behind a steady drift."""
    return drift * (1 - momentum) / momentum


def noise_bounds(momentum: float, batch: int, chance: float = CHANCE) -> tuple[float, float]:
    """(4) with sigma = 1: of the running mean, and of the running variance."""
    x = math.log(2 / chance)
    square = momentum / (2 - momentum)
    of_variance = 2 * math.sqrt(x * square / (batch - 1)) + 2 * x * momentum / (batch - 1)
    return math.sqrt(2 * x * square / batch), of_variance


def effective_batch(batch: int, rho: float) -> float:
    """B_eff: independent values whose mean has the same variance as that of AR(1) values."""
    return batch / (1 + 2 * math.fsum((1 - k / batch) * rho**k for k in range(1, batch)))


def error_of_correlated(momentum: float, batch: int, rho: float, goes_on: bool) -> float:
    """Variance of the running mean, (5); its last term only where a batch goes on where the last one ended."""
    covariance = rho * ((1 - rho**batch) / (batch * (1 - rho))) ** 2
    between = 2 * covariance * (1 - momentum) / (1 - (1 - momentum) * rho**batch) if goes_on else 0.0
    return momentum / (2 - momentum) * (1 / effective_batch(batch, rho) + between)


# --- Simulation -------------------------------------------------------------------------------------------------------


def averaged(values: Tensor, start: Tensor, momentum: float) -> Tensor:
    """The running average after each batch.

    Args:
        values: Of batches, shape (batches, streams).
        start: Before the first one, shape (streams,).
        momentum: Weight of the newest.
    """
    found = torch.empty_like(values)
    for place, value in enumerate(values):
        start = start + momentum * (value - start)
        found[place] = start
    return found


def drawn(mean: Tensor, variance: Tensor, batch: int) -> Stream:
    """Batches of normal values with these means and variances, each of shape (batches, streams), as bnprobe has them.

    Of normal values the mean of a batch is normal and (B - 1) / sigma^2 times its unbiased variance is chi-squared,
    and the two are independent.
    """
    means = mean + (variance / batch).sqrt() * torch.randn_like(mean)
    chi_squared = 2 * torch._standard_gamma(torch.full_like(variance, (batch - 1) / 2))
    return Stream(means, variance * chi_squared / batch, torch.full((len(mean),), float(batch)))


def unbiased(stream: Stream) -> Tensor:
    """The unbiased variance of each batch, shape (batches, channels)."""
    values = stream.values.double()
    return stream.variance * (values / (values - 1))[:, None]


def random_walk(speed: float, batches: int, streams: int, batch: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each batch, shape (batches, streams), where both drift with this speed.

    The steps of the mean are in units of the standard deviation, whose logarithm walks.
    """
    steps = torch.randn(2, batches, streams, dtype=torch.float64)
    deviation = (math.sqrt(speed / (2 * (batch - 1))) * steps[1]).cumsum(0).exp()
    return (math.sqrt(speed / batch) * deviation * steps[0]).cumsum(0), deviation


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
        "D over the formula": in_noise / (expected + speed + 1),
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
    drift = worst_drift(momentum, round(5 / momentum)) if kind == SEARCHED else BOUNDED[kind](batches)
    path = drift.cumsum(0)
    mean = path[:, None].expand(len(path), streams).contiguous()
    variance = 1 + mean - path.min().clamp(max=0)
    stream = drawn(mean, variance, BATCH)
    of_mean, of_variance = noise_bounds(momentum, BATCH)
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


def worst_drift(momentum: float, batches: int) -> Tensor:
    """The drift of each batch with the largest error at the end, as a search finds it that does not know (1).

    From a random one, the best change of a single batch is made until none makes the error larger.
    """
    drift = DRIFT * (2 * torch.rand(batches, dtype=torch.float64) - 1)
    found = -math.inf
    while True:
        tried = drift[:, None].repeat(1, 2 * batches)
        places = torch.arange(batches)
        tried[places, places], tried[places, places + batches] = DRIFT, -DRIFT
        mean = tried.cumsum(0)
        errors = (averaged(mean, mean.new_zeros(2 * batches), momentum)[-1] - mean[-1]).abs()
        if float(errors.max()) <= found * (1 + 1e-12):
            return drift
        found, drift = float(errors.max()), tried[:, int(errors.argmax())]


# --- Correlated values ------------------------------------------------------------------------------------------------


def correlated_values(batches: int, channels: int, rho: float, goes_on: bool) -> Tensor:
    """AR(1) values of variance 1, shape (batches, BATCH, channels).

    Args:
        batches, channels: Their numbers.
        rho: Correlation of neighbours.
        goes_on: Whether a batch goes on where the last one ended.
    """
    noise = torch.randn(batches, BATCH, channels, dtype=torch.float64)
    rows = noise.reshape(1, -1, channels) if goes_on else noise
    rows[:, 1:] *= math.sqrt(1 - rho * rho)
    for place in range(1, rows.shape[1]):
        rows[:, place] += rho * rows[:, place - 1]
    return rows.reshape(noise.shape)


def _correlated(goes_on: bool, rho: float, momentum: float, streams: int) -> Values:
    values = correlated_values(150, streams // 2, rho, goes_on)
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


def chosen_momenta(stream: Stream, lengths: Sequence[int]) -> Tensor:
    """The momentum of each batch by the batches before it, shape (batches,).

    Args:
        stream: One layer's.
        lengths: (1,): N is that of independent values, S from neighbours. (1, L): both from increments of two lengths.
    """
    batches, batch = len(stream.values), int(stream.values[0])
    so_far = [_distance_so_far(stream, length) for length in lengths]
    if len(so_far) == 1:
        noise = torch.full((batches,), noise_of_batch(batch), dtype=torch.float64)
        drift = (so_far[0] - 2 * noise) / lengths[0]
    else:
        (short, long), (near_by, apart) = lengths, so_far
        drift = (apart - near_by) / (long - short)
        noise = (near_by - short * drift).clamp_min(1e-12) / 2
    speeds = (drift / noise).nan_to_num(0.0).clamp_min(0.0)
    chosen = torch.tensor([best_momentum(speed) for speed in speeds.tolist()], dtype=torch.float64)
    return torch.maximum(chosen, 1 / torch.arange(1, batches + 1, dtype=torch.float64))


def _distance_so_far(stream: Stream, length: int) -> Tensor:
    """E_L before each batch: the mean of d^2 + (log r)^2 over channels and pairs L apart; NaN: there are none.

    The deviation in d is that of both batches.
    """
    variance = unbiased(stream)
    later, earlier = variance[length:], variance[:-length]
    d = (stream.mean[length:] - stream.mean[:-length]).square() / ((later + earlier) / 2)
    log_r = (later / earlier).log() / 2
    distance = (d + log_r.square()).mean(1)
    counts = torch.arange(1, len(distance) + 1)
    ended = distance.cumsum(0) / counts
    return torch.cat([torch.full((length + 1,), math.nan, dtype=torch.float64), ended[:-1]])


def least_so_far(mismatch: Tensor) -> Tensor:
    """D of each batch with the rate whose D was least before it.

    Args:
        mismatch: Of each batch and rate, shape (batches, rates).
    """
    before = mismatch.cumsum(0).roll(1, 0)
    before[0] = 0.0
    return mismatch.gather(1, before.argmin(1, keepdim=True))[:, 0]


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
    values = correlated_values(BATCHES, CHANNELS, 0.9, goes_on=True)
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
    means = {f"D over the least, {name}": math.fsum(values) / layers for name, values in ratios.items()}
    return {
        **means,
        GAIN: means[f"D over the least, momentum {USUAL:g}"] - means[f"D over the least, {TWO_LENGTHS}"],
        "best fixed momentum": math.fsum(best) / layers,
        f"last momentum, {TWO_LENGTHS}": math.fsum(last) / layers,
    }


# --- What is concluded ------------------------------------------------------------------------------------------------


def _claims_of_formulas(step: Results, walk: Results, linear: Results) -> Iterable[Claim]:
    for name in ("mean", "variance"):
        yield near(
            f"A step is forgotten by the running {name} with the time constant -1 / ln(1 - m).",
            "Measured over the formula's, mean over momenta",
            step.averaged(f"time constant of the {name} over the formula"),
            0.02,
        )
    yield near(
        "Behind a steady drift v the running mean lags by v (1 - m) / m.",
        "Lag over the formula's, mean over momenta",
        linear.averaged("lag over the formula"),
        0.02,
    )
    for name in ("mean", "variance"):
        yield near(
            f"On a random walk the squared error of the running {name} is, in units of the noise of a batch,"
            " m / (2 - m) + q (1 - m)^2 / (m (2 - m)).",
            "Error over the formula's, mean over speeds and momenta",
            walk.averaged(f"error of the {name} over the formula"),
            0.05,
        )


def _claims_of_best(walk: Results) -> Iterable[Claim]:
    excess = {multiple: _over_best(walk, multiple) for multiple in (0.5, 1.5)}
    for multiple, of_seed in excess.items():
        yield above(
            f"The momentum with m^2 / (1 - m) = q has a smaller D than {multiple:g} times it.",
            "D over that at this momentum, mean over speeds",
            mean_of(of_seed),
            1.0,
        )
    yield near(
        "At this momentum D is that against exact statistics over 1 - m.",
        "D over the formula's, mean over speeds",
        walk.where(**{"over best": 1.0}).averaged("D over the formula"),
        0.05,
    )


def _claims_of_bound(bounded: Results) -> Iterable[Claim]:
    largest = [_largest(bounded, f"largest error of the {name} over the bound") for name in ("mean", "variance")]
    without = _largest(bounded, "largest error without noise over the lag")
    yield within(
        "No drift of at most v a batch takes a running statistic further off than v (1 - m) / m without noise.",
        "Largest error over the bound",
        without,
        1 + 1e-9,
    )
    for name, found in zip(("mean", "variance"), largest, strict=True):
        yield within(
            f"With noise, no error of the running {name} is above the bound that each keeps with a probability of"
            f" 1 - {CHANCE:g}.",
            "Largest error over the bound, of all drifts, momenta, batches and seeds",
            found,
            1.0,
        )
    for kind, reached in (("steady", "a steady drift"), (SEARCHED, "the worst drift that a search finds")):
        yield above(
            f"The bound without noise is reached to within 1% by {reached}.",
            "Largest error over the bound, mean over momenta",
            bounded.where(drift=kind).averaged("largest error without noise over the lag"),
            0.99,
        )


def _claims_of_correlation(correlated: Results) -> Iterable[Claim]:
    yield near(
        "The mean of a batch of correlated values is worth that of B_eff independent ones.",
        "Effective batch size over the formula's, mean over correlations",
        correlated.averaged("effective batch size over the formula"),
        0.05,
    )
    yield near(
        "The running variance of correlated values is too small by the factor (1 - 1 / B_eff) B / (B - 1).",
        "Running variance over the formula's, mean over correlations",
        correlated.averaged("running variance over the formula"),
        0.05,
    )
    yield near(
        "The squared error of the running mean of correlated values is that of B_eff independent ones, and more by the"
        " covariance of batches where one goes on where the last one ended.",
        "Error over the formula's, mean over correlations",
        correlated.averaged("error of the running mean over the formula"),
        0.05,
    )


def _claims_of_rules(choice: Results) -> Iterable[Claim]:
    walks = "on the random walks that it is made for", [kind for kind in KINDS if "random walk" in kind]
    every = "on any of the streams", list(KINDS)
    for rule, (where, kinds) in ((NEIGHBOURS, walks), (TWO_LENGTHS, walks), *((rule, every) for rule in RULES)):
        yield below_everywhere(
            f"A momentum chosen without tuning, by {rule}, costs at most 5% of D {where}.",
            "D over that of the best fixed momentum in hindsight",
            {f'on "{kind}"': choice.where(drift=kind).mean(f"D over the least, {rule}") for kind in kinds},
            1.05,
        )
    yield above(
        f"The rule by {TWO_LENGTHS} is nearer to the best than the usual momentum of {USUAL:g}.",
        f"D over the least, with {USUAL:g} less with the rule, mean over streams",
        choice.averaged(GAIN),
    )


def _largest(results: Results, name: str) -> float | None:
    return max((value for trial in results if isinstance(value := trial.values.get(name), float)), default=None)


def _over_best(walk: Results, multiple: float) -> list[float]:
    """D at a multiple of the best momentum over that at the best one, mean over speeds, of each seed."""
    pairs = [
        tuple(walk.where(speed=speed, **{"over best": each}).by_seed("D over N") for each in (multiple, 1.0))
        for speed in SPEEDS
    ]
    seeds = sorted(set.intersection(*(set(found) for pair in pairs for found in pair)))
    return [math.fsum(there[seed] / here[seed] for there, here in pairs) / len(pairs) for seed in seeds]


def _chart_of_walks(walk: Results) -> LabChart:
    def expected(speed: float) -> Callable[[float], float]:
        return lambda multiple: error_of_walk(multiple * best_momentum(speed), speed) + speed + 1

    best = ", ".join(f"{best_momentum(speed):.2g}" for speed in SPEEDS)
    return LabChart(
        "momentum",
        "D on a random walk",
        "momentum over the best",
        "D over that against exact statistics",
        (
            *(walk.series("D over N", "over best", f"q = {speed:g}", speed=speed) for speed in SPEEDS),
            *(formula(f"formula for q = {speed:g}", MULTIPLES, expected(speed)) for speed in SPEEDS),
        ),
        (
            "q is the variance of a step over that of the noise of a batch, for the mean and for the variance.",
            f"The best momentum by the formula, where m^2 / (1 - m) = q, is {best}.",
        ),
        x_scale="log",
        y_scale="log",
    )


def _chart_of_steps(step: Results) -> LabChart:
    chosen = MOMENTA[:3]
    return LabChart(
        "step",
        "What is left of a step in the running mean",
        "batches after the step",
        "error over the step",
        (
            *(
                step.where(momentum=momentum).along("left of the step of the mean", AFTER, f"momentum {momentum:g}")
                for momentum in chosen
            ),
            *(
                formula(f"formula for momentum {momentum:g}", AFTER, partial(math.pow, 1 - momentum))
                for momentum in chosen
            ),
        ),
    )


def _chart_of_bound(bounded: Results) -> LabChart:
    return LabChart(
        "bound",
        f"The largest error under drifts of at most {DRIFT:g} standard deviations a batch",
        "drift",
        "largest error of the running mean over its bound",
        tuple(
            bounded.series(
                "largest error of the mean over the bound", "drift", f"momentum {momentum:g}", momentum=momentum
            )
            for momentum in FAST
        ),
        (f"The bound is v (1 - m) / m and the noise that is exceeded with a probability of {CHANCE:g}.",),
    )


def _chart_of_rules(choice: Results) -> LabChart:
    names = {f"D over the least, {rule}": f"rule: {rule}" for rule in RULES}
    names[f"D over the least, momentum {USUAL:g}"] = f"momentum {USUAL:g}"
    return LabChart(
        "rules",
        "Momenta chosen without tuning",
        "stream",
        "D over that of the best fixed momentum",
        tuple(choice.series(figure, "drift", name) for figure, name in names.items()),
        (
            "The best fixed momentum is that of least D in hindsight, of "
            f"{len(GRID)} from {GRID[0]:g} to {GRID[-1]:g}, for each layer by itself.",
        ),
        y_scale="log",
    )


def _table_of_correlation(correlated: Results) -> LabTable:
    ratio = "error of the running mean over that of independent values"
    rows = [
        (
            f"{batches}, rho = {rho:g}",
            *_told(correlated.where(batches=batches, correlation=rho), "effective batch size"),
            score(effective_batch(BATCH, float(rho))),
            *_told(correlated.where(batches=batches, correlation=rho), "running variance"),
            *_told(correlated.where(batches=batches, correlation=rho), ratio),
        )
        for batches in (CLIPS, VIDEO)
        for rho in RHOS
    ]
    return LabTable(
        f"Batches of {BATCH} correlated values",
        ("values", "effective batch size", "by the formula", "running variance", "squared error over independent"),
        tuple(rows),
        (f"Correlated as rho^k at a distance of k values, of variance 1; momentum {USUAL:g}.",),
    )


def _told(results: Results, name: str) -> tuple[str]:
    found = results.mean(name)
    return ("" if found is None else estimate(found),)
