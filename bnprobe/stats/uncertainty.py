"""Confidence intervals for means over micro-batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

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


def standing(intervals: Sequence[Interval], limit: float) -> Literal["flagged", "undecided", "clean"]:
    """Classify a layer by the intervals of its mismatch on the measured paths and one limit.

    Flagged: on at least one path the lower end exceeds the limit. Clean: on no path does the upper end exceed it.
    Undecided: anything else.
    """
    if any(not low <= limit for low, _ in intervals):  # also NaN: a layer that overflows is not clean
        return "flagged"
    if any(high is None or high > limit for _, high in intervals):
        return "undecided"
    return "clean"


@functools.cache
def t_quantile(degrees: int, confidence: float) -> float:
    """Half width of the central Student's t interval, in standard errors."""
    from scipy.special import stdtrit  # scipy.stats takes half a second to import

    return float(stdtrit(degrees, 0.5 + confidence / 2))
