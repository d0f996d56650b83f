"""Running statistics replayed at other rates: what each momentum would have made of the same batches.

The running average is m <- (1 - a) m + a mu_B, and the same with the Bessel-corrected variance n / (n - 1) v_B, as in
``torch.nn.BatchNorm``; momentum=None gives the k-th update the weight a = 1/k (cumulative average).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bnprobe.stats.mismatch import corrections
from bnprobe.stats.uncertainty import half_width

Rate = float | None
"""Weight of the new batch; None: cumulative average."""

BLOCKS = 10
"""Blocks for batch means (fewer where there are not two values for each)."""


@dataclass(frozen=True)
class Statistics:
    """Mean and unbiased variance, float64."""

    mean: Float[Tensor, " channels"]
    variance: Float[Tensor, " channels"]


@dataclass(frozen=True)
class Stream:
    """Batch statistics of one layer in the order of its updates.

    Attributes:
        mean, variance: Of each batch; the variance is biased.
        values: Values per channel behind each; at least 2.
    """

    mean: Float[Tensor, "updates channels"]
    variance: Float[Tensor, "updates channels"]
    values: Float[Tensor, " updates"]

    def unbiased(self, update: int) -> Float[Tensor, " channels"]:
        """The Bessel-corrected variance of one batch, float64."""
        values = self.values[update].double()
        return self.variance[update].double() * (values / (values - 1))


@dataclass(frozen=True)
class Replay:
    """What each rate makes of a stream.

    Attributes:
        mean, variance: The running statistics at the end; the variance is unbiased.
        mismatch: D of each batch against the running statistics of *before* its update, mean over channels.
    """

    mean: Float[Tensor, "rates channels"]
    variance: Float[Tensor, "rates channels"]
    mismatch: Float[Tensor, "updates rates"]


def effective_batches(rate: Rate) -> float | None:
    """(2 - a) / a: so many batches, weighed alike, would be as noisy; None for the cumulative average and for 0."""
    return (2.0 - rate) / rate if rate else None


def weights(rates: Sequence[Rate], updates: int, tracked: int) -> Float[Tensor, "updates rates"]:
    """The weight of the new batch in every update.

    Args:
        rates: Weights, or None for the cumulative average.
        updates: Number of updates.
        tracked: Updates before the first one (num_batches_tracked), which the cumulative average counts.
    """
    counted = 1.0 / torch.arange(tracked + 1, tracked + updates + 1, dtype=torch.float64)
    columns = [counted if rate is None else torch.full_like(counted, rate) for rate in rates]
    return torch.stack(columns, 1)


def settled(stream: Stream, updates: int) -> Statistics:
    """What running statistics fluctuate around for ever on batches like the first ``updates``.

    The mean of the batch means and of the Bessel-corrected batch variances: the fixed point of the average in
    expectation, not the population statistics (which hold the spread between batches too).
    """
    factor = (stream.values[:updates] / (stream.values[:updates] - 1)).double()
    variance = stream.variance[:updates].double() * factor.unsqueeze(1)
    return Statistics(stream.mean[:updates].double().mean(0), variance.mean(0))


def with_shift(stream: Stream, first: int, unit: Float[Tensor, " channels"], shift: float, scale: float) -> Stream:
    """The stream with other data from update ``first`` on.

    Args:
        stream: As recorded.
        first: Index of the first update that sees the other data.
        unit: Standard deviation of each channel.
        shift: Standard deviations added to every batch mean.
        scale: Factor on the batch standard deviation, about the batch's own mean.
    """
    mean, variance = stream.mean.clone(), stream.variance.clone()
    mean[first:] += (shift * unit).to(mean.dtype)
    variance[first:] *= scale**2
    return Stream(mean, variance, stream.values)


def replay(stream: Stream, start: Statistics, weights: Float[Tensor, "updates rates"], eps: float) -> Replay:
    """Run the averages over the stream, all rates side by side.

    Args:
        stream: Batch statistics in the order of the updates.
        start: The running statistics before the first update.
        weights: As ``weights`` gives them.
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
    """Standard error of the mean of a correlated series, by the means of consecutive blocks; None for one block.

    Blocks shorter than the memory of an average (its effective batches) give an error that is too small.
    """
    blocks = _block_means(values)
    return float(blocks.std()) / math.sqrt(blocks.numel()) if blocks.numel() > 1 else None


def ranking(mismatch: Float[Tensor, "batches rates"], noise: Float[Tensor, "batches rates"]) -> tuple[int, ...]:
    """The rate of smallest mean mismatch, then those that it does not surely beat, by rising mismatch.

    Each is compared with the best batch by batch, which takes out what all rates have in common. A tie is one whose
    difference is within its 95% interval (Student's t over block means), widened by the mismatch over the number of
    batches: by so much the mean of as many batches is itself off, which the blocks of slow rates all share.

    Args:
        mismatch: What is ranked.
        noise: The same without what is no chance (the way from a start or from a shift): errors come from here.
    """
    order = torch.argsort(mismatch.mean(0), stable=True).tolist()
    best = order[0]
    lead = (mismatch - mismatch[:, [best]]).mean(0).tolist()
    shared = float(noise[:, best].mean().abs()) / len(noise)
    errors = [_half_width(noise[:, rate] - noise[:, best]) + shared for rate in range(len(order))]
    return tuple(rate for rate in order if rate == best or lead[rate] <= errors[rate])


def recovery(plain: Float[Tensor, " batches"], shifted: Float[Tensor, " batches"]) -> int | None:
    """Batches after which a shift adds no more than the mismatch that there was without it.

    Args:
        plain: Mismatch of the batches after the shift, had there been none.
        shifted: The same with the shift.

    Returns:
        How many batches it takes until the mismatch is, and stays, within twice its settled value (the mean of
        ``plain``); None if it never is.
    """
    late = (shifted - plain > plain.mean()).nonzero()
    batches = int(late[-1]) + 1 if late.numel() else 0
    return None if batches == plain.numel() else batches


def _half_width(difference: Float[Tensor, " batches"]) -> float:
    """Of the interval of the mean; infinite where one block says nothing about the spread."""
    blocks = _block_means(difference)
    half = half_width(blocks.numel(), float(blocks.sum()), float(blocks.square().sum()))
    return math.inf if half is None else half


def _block_means(values: Float[Tensor, " batches"]) -> Float[Tensor, " blocks"]:
    """Means of equal consecutive blocks; what is left over is left out at the beginning."""
    blocks = max(1, min(BLOCKS, values.numel() // 2))
    size = values.numel() // blocks
    return values[values.numel() - blocks * size :].view(blocks, size).mean(1)
