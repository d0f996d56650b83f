"""What a scan returns: frozen records, no logic.

The field names are those of the JSON report (``schema_version`` 1). A figure that does not exist (an
unbounded interval end, an eval path that overflowed) is None, never NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SCHEMA_VERSION = 1

Interval = tuple[float, float | None]
"""Lower and upper end of a 95% interval; None: no upper end can be given."""

StopReason = Literal["requested", "decided", "max_batches", "data_exhausted", "interrupted", "failed"]


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
    """

    mismatch: float
    interval: Interval
    equivalent_batch_size: float | None
    equivalent_batch_size_interval: Interval
    r: Distribution
    d: Distribution


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


@dataclass(frozen=True)
class Layer:
    """One BN layer.

    Attributes:
        name: Its first qualified name in the model; "" is never used: the root is "(root)".
        aliases: Further names of the same module (shared modules).
        kind: Class name, e.g. "BatchNorm2d".
        momentum: Weight of the new batch in the running average; None: cumulative average.
        batches_tracked: Updates of the running statistics so far; None if not counted.
        calls_per_forward: How often one forward pass calls it.
        values_per_channel: Values per channel that one micro-batch normalizes (N * S), first call.
        running_statistics: False for track_running_stats=False: there is nothing to compare with.
        threshold: Equivalent batch size under which this layer is flagged.
        flagged: The whole interval lies beyond the threshold, on either path.
        undecided: Not flagged, but an interval straddles the threshold.
        note: What else the reader should know about the layer, one sentence.
        train, eval: The two paths; None where it could not be measured (see ``note``).
        calls: One entry for each call, where ``calls_per_forward`` > 1.
        batch_sizes: Eval-path mismatch at the batch sizes asked for.
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


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that could not be judged, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class PathValues:
    """A loss or metric on both paths, mean over micro-batches."""

    train: float
    eval: float


@dataclass(frozen=True)
class Output:
    """How far the two paths are apart at the model's output, on the same images.

    Attributes:
        relative_l2: ||y_train - y_eval|| / ||y_eval|| over all outputs; None if not finite or no tensors.
        argmax_changed: Fraction of class predictions that differ; None if not class scores.
        kl_divergence: Mean KL(eval || train) of the class distributions, in nats; None likewise.
        loss, metric: Values of the user's functions, where given.
        note: Why a figure is missing, where that needs saying.
    """

    relative_l2: float | None
    argmax_changed: float | None
    kl_divergence: float | None
    loss: PathValues | None
    metric: PathValues | None
    note: str | None = None


@dataclass(frozen=True)
class Summary:
    """Counts of layers, and the output."""

    layers: int
    flagged: int
    undecided: int
    skipped: int
    output: Output


@dataclass(frozen=True)
class SelfCheck:
    """One emulated step against the same real micro-batches.

    Attributes:
        output_error: Relative L2 difference of the outputs.
        statistic_error: Largest relative difference of a layer's normalized statistics.
        tolerance: What rounding explains for this model; above it emulation is not used.
        passed: Whether emulation may be trusted.
        first_layer: The first layer in call order that differs, where it failed.
    """

    output_error: float
    statistic_error: float
    tolerance: float
    passed: bool
    first_layer: str | None


@dataclass(frozen=True)
class Scan:
    """What was run.

    Attributes:
        model: How the model was named, e.g. "model.py:load_model".
        data: What the micro-batches came from, in words.
        synthetic: Inputs were made up from ``--input-shape``.
        checkpoint: The weights file, where one was given.
        batch_size: Images in a micro-batch.
        batches: Micro-batches measured on both paths.
        batches_requested: ``--batches``, where given.
        images: ``batches * batch_size``.
        left_out: Images of a partial last batch that was not measured.
        emulated: Micro-batches ran in groups, as one physical batch with statistics per group.
        physical_batch: Images that ran at once.
        emulation: Why emulation was or was not used, one sentence.
        self_check: The comparison behind it; None if it was not needed.
        seed: Seed of torch, numpy and random during the scan.
        device: E.g. "cpu", "cuda:0".
        dtype: Of the model's parameters, e.g. "float32".
        autocast: The autocast dtype, where used.
        stopped: Why no more batches were drawn.
        partial: True if Ctrl-C, or an error in the user's loader or model, ended the scan.
        seconds: Wall time of the measurement.
        notes: Further facts that bear on the result, a sentence each.
    """

    model: str
    data: str
    synthetic: bool
    checkpoint: str | None
    batch_size: int
    batches: int
    batches_requested: int | None
    images: int
    left_out: int
    emulated: bool
    physical_batch: int
    emulation: str
    self_check: SelfCheck | None
    seed: int
    device: str
    dtype: str
    autocast: str | None
    stopped: StopReason
    partial: bool
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """Which bnprobe."""

    name: str
    version: str


@dataclass(frozen=True)
class Environment:
    """Where it ran."""

    python: str
    torch: str
    platform: str
    device_name: str
    threads: int


@dataclass(frozen=True)
class Report:
    """The result of a scan."""

    schema_version: int
    tool: Tool
    environment: Environment
    scan: Scan
    summary: Summary
    layers: tuple[Layer, ...]
    skipped: tuple[SkippedLayer, ...]
