"""What is measured of every layer: its mismatch on the two paths, where that comes from, and what it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from bnprobe.records.base import Interval, Record

FROZEN = "frozen: "
"""How the note of a layer begins that training leaves in eval mode."""

ROOT = "(root)"
"""Name of the root module if it is itself a norm layer; its qualified name is empty."""

DEFAULT_THRESHOLD = 32.0
"""Layers with a smaller equivalent batch size are flagged (docs/explanation/equations.md)."""


@dataclass(frozen=True)
class Histogram(Record):
    """Counts of values between consecutive edges; the outer bins take what lies beyond them."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.counts or len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.counts)} counts need one edge more, but there are {len(self.edges)}")
        if any(high <= low for low, high in pairwise(self.edges)):
            raise ValueError("the edges do not increase")
        if any(count < 0 for count in self.counts):
            raise ValueError("a count is negative")


@dataclass(frozen=True)
class Distribution(Record):
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
class PathMeasurement(Record):
    """One layer (or one call of it) on one path, over all channels and measured micro-batches.

    Attributes:
        mismatch: D, the mean squared difference between a value normalized by its batch and by the running
            statistics (no unit; docs/explanation/equations.md).
        interval: 95% interval of ``mismatch``, over micro-batches; the upper end is None where it cannot be told: after
            one micro-batch, and where tails are heavy (see ``Layer.note``).
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
class BatchSizePoint(Record):
    """Eval-path mismatch of one layer at one batch size; all sizes are measured on the same samples.

    Attributes:
        limit: The D above which the layer is flagged at this size: between the limits of noise of batches and of all
            else, in proportion to its parts.
    """

    batch_size: int
    batches: int
    mismatch: float
    interval: Interval
    equivalent_batch_size: float | None
    limit: float


@dataclass(frozen=True)
class CallMeasurement(Record):
    """One of several calls that a forward pass makes of the same layer."""

    index: int
    values_per_channel: int
    train: PathMeasurement | None
    eval: PathMeasurement | None


@dataclass(frozen=True)
class Shares(Record):
    """Where the eval-path mismatch of a layer comes from, in units of D (docs/explanation/ladder.md).

    All but ``data_shift`` add up to ``Layer.eval.mismatch``, to rounding; ``data_shift`` comes on top of it. A share
    may be slightly below 0 by chance. One that is clearly below 0 offsets other shares.

    Attributes:
        small_batch: The noise of i.i.d. batches of this size, with running statistics that have settled on them.
        composition: What non-i.i.d. batches add; None if the samples could not be regrouped at random, in which case
            ``small_batch`` includes it.
        lag: The running statistics against those that the training path would settle on (stale running statistics).
        dropout: The change of these settled statistics by dropout and other random layers.
        propagation: Their change by the batch statistics of the layers before this one.
        data_shift: The held-out data, taken as one batch, against the training data; None without held-out data.
    """

    small_batch: float
    composition: float | None
    lag: float
    dropout: float
    propagation: float
    data_shift: float | None


@dataclass(frozen=True)
class Source:
    """A source of mismatch.

    Attributes:
        field: The field of ``Shares`` that holds its share.
        letter: Stands for it in charts.
        words: Its name in text.
        adds_up: Whether its share is a part of D, and not on top of it.
    """

    field: str
    letter: str
    words: str
    adds_up: bool = True

    def of(self, shares: Shares) -> float | None:
        """This source's share, in units of D."""
        value: float | None = getattr(shares, self.field)
        return value

    def interval(self, intervals: ShareIntervals | None) -> Interval | None:
        """The interval of this source's share."""
        found: Interval | None = None if intervals is None else getattr(intervals, self.field)
        return found


SOURCES = (
    Source("small_batch", "s", "small batches"),
    Source("composition", "c", "non-i.i.d. batches"),
    Source("lag", "l", "stale statistics"),
    Source("dropout", "d", "dropout"),
    Source("propagation", "p", "earlier layers"),
    Source("data_shift", "x", "data shift", adds_up=False),
)
"""All sources, in the order of the fields of ``Shares``."""


@dataclass(frozen=True)
class ShareIntervals(Record):
    """95% intervals of ``Shares``; None where the share is None, is known exactly, or has no interval.

    Where tails are heavy (see ``Layer.note``) they have no upper end, and composition has no interval.
    """

    small_batch: Interval | None
    composition: Interval | None
    lag: Interval | None
    dropout: Interval | None
    propagation: Interval | None
    data_shift: Interval | None


@dataclass(frozen=True)
class Composition(Record):
    """How alike the samples of a batch are, from the mean of every sample on the eval path.

    Attributes:
        intraclass_correlation: Correlation of two samples of one batch, mean over channels; 0: drawn at random.
        design_effect: 1 + (batch size - 1) * intraclass correlation: a batch is worth this many times fewer samples
            drawn at random.
        p_value: Smallest p-value of the layer's channels if batches were drawn at random, by one-way analysis of
            variance, corrected for all channels of all layers (Benjamini and Hochberg 1995).
    """

    intraclass_correlation: float
    design_effect: float
    p_value: float


@dataclass(frozen=True)
class Domains(Record):
    """How far the data of a layer's calls are apart, where one forward pass calls it more than once.

    Attributes:
        mismatch: D between the statistics of one call and those of all calls together, mean over calls; eval path.
        interval: 95% interval of ``mismatch``.
    """

    mismatch: float
    interval: Interval | None


@dataclass(frozen=True)
class Impact(Record):
    """How much the eval path's output changes if this layer alone normalizes with batch statistics.

    Attributes:
        estimate: First-order estimate of the relative L2 change; None if no gradient reaches the layer.
        exact: The relative L2 change as measured; None where it was not measured (all but the worst layers).
        loss: Change of the loss as measured; None without a loss, or where it was not measured.
    """

    estimate: float | None
    exact: float | None
    loss: float | None


@dataclass(frozen=True)
class Backward(Record):
    """Noise of the batch statistics of the backward pass, E[g] and E[g * xhat] (g: gradient of BN's output).

    Attributes:
        noise: Variance over micro-batches of E[g] and of E[g * xhat], summed, over the mean of g^2; mean over channels.
        interval: 95% interval of ``noise``.
        equivalent_batch_size: The number of i.i.d. values that gives this noise, 2 / noise; None if it is 0.
    """

    noise: float
    interval: Interval | None
    equivalent_batch_size: float | None


@dataclass(frozen=True)
class Updates(Record):
    """How the running statistics moved over real training steps.

    Attributes:
        per_step: Updates of the running statistics per optimizer step.
        repeated: How many of these used the batch statistics of an earlier update of the same step: a forward pass that
            ran again on the same data, as in gradient checkpointing.
        rate: The weight that one step gave to its batch; None if it cannot be determined.
        configured: The weight that the layer's momentum asks for, at one update per step.
        drift: Distance that the running statistics moved in one step, in running standard deviations (root mean
            square over channels and steps).
    """

    per_step: float
    rate: float | None
    configured: float | None
    drift: float
    repeated: float = 0.0


@dataclass(frozen=True)
class Layer(Record):
    """One BN layer.

    Attributes:
        name: Its first qualified name in the model; "" is never used: the root is "(root)".
        aliases: Further names of the same module (shared modules).
        kind: Class name, e.g. "BatchNorm2d".
        momentum: Weight of the new batch in the running average; None: cumulative average.
        batches_tracked: Updates of the running statistics so far; None if not counted.
        calls_per_forward: How often one forward pass calls it.
        values_per_channel: Values per channel that one micro-batch normalizes (N * S), first call.
        running_statistics: False with ``track_running_stats=False``: there is nothing to compare with.
        threshold: The equivalent batch size below which this layer is flagged.
        flagged: The whole 95% interval lies below the threshold, on either path. Nothing uses the running statistics of
            a layer that runs in training only: it is flagged for the noise of its batches, ``shares.small_batch``.
        undecided: Not flagged, but an interval contains the threshold.
        note: What else the reader should know about the layer, one sentence.
        train, eval: The two paths; None where the path could not be measured (see ``note``).
        calls: One entry for each call, where ``calls_per_forward`` > 1.
        batch_sizes: Eval-path mismatch at the batch sizes asked for.
        location: File and line in the user's code where the layer is built, where Python can tell.
        shares, share_intervals: Where the eval-path mismatch comes from, or of a layer that runs in training only the
            train-path mismatch; None where it could not be decomposed.
        composition: None with one sample per batch, or where the samples of a batch could not be told apart.
        domains: Where ``calls_per_forward`` > 1.
        impact: None where no layer is flagged, or the outputs could not be compared.
        backward: With ``--gradients``.
        updates: With ``--train-steps``.
        only_in: The mode in which the model runs the layer, where that is one only: an auxiliary head runs in training.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    channels: int
    eps: float
    momentum: float | None
    batches_tracked: int | None
    calls_per_forward: int
    values_per_channel: int
    running_statistics: bool
    threshold: float
    flagged: bool
    undecided: bool
    note: str | None
    train: PathMeasurement | None
    eval: PathMeasurement | None
    calls: tuple[CallMeasurement, ...] = ()
    batch_sizes: tuple[BatchSizePoint, ...] = ()
    location: str | None = None
    shares: Shares | None = None
    share_intervals: ShareIntervals | None = None
    composition: Composition | None = None
    domains: Domains | None = None
    impact: Impact | None = None
    backward: Backward | None = None
    updates: Updates | None = None
    only_in: Literal["train", "eval"] | None = None


@dataclass(frozen=True)
class SkippedLayer(Record):
    """A layer that could not be judged, and why.

    ``agrees``: there is nothing to judge, because training and inference give the same output by construction.
    """

    name: str
    kind: str
    reason: str
    agrees: bool = False
