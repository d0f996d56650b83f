"""Figures of one layer on one path."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bnprobe.records.basics import Interval

OMITTED_WHEN_EMPTY = frozenset({"statistics"})
"""Fields that a document leaves out where they are empty."""


@dataclass(frozen=True)
class Histogram:
    """Counts of values between consecutive edges; the outer bins take what lies beyond them."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Distribution:
    """The values of r or d, unclipped, over all channels and measured micro-batches.

    Attributes:
        mean, std, min, max: Moments and extremes; std divides by the number of values (biased).
        quantiles: Values at the probabilities "0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99".
        histogram: Where the values lie: log-spaced edges for r, asinh-spaced edges for d.
        clipped: Fraction outside [1/r_max, r_max] (r_max = 3), or of |d| above d_max = 5.
        clipped_iid: The same fraction for i.i.d. Gaussian data of the layer's equivalent batch size.
    """

    mean: float
    std: float
    min: float
    max: float
    quantiles: dict[str, float]
    histogram: Histogram
    clipped: float
    clipped_iid: float


@dataclass(frozen=True)
class PathMeasurement:
    """One layer (or one call of it) on one path, over all channels and measured micro-batches.

    Attributes:
        mismatch: D, the mean squared difference of z_train and z_test (no unit; DESIGN section 1).
        interval: 95% interval of ``mismatch``, over micro-batches.
        equivalent_batch_size: n_eq, in values per channel; None if D is 0 (no mismatch at all).
        equivalent_batch_size_interval: 95% interval of n_eq.
        r, d: The Batch Renorm correction factors.
        statistics: Results of statistics that other packages add, by name; left out where there are none.
    """

    mismatch: float
    interval: Interval
    equivalent_batch_size: float | None
    equivalent_batch_size_interval: Interval
    r: Distribution
    d: Distribution
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchSizePoint:
    """Eval-path mismatch of one layer at one batch size, all sizes from the same images."""

    batch_size: int
    batches: int
    mismatch: float
    interval: Interval
    equivalent_batch_size: float | None


@dataclass(frozen=True)
class CallMeasurement:
    """One of several calls that a forward pass makes of the same layer."""

    index: int
    values_per_channel: int
    train: PathMeasurement | None
    eval: PathMeasurement | None
