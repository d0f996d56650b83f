"""Means of a loss or metric and their differences, with 95% intervals: over samples where these are known one by one.

What is independent decides what an interval is computed from. With running statistics samples are independent of each
other. With batch statistics the samples of a micro-batch share its mean and variance, so that micro-batches are the
unit, once there are enough of them. See docs/explanation/intervals.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bnprobe.records import Estimate, Interval
from bnprobe.stats.intervals import CONFIDENCE, jackknife, t_quantile

FEWEST_CLUSTERS = 8
"""Micro-batches from which on their spread is used where the samples of one share its statistics; fewer give an
interval of Student's t that is wider than the samples warrant (twelve standard errors with two of them)."""

FEWEST_CHANGES = 10
"""Of figures that are 0 or 1: samples that must differ before the spread of the differences is trusted."""

_ROUNDING = 1e-6
"""Relative differences up to this are rounding of float32, and no spread."""


@dataclass(frozen=True)
class Scores:
    """A loss or metric on one path, float64.

    Attributes:
        batches: Value of each micro-batch.
        sizes: Samples of each micro-batch.
        samples: Values of single samples, of all micro-batches or of some, the same ones on every path; None where the
            figure is no mean over samples, or they were not asked for.
        is_mean: Whether the figure is a mean over samples.
    """

    batches: Float[Tensor, " batches"]
    sizes: Float[Tensor, " batches"]
    samples: Float[Tensor, " samples"] | None = None
    is_mean: bool = False

    @property
    def mean(self) -> float:
        """Over samples, or where the figure is no mean over samples, over micro-batches."""
        return float(_weighted(self.batches, self.sizes, self.is_mean or self.samples is not None))

    @property
    def count(self) -> int:
        """Samples that the mean is over."""
        return int(self.sizes.sum())


def paired_difference(after: Scores, before: Scores, *, shared: bool) -> Estimate:
    """Mean of ``after - before`` on the same micro-batches, with its 95% interval.

    By sample where both are known by sample, otherwise by micro-batch. Where ``shared``, and there are at least
    ``FEWEST_CLUSTERS`` micro-batches, Student's t over micro-batches: the cluster-robust interval. With fewer it is
    over samples, as if these were independent given the statistics of their batch. What that leaves out is how far
    those statistics are from other batches': of the order of 1 / sqrt(samples in a batch) too, and small against the
    spread of samples, since few micro-batches are what large ones give.

    Figures that are 0 or 1 (is a prediction right?) have an interval also where none or few samples differ: that of
    Agresti and Min (2005, Statistics in Medicine 24, section 3), which adds half a sample to each of the four cells.

    Args:
        after, before: On the same micro-batches and samples.
        shared: Whether the samples of a micro-batch share its statistics on either side.

    Returns:
        No interval where there is one value, or where all differences are the same to rounding and the figures are not
        0 or 1.
    """
    difference = after.batches - before.batches
    rounding = _ROUNDING * float(torch.maximum(after.batches.abs(), before.batches.abs()).max())
    if after.samples is None or before.samples is None:
        return Estimate(float(difference.mean()), _student(difference, rounding))
    mean = float(_weighted(difference, after.sizes, True))
    samples, number = after.samples - before.samples, after.count
    changes = int((samples != 0).sum())
    hits = _are_hits(after.samples) and _are_hits(before.samples)
    if hits and (not shared or len(difference) < FEWEST_CLUSTERS or changes < FEWEST_CHANGES):
        return Estimate(mean, _agresti_min(mean, changes / len(samples), number))
    if shared and len(difference) >= FEWEST_CLUSTERS:
        return Estimate(mean, _student(difference, rounding))
    return Estimate(mean, _student(samples, rounding, mean, number))


def with_draw(change: Estimate, without: Float[Tensor, " parts"], sampled: float = 0.0) -> Estimate:
    """The same with an interval that also covers which data the statistics were taken of that the figure comes from.

    The variance of that is the delete-a-group jackknife's. The interval's two sides and Student's t of this variance
    are added as squares: both errors are independent (Zou & Donner 2008, Statistics in Medicine 27, section 2).

    Args:
        change: Its interval covers the samples that were scored.
        without: The figure, up to a constant, with the statistics of all parts of that data but one; equal parts.
        sampled: The part of a finite data set that the statistics were taken of; 0: it is endless.

    Returns:
        No interval where there are fewer than two parts, or a figure is not finite.
    """
    if change.interval is None:
        return change
    estimates = torch.cat([without.mean(0, keepdim=True), without])
    drawn = jackknife(estimates, torch.ones(len(without), dtype=torch.float64)).of_finite_data(sampled)
    if drawn.degrees < 1 or not math.isfinite(drawn.variance):
        return Estimate(change.mean, None)
    half, (low, high) = t_quantile(drawn.degrees, CONFIDENCE) * math.sqrt(drawn.variance), change.interval
    up = None if high is None else change.mean + math.hypot(high - change.mean, half)
    return Estimate(change.mean, (change.mean - math.hypot(change.mean - low, half), up))


def independent_difference(one: Scores, other: Scores, *, shared: bool = False) -> Estimate:
    """Mean of ``one`` minus mean of ``other``, on different data, with its 95% interval: Welch's.

    Over samples where they are known, which must be independent, otherwise over micro-batches. For 0/1 figures one
    success and one failure are added on each side (Agresti & Caffo 2000, The American Statistician 54), so that few
    samples that all agree do not give certainty.

    Args:
        one, other: On different data.
        shared: Whether the samples of a micro-batch depend on each other: where the model is random at inference, it
            may draw once for all of them. The unit is then as in ``paired_difference``.

    Returns:
        No interval where a side has one value, or where all values are the same and not 0 or 1.
    """
    difference = one.mean - other.mean
    sides = [_side(one, shared), _side(other, shared)]
    known = [side for side in sides if side is not None]
    if len(known) < len(sides):
        return Estimate(difference, None)
    variance = sum(side.variance for side in known)
    if variance == 0:
        return Estimate(difference, None)
    degrees = variance**2 / sum(side.variance**2 / side.degrees for side in known)
    half, centre = t_quantile(degrees, CONFIDENCE) * math.sqrt(variance), known[0].mean - known[1].mean
    return Estimate(difference, (min(centre - half, difference), max(centre + half, difference)))


@dataclass(frozen=True)
class _Side:
    """A mean, the variance of it, and the degrees of freedom of that."""

    mean: float
    variance: float
    degrees: int


def _side(scores: Scores, shared: bool) -> _Side | None:
    """None: no spread is known."""
    if scores.samples is None or (shared and len(scores.batches) >= FEWEST_CLUSTERS):
        if len(scores.batches) < 2:
            return None
        return _Side(scores.mean, float(scores.batches.var()) / len(scores.batches), len(scores.batches) - 1)
    if len(scores.samples) < 2:
        return None
    number = scores.count
    if _are_hits(scores.samples):
        rate = (scores.mean * number + 1) / (number + 2)
        return _Side(rate, rate * (1 - rate) / (number + 2), number - 1)
    return _Side(scores.mean, float(scores.samples.var()) / number, len(scores.samples) - 1)


def _weighted(values: Tensor, sizes: Tensor, by_sample: bool) -> Tensor:
    return (values * sizes).sum() / sizes.sum() if by_sample else values.mean()


def _are_hits(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _student(values: Tensor, rounding: float, mean: float | None = None, number: int | None = None) -> Interval | None:
    """Student's t of independent values; of their mean over ``number`` values, where only these few are known."""
    if len(values) < 2 or float(values.max() - values.min()) <= rounding:
        return None
    centre, number = float(values.mean()) if mean is None else mean, number or len(values)
    half = t_quantile(len(values) - 1, CONFIDENCE) * math.sqrt(float(values.var()) / number)
    return centre - half, centre + half


def _agresti_min(mean: float, changed: float, number: int) -> Interval:
    """The interval of a difference of two paired proportions.

    Args:
        mean: The difference.
        changed: The part of the samples that differ.
        number: Of samples.
    """
    more = number + 2
    centre, rate = mean * number / more, (changed * number + 1) / more
    half = t_quantile(max(number - 1, 1), CONFIDENCE) * math.sqrt(max(rate - centre**2, 0.0) / more)
    return max(centre - half, -1.0), min(centre + half, 1.0)
