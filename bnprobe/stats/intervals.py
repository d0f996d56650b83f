"""Confidence intervals: of a mean over micro-batches, and by the jackknife of any function of sums.

See docs/explanation/intervals.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bnprobe.records import Interval

CONFIDENCE = 0.95

_LARGEST_EXPONENT = 300.0
"""Keeps the ends of very wide intervals finite."""

_ROUNDING = 1e-12
"""Relative variance below which figures count as all the same."""


HEAVY = 0.45, 0.5, 0.3
"""Limit on ``Sums.tail`` at 128 samples; upper and lower end of the limit for fewer and for more.

It falls with the fourth root of the number of samples: between tails that fade, with the root, and those that do not
fade at all. Healthy networks at batch size 64 have 0.05 (docs/decisions/0030).
"""

HEAVY_BATCHES = 0.75
"""The same at 16 micro-batches, where samples are not known one by one."""


@dataclass(frozen=True)
class Sums:
    """A non-negative figure of independent micro-batches, summed.

    Attributes:
        count: Micro-batches.
        total, square, cube: Sums of the figure, of its square and of its cube.
        parts: The same of what each single sample adds to ``total`` by itself; None: not known.
        sampled: The part of a finite data set that was measured: where all was, no sample is left to be surprised by.
    """

    count: int
    total: float
    square: float
    cube: float
    parts: Sums | None = None
    sampled: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def variance(self) -> float:
        """Unbiased."""
        return max(self.square / self.count - self.mean * self.mean, 0.0) * self.count / (self.count - 1)

    @property
    def skewness(self) -> float:
        """That of the sum of the figures: that of one figure over the root of their number; at most 1."""
        mean, square = self.mean, self.square / self.count
        variance = square - mean * mean  # products, since powers of large floats raise an OverflowError
        if not variance > _ROUNDING * square:
            return 0.0
        third = self.cube / self.count - 3 * mean * square + 2 * mean * mean * mean
        spread = variance * math.sqrt(variance * self.count)
        return third / spread if spread > 0.0 else 0.0

    @property
    def tail(self) -> float:
        """Skewness of ``total`` as single samples cause it; without ``parts``, as micro-batches show it.

        A Student's interval needs it to be small. It falls with the root of the number of samples, unless the tail is
        so heavy that the largest samples keep up with the sum of all others.
        """
        left = 1 - self.sampled
        if self.parts is None or self.parts.count < 2:
            return left * self.skewness
        explained = self.parts.count * self.parts.variance / max(self.count * self.variance, 1e-300)
        return left * self.parts.skewness * min(math.sqrt(explained), 1.0)

    @property
    def heavy_tailed(self) -> bool:
        """Whether the tail is too heavy for any upper end of an interval to be trusted."""
        if self.count < 2:
            return False
        if self.parts is None:
            return self.tail > HEAVY_BATCHES * math.sqrt(math.sqrt(16 / self.count))
        limit, most, least = HEAVY
        return self.tail > min(max(limit * math.sqrt(math.sqrt(128 / self.parts.count)), least), most)

    def __add__(self, other: Sums) -> Sums:
        parts = self.parts if other.parts is None else other.parts if self.parts is None else self.parts + other.parts
        return Sums(
            self.count + other.count,
            self.total + other.total,
            self.square + other.square,
            self.cube + other.cube,
            parts,
        )


def mean_interval(sums: Sums, confidence: float = CONFIDENCE) -> Interval:
    """Interval for the mean of a non-negative figure, such as D, over independent micro-batches.

    It is ``log_interval``; where the skewness that was measured asks for more, the upper end is that of Hall (1992,
    J. R. Stat. Soc. B 54, 221-228).

    Returns:
        As ``log_interval``; (lower, None) where tails are too heavy to say how large the mean may be.
    """
    low, high = log_interval(sums.count, sums.total, sums.square, confidence)
    if high is None or high == low:
        return low, high
    if sums.heavy_tailed:
        return low, None
    return low, max(high, sums.mean + _reach(sums, confidence))


def _reach(sums: Sums, confidence: float) -> float:
    """How far up Hall's interval reaches from the mean, by his cubic transformation."""
    skewness, quantile = sums.skewness, t_quantile(sums.count - 1, confidence)
    if skewness < _ROUNDING:
        return 0.0
    root = 1 - skewness * (quantile + skewness / 6)
    stretched = 3 * (1 - math.copysign(abs(root) ** (1 / 3), root)) / skewness
    return stretched * math.sqrt(sums.variance / sums.count)


def log_interval(count: int, total: float, total_square: float, confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval for the mean of a non-negative figure over ``count`` independent micro-batches.

    The interval is computed on a logarithmic scale. Sums of squares are skewed to the right: with 16 micro-batches, the
    true value lies above a symmetric interval four times as often as the confidence level says.

    Channels of one micro-batch are correlated; micro-batches are not, as far as the loader makes them independent.
    Therefore only the spread between micro-batches is used.

    Args:
        count: Number of micro-batches.
        total, total_square: Sum and sum of squares of the per-batch figures.

    Returns:
        (lower, upper); (0, 0) if all figures are 0; (0, None) for one micro-batch, which says nothing about the spread.
    """
    half = half_width(count, total, total_square, confidence)
    if half is None:
        return 0.0, None
    mean = total / count
    if half == 0.0:
        return mean, mean
    factor = math.exp(min(half / mean, _LARGEST_EXPONENT))
    return mean / factor, mean * factor


def half_width(count: int, total: float, total_square: float, confidence: float = CONFIDENCE) -> float | None:
    """Half width of the symmetric Student's t interval of a mean of any sign; None with fewer than two values."""
    if count < 2:
        return None
    mean = total / count
    variance = max(total_square / count - mean * mean, 0.0) * count / (count - 1)
    return t_quantile(count - 1, confidence) * math.sqrt(variance / count)


@functools.cache
def t_quantile(degrees: float, confidence: float) -> float:
    """Half width of the central Student's t interval, in standard errors."""
    from scipy.special import stdtrit  # scipy.stats takes half a second to import

    return float(stdtrit(degrees, 0.5 + confidence / 2))


REPLICATES = 16
"""Few, since memory grows with them, but enough: Student's t with 15 degrees of freedom is 9% wider than the normal."""


@dataclass(frozen=True)
class JackknifeEstimate:
    """A bias-corrected figure.

    Attributes:
        value: The bias-corrected value.
        bias: The bias that was subtracted from the figure computed from all data.
        variance: Variance of ``value``; infinite if fewer than two replicates have data.
        degrees: Degrees of freedom of ``variance``.
        open: The tails of what it was computed from are too heavy to say how large the figure may be.
    """

    value: float
    bias: float
    variance: float
    degrees: int
    open: bool = False

    def of_finite_data(self, sampled: float, kept: float = 0.0) -> JackknifeEstimate:
        """The same where a part of a finite data set was measured, no sample twice, and the truth is that of the set.

        Means over samples then vary by 1 - sampled of what they vary by with independent draws, and so do the bias and
        the variance of what is computed from them (Cochran 1977, Sampling Techniques, section 2.6).

        Args:
            sampled: Samples measured over samples in the data set; 0: the data set is endless.
            kept: The part of the variance that is no matter of which samples were drawn, so that it stays.
        """
        bias = (1 - sampled) * self.bias
        variance = (1 - sampled * (1 - kept)) * self.variance
        return replace(self, value=self.value + self.bias - bias, bias=bias, variance=variance)

    def with_noise(self, added: float, excess: float = 0.0) -> JackknifeEstimate:
        """The same with the variance ``added`` of an independent error, and less what the jackknife saw in ``excess``.

        A tenth of the variance stays at least: it is known no better than that.
        """
        return replace(self, variance=max(self.variance - excess, 0.1 * self.variance) + added)

    def interval(self) -> Interval | None:
        """95% interval; None if the spread is unknown."""
        if self.degrees < 1:
            return None
        half = t_quantile(self.degrees, CONFIDENCE) * math.sqrt(self.variance)
        return self.value - half, None if self.open else self.value + half


def leave_one_out(sums: Float[Tensor, "replicates ..."]) -> Float[Tensor, "estimates ..."]:
    """The sum over all replicates, then the sums that leave out each one."""
    total = sums.sum(0, keepdim=True)
    return torch.cat([total, total - sums])


def jackknife(estimates: Float[Tensor, " estimates"], counts: Float[Tensor, " replicates"]) -> JackknifeEstimate:
    """``jackknife_each`` of a single figure."""
    return next(jackknife_each(estimates[:, None], counts[:, None]))


def jackknife_each(
    estimates: Float[Tensor, "estimates figures"], counts: Float[Tensor, "replicates figures"]
) -> Iterator[JackknifeEstimate]:
    """Combine figures from all replicates with those that leave out each one.

    This is the delete-m jackknife for groups of unequal size (Busing, Meijer & van der Leeden 1999, Statistics and
    Computing 9, section 2.3); for equal groups it is the jackknife of Quenouille and Tukey.

    Args:
        estimates: In the order of ``leave_one_out``: all data first.
        counts: Micro-batches in each replicate; empty replicates are left out.
    """
    held, total, deleted = counts > 0, estimates[0], estimates[1:]
    groups, ratio = held.sum(0), counts.sum(0) / counts
    value = groups * total - torch.where(held, (1 - 1 / ratio) * deleted, 0.0).sum(0)
    pseudo = ratio * total - (ratio - 1) * deleted
    variance = torch.where(held, (pseudo - value).square() / (ratio - 1), 0.0).sum(0) / groups
    found = (figures.tolist() for figures in (total, value, total - value, variance, groups))
    for whole, corrected, bias, spread, number in zip(*found, strict=True):
        if number < 2:
            yield JackknifeEstimate(whole, 0.0, math.inf, 0)
        else:
            yield JackknifeEstimate(corrected, bias, spread, number - 1)
