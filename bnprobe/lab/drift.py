"""Running statistics of data that drifts: formulas for their errors, streams to try them on, rules for the momentum.

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

Two rules choose the momentum of each batch from the batches before it, with nothing to tune. They measure how far
batches L apart differ, in units of D: E_L = L S + 2 N on a random walk, where S is the drift of a batch and q = S / N.
The first takes N from the variance within batches, N = 1 / B + 1 / (2 (B - 1)), and S from neighbours. The second takes
both from neighbours and from batches further apart, and so needs to know nothing of values within a batch. Neither goes
below 1 / t, the weight of the cumulative average, at batch t. A third rule assumes nothing of the drift: it keeps
running statistics with each momentum of a grid, and uses those whose D was least, on average, so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bnprobe.stats.ema import Stream

# --- Formulas ---------------------------------------------------------------------------------------------------------


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


def noise_bounds(momentum: float, batch: int, chance: float) -> tuple[float, float]:
    """(4) with sigma = 1 and p = ``chance``: of the running mean, and of the running variance."""
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


# --- Streams ----------------------------------------------------------------------------------------------------------


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


def correlated_values(batches: int, batch: int, channels: int, rho: float, goes_on: bool) -> Tensor:
    """AR(1) values of variance 1, shape (batches, batch, channels).

    Args:
        batches, batch, channels: Their numbers; ``batch`` is that of values in one.
        rho: Correlation of neighbours.
        goes_on: Whether a batch goes on where the last one ended.
    """
    noise = torch.randn(batches, batch, channels, dtype=torch.float64)
    rows = noise.reshape(1, -1, channels) if goes_on else noise
    rows[:, 1:] *= math.sqrt(1 - rho * rho)
    for place in range(1, rows.shape[1]):
        rows[:, place] += rho * rows[:, place - 1]
    return rows.reshape(noise.shape)


def worst_drift(momentum: float, batches: int, most: float) -> Tensor:
    """The drift of each batch with the largest error at the end, as a search finds it that does not know (1).

    From a random one, the best change of a single batch is made until none makes the error larger.

    Args:
        momentum: Of the running mean.
        batches: Their number.
        most: The largest drift of a batch.
    """
    drift = most * (2 * torch.rand(batches, dtype=torch.float64) - 1)
    found = -math.inf
    while True:
        tried = drift[:, None].repeat(1, 2 * batches)
        places = torch.arange(batches)
        tried[places, places], tried[places, places + batches] = most, -most
        mean = tried.cumsum(0)
        errors = (averaged(mean, mean.new_zeros(2 * batches), momentum)[-1] - mean[-1]).abs()
        if float(errors.max()) <= found * (1 + 1e-12):
            return drift
        found, drift = float(errors.max()), tried[:, int(errors.argmax())]


# --- Rules ------------------------------------------------------------------------------------------------------------


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
