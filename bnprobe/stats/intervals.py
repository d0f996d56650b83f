"""Confidence intervals: of a mean over micro-batches, and by the jackknife of any function of sums.

See docs/explanation/intervals.md.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bnprobe.records import Interval

CONFIDENCE = 0.95

_LARGEST_EXPONENT = 300.0
"""Keeps the ends of very wide intervals finite."""


def mean_interval(count: int, total: float, total_square: float, confidence: float = CONFIDENCE) -> Interval:
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
    """

    value: float
    bias: float
    variance: float
    degrees: int

    def interval(self, extra_variance: float = 0.0) -> Interval | None:
        """95% interval, with the ``extra_variance`` of an independent error added; None if the spread is unknown."""
        if self.degrees < 1:
            return None
        half = t_quantile(self.degrees, 0.95) * math.sqrt(self.variance + extra_variance)
        return self.value - half, self.value + half


def leave_one_out(sums: Float[Tensor, "replicates ..."]) -> Float[Tensor, "estimates ..."]:
    """The sum over all replicates, then the sums that leave out each one."""
    total = sums.sum(0, keepdim=True)
    return torch.cat([total, total - sums])


def jackknife(estimates: Float[Tensor, " estimates"], counts: Float[Tensor, " replicates"]) -> JackknifeEstimate:
    """Combine a figure from all replicates with those that leave out each one.

    This is the delete-m jackknife for groups of unequal size (Busing, Meijer & van der Leeden 1999, Statistics and
    Computing 9, section 2.3); for equal groups it is the jackknife of Quenouille and Tukey.

    Args:
        estimates: In the order of ``leave_one_out``: all data first.
        counts: Micro-batches in each replicate; empty replicates are left out.
    """
    held = counts > 0
    groups = int(held.sum())
    total = estimates[0]
    if groups < 2:
        return JackknifeEstimate(float(total), 0.0, math.inf, 0)
    deleted, sizes = estimates[1:][held], counts[held]
    ratio = sizes.sum() / sizes
    value = groups * total - ((1 - 1 / ratio) * deleted).sum()
    pseudo = ratio * total - (ratio - 1) * deleted
    variance = ((pseudo - value).square() / (ratio - 1)).mean()
    return JackknifeEstimate(float(value), float(total - value), float(variance), groups - 1)
