"""Replay running statistics with other momentum values on the same sequence of batches.

The running mean is updated by m <- (1 - a) m + a mu_B, and the running variance in the same way with the unbiased
batch variance n / (n - 1) v_B, as in ``torch.nn.BatchNorm``. With momentum=None the k-th update has the weight
a = 1/k (cumulative average).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bnprobe.stats.intervals import half_width
from bnprobe.stats.moments import corrections

Rate = float | None
"""Weight of the new batch; None: cumulative average."""

BLOCKS = 10
"""Number of blocks for batch means; fewer if there are not two values for each."""


@dataclass(frozen=True)
class Statistics:
    """Mean and unbiased variance per channel, float64."""

    mean: Float[Tensor, " channels"]
    variance: Float[Tensor, " channels"]


@dataclass(frozen=True)
class Stream:
    """Batch statistics of one layer, in the order of its updates.

    Attributes:
        mean, variance: Mean and biased variance of each batch.
        values: Values per channel in each batch; at least 2.
    """

    mean: Float[Tensor, "updates channels"]
    variance: Float[Tensor, "updates channels"]
    values: Float[Tensor, " updates"]

    def unbiased(self, update: int) -> Float[Tensor, " channels"]:
        """The unbiased variance of one batch, float64."""
        values = self.values[update].double()
        return self.variance[update].double() * (values / (values - 1))


@dataclass(frozen=True)
class Replay:
    """The running statistics that each rate gives for a stream.

    Attributes:
        mean, variance: Running statistics at the end; the variance is unbiased.
        mismatch: D of each batch against the running statistics *before* its update, mean over channels.
    """

    mean: Float[Tensor, "rates channels"]
    variance: Float[Tensor, "rates channels"]
    mismatch: Float[Tensor, "updates rates"]


def effective_batches(rate: Rate) -> float | None:
    """(2 - a) / a: the number of equally weighted batches with the same noise; None for a cumulative average or 0."""
    return (2.0 - rate) / rate if rate else None


def weights(rates: Sequence[Rate], updates: int, tracked: int) -> Float[Tensor, "updates rates"]:
    """The weight of the new batch in every update.

    Args:
        rates: Weights of the new batch; None: cumulative average.
        updates: Number of updates.
        tracked: Earlier updates (num_batches_tracked), which the cumulative average counts.
    """
    counted = 1.0 / torch.arange(tracked + 1, tracked + updates + 1, dtype=torch.float64)
    columns = [counted if rate is None else torch.full_like(counted, rate) for rate in rates]
    return torch.stack(columns, 1)


def settled(stream: Stream, updates: int) -> Statistics:
    """The statistics around which running statistics fluctuate on batches like the first ``updates``.

    They are the mean of the batch means and the mean of the unbiased batch variances: the fixed point of the running
    average in expectation. They are not the population statistics, which include the spread between batches too.
    """
    factor = (stream.values[:updates] / (stream.values[:updates] - 1)).double()
    variance = stream.variance[:updates].double() * factor.unsqueeze(1)
    return Statistics(stream.mean[:updates].double().mean(0), variance.mean(0))


def with_shift(stream: Stream, first: int, unit: Float[Tensor, " channels"], shift: float, scale: float) -> Stream:
    """The stream with shifted and scaled data from update ``first`` on.

    Args:
        stream: As recorded.
        first: Index of the first update with changed data.
        unit: Standard deviation of each channel.
        shift: Standard deviations added to every batch mean.
        scale: Factor on the batch standard deviation, about the batch's own mean.
    """
    mean, variance = stream.mean.clone(), stream.variance.clone()
    mean[first:] += (shift * unit).to(mean.dtype)
    variance[first:] *= scale**2
    return Stream(mean, variance, stream.values)


def replay(stream: Stream, start: Statistics, weights: Float[Tensor, "updates rates"], eps: float) -> Replay:
    """Run the running averages over the stream, for all rates in parallel.

    Args:
        stream: Batch statistics in the order of the updates.
        start: The running statistics before the first update.
        weights: As returned by ``weights``.
        eps: The layer's eps.
    """
    updates, rates = weights.shape
    channels = start.mean.numel()
    mean, variance = start.mean.double().repeat(rates), start.variance.double().repeat(rates)
    every_eps = torch.full_like(mean, eps)
    mismatch = torch.empty(updates, rates, dtype=torch.float64)
    for update in range(updates):
        batch_mean = stream.mean[update].double().repeat(rates)
        batch_variance = stream.variance[update].double().repeat(rates)
        found = corrections(batch_mean[None], batch_variance[None], mean, variance, every_eps)
        mismatch[update] = found.mismatch.view(rates, channels).mean(1)
        weight = weights[update].repeat_interleave(channels)
        mean = (1 - weight) * mean + weight * batch_mean
        variance = (1 - weight) * variance + weight * stream.unbiased(update).repeat(rates)
    return Replay(mean.view(rates, channels), variance.view(rates, channels), mismatch)


def standard_error(values: Float[Tensor, " batches"]) -> float | None:
    """Standard error of the mean of a correlated series, by the method of batch means; None if there is only one block.

    Blocks shorter than the memory of a running average (its effective batches) give an error that is too small.
    """
    blocks = _block_means(values)
    return float(blocks.std()) / math.sqrt(blocks.numel()) if blocks.numel() > 1 else None


def ranking(mismatch: Float[Tensor, "batches rates"], noise: Float[Tensor, "batches rates"]) -> tuple[int, ...]:
    """The rate with the smallest mean mismatch, then those not significantly (95%) worse, by increasing mismatch.

    Every rate is compared with the best one batch by batch, which removes what all rates have in common. A rate ties
    with the best if its difference is within the half width of the 95% interval (Student's t over block means) plus
    the mismatch divided by the number of batches. The second term is the error of a mean over that many batches, which
    is common to all blocks of a slow rate.

    Args:
        mismatch: Mismatch to rank by.
        noise: The mismatch without systematic parts (the approach from the start or from a shift); gives the errors.
    """
    order = torch.argsort(mismatch.mean(0), stable=True).tolist()
    best = order[0]
    lead = (mismatch - mismatch[:, [best]]).mean(0).tolist()
    shared = float(noise[:, best].mean().abs()) / len(noise)
    errors = [_half_width(noise[:, rate] - noise[:, best]) + shared for rate in range(len(order))]
    return tuple(rate for rate in order if rate == best or lead[rate] <= errors[rate])


def recovery(plain: Float[Tensor, " batches"], shifted: Float[Tensor, " batches"]) -> int | None:
    """Number of batches after which a shift no longer adds more than the mismatch without it.

    Args:
        plain: Mismatch of these batches without the shift.
        shifted: Mismatch of these batches with the shift.

    Returns:
        Number of batches until the mismatch falls and stays below twice its settled value (the mean of ``plain``); None
        if it never does.
    """
    late = (shifted - plain > plain.mean()).nonzero()
    batches = int(late[-1]) + 1 if late.numel() else 0
    return None if batches == plain.numel() else batches


def _half_width(difference: Float[Tensor, " batches"]) -> float:
    """Half width of the interval of the mean; infinite for one block, which says nothing about the spread."""
    blocks = _block_means(difference)
    half = half_width(blocks.numel(), float(blocks.sum()), float(blocks.square().sum()))
    return math.inf if half is None else half


def _block_means(values: Float[Tensor, " batches"]) -> Float[Tensor, " blocks"]:
    """Means of consecutive blocks of equal length; the remainder is left out at the beginning."""
    blocks = max(1, min(BLOCKS, values.numel() // 2))
    size = values.numel() // blocks
    return values[values.numel() - blocks * size :].view(blocks, size).mean(1)
