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

Cause = Literal[
    "small_batch",
    "composition",
    "lag",
    "dropout",
    "propagation",
    "data_shift",
    "shared_domains",
    "double_update",
    "rank_divergence",
    "backward_noise",
    "momentum_convention",
    "never_trained",
    "non_finite",
    "no_running_stats",
    "frozen_mismatch",
    "single_value",
    "single_image",
    "last_batch",
    "dead_channels",
    "dropout_before_norm",
]
"""Why a layer is off, or may become so (DESIGN section 4)."""

Severity = Literal["error", "warning", "info"]
"""error: training and inference differ, or will; warning: likely a mistake, or harmless so far; info: good to know."""

Outcome = Literal["passed", "failed", "skipped"]


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
class Shares:
    """Where the eval-path mismatch of a layer comes from, in units of D (DESIGN section 3).

    All but ``data_shift`` add up to ``Layer.eval.mismatch`` to rounding; ``data_shift`` comes on top of it. A share may
    be a little below 0 by chance; a share that two causes offset is clearly so.

    Attributes:
        small_batch: What is left with batches drawn at random and running statistics that have settled on them.
        composition: What batches that are not drawn at random add; None if images could not be regrouped, and then
            ``small_batch`` holds both.
        lag: Running statistics against those that the training path would settle on.
        dropout: What dropout and other random layers change about these.
        propagation: What the upstream layers' batch statistics change about these.
        data_shift: The evaluation data, taken as one batch, against the training data; None without evaluation data.
    """

    small_batch: float
    composition: float | None
    lag: float
    dropout: float
    propagation: float
    data_shift: float | None


@dataclass(frozen=True)
class ShareIntervals:
    """95% intervals of ``Shares``; None where the share is None, known exactly, or cannot be bounded."""

    small_batch: Interval | None
    composition: Interval | None
    lag: Interval | None
    dropout: Interval | None
    propagation: Interval | None
    data_shift: Interval | None


@dataclass(frozen=True)
class Composition:
    """How alike the images of a batch are, from image means on the eval path.

    Attributes:
        intraclass_correlation: Correlation of two images of one batch, mean over channels; 0: drawn at random.
        design_effect: 1 + (batch size - 1) * intraclass correlation: so many times fewer images does a batch stand for.
        p_value: Smallest p of the layer's channels under random batches, corrected for all channels of all layers
            (Benjamini and Hochberg 1995); one-way analysis of variance.
    """

    intraclass_correlation: float
    design_effect: float
    p_value: float


@dataclass(frozen=True)
class Domains:
    """A layer called more than once per forward pass: how far the populations of its calls are apart.

    Attributes:
        mismatch: Mean over calls of D of the call's population against all calls together; eval path.
        interval: 95% interval of it.
    """

    mismatch: float
    interval: Interval | None


@dataclass(frozen=True)
class Impact:
    """What the model's output, on the eval path, changes if only this layer normalizes with its batch's statistics.

    Attributes:
        estimate: Relative L2 change of the outputs, to first order; None if no gradient reaches the layer.
        exact: The same, measured; None where it was not (all but the worst layers).
        loss: Measured change of the loss; None without a loss, or where not measured.
    """

    estimate: float | None
    exact: float | None
    loss: float | None


@dataclass(frozen=True)
class Backward:
    """Noise of the batch statistics of the backward pass, E[g] and E[g * xhat] (g: gradient of BN's output).

    Attributes:
        noise: Variance over micro-batches of E[g] and of E[g * xhat], summed, over the mean of g^2; mean over channels.
        interval: 95% interval of ``noise``.
        equivalent_batch_size: The n for which i.i.d. values give this noise, 2 / noise; None if it is 0.
    """

    noise: float
    interval: Interval | None
    equivalent_batch_size: float | None


@dataclass(frozen=True)
class Updates:
    """How real training steps moved the running statistics.

    Attributes:
        per_step: Updates of the running statistics per optimizer step.
        repeated: Those of them with the batch statistics of an earlier one of the same step: a forward pass that ran
            again, as in gradient checkpointing, not other data.
        rate: Weight that one step gave to its batch; None if it cannot be told.
        configured: The weight that momentum asks for, one update per step.
        drift: Distance that the running statistics moved in one step, in running standard deviations (root mean
            square over channels and steps).
    """

    per_step: float
    rate: float | None
    configured: float | None
    drift: float
    repeated: float = 0.0


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
        location: File and line in the user's code where the layer was assigned, where Python can tell.
        shares, share_intervals: Where the eval-path mismatch comes from; None where it could not be taken apart.
        composition: None with one image per batch, or where images could not be told apart.
        domains: Where ``calls_per_forward`` > 1.
        impact: None where every layer is fine, or no output could be compared.
        backward: With ``--gradients``.
        updates: With ``--train-steps``.
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
class Gap:
    """The gap between training and held-out data, in steps (Wu & Johnson 2021, arXiv 2105.07576).

    ``training_noise + inconsistency + generalization`` is ``held_out - training``.

    Attributes:
        measure: "loss" or "metric".
        training: Training batches as in training: batch statistics, dropout active.
        without_noise: Training batches, batch statistics, dropout and other random layers off.
        inference: Training batches, running statistics.
        held_out: Evaluation batches, running statistics; None without evaluation data.
        training_noise: ``without_noise - training``.
        inconsistency: ``inference - without_noise``: what batch against running statistics costs.
        generalization: ``held_out - inference``.
    """

    measure: Literal["loss", "metric"]
    training: float
    without_noise: float
    inference: float
    held_out: float | None
    training_noise: float
    inconsistency: float
    generalization: float | None


@dataclass(frozen=True)
class GradientAngle:
    """The parameters' gradient with batch statistics against the one with population statistics.

    Attributes:
        cosine: Of the two gradients of one micro-batch, mean over micro-batches.
        mean_cosine: Of the two gradients averaged over all micro-batches: the bias that averaging does not remove.
        batches: Micro-batches.
    """

    cosine: float
    mean_cosine: float
    batches: int


@dataclass(frozen=True)
class Summary:
    """Counts of layers, and the model as a whole.

    Attributes:
        shares: Mean over the layers whose mismatch was taken apart; None if there is none.
        gaps: For loss and metric, where given.
        gradient_angle: With ``--gradients``.
    """

    layers: int
    flagged: int
    undecided: int
    skipped: int
    output: Output
    shares: Shares | None = None
    gaps: tuple[Gap, ...] = ()
    gradient_angle: GradientAngle | None = None


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
class ExtraPass:
    """A measurement beyond the two paths: which, why it was run, and what it took."""

    name: str
    reason: str
    images: int
    seconds: float


@dataclass(frozen=True)
class Pool:
    """Per-image moments kept for regrouping images at random.

    Attributes:
        images: Images in the pool, drawn at random from those measured.
        bytes: Its size.
        regrouped: Micro-batches that were made of it.
    """

    images: int
    bytes: int
    regrouped: int


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
        passes: Measurements beyond the two paths, with their cost.
        pool: What the composition share is measured with; None if images could not be regrouped.
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
    passes: tuple[ExtraPass, ...] = ()
    pool: Pool | None = None


@dataclass(frozen=True)
class Verdict:
    """What one rule says of one layer, or of the model.

    Attributes:
        rule: Code, e.g. "BN201".
        layer: Name of the layer; None: the model or the run as a whole.
        message: What was found, a sentence.
        value, limit, unit: What was measured, and from where on it fails.
        remedy: What to do where the rule failed, a sentence; empty otherwise.
        reason: Why the rule was skipped; None otherwise.
        location: File and line in the user's code where the layer was assigned, where Python can tell.
    """

    rule: str
    cause: Cause
    layer: str | None
    outcome: Outcome
    severity: Severity
    message: str
    value: float | None
    limit: float | None
    unit: str
    remedy: str
    reason: str | None = None
    location: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """One cause, and all layers that it explains.

    Attributes:
        rule: Code of the rule that found it.
        layers: In network order; empty if it concerns the model as a whole.
        impact: Relative L2 change of the model's outputs if these layers normalize with their batch's statistics;
            None where it was not measured.
        message: What is wrong and how that is known.
        remedy: What to do first.
        consequences: Causes that follow from this one and are therefore no diagnoses of their own, with their layers
            in words, e.g. "propagation in 5 layers".
    """

    cause: Cause
    rule: str
    severity: Severity
    layers: tuple[str, ...]
    impact: float | None
    message: str
    remedy: str
    consequences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """Loss and metric, where given."""

    loss: float | None
    metric: float | None


@dataclass(frozen=True)
class Remedy:
    """What a free remedy gives on the evaluation batches, measured on a copy.

    Attributes:
        name: Which: "recalibrated", "evaluation statistics", "batch statistics", "larger batches".
        layers: Layers whose statistics were changed.
        before, after: Without and with it.
        control: What the gain is to be held against; None: ``before``.
        images: Evaluation images scored.
        detail: How it was done, a phrase, e.g. "statistics of 512 training images".
    """

    name: str
    layers: tuple[str, ...]
    before: Score
    after: Score
    control: Score | None
    images: int
    detail: str


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
    verdicts: tuple[Verdict, ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()
    remedies: tuple[Remedy, ...] = ()


# ---- Sweep: what ``bnprobe sweep`` returns


@dataclass(frozen=True)
class SweepPoint:
    """One layer on one path at one batch size.

    Attributes:
        batches: Micro-batches of this size.
        theory: D that i.i.d. images would give: n_eq at the scanned size grows in proportion to the batch size.
        standing: Against the layer's threshold: "passes" and "fails" where the whole interval does.
    """

    batch_size: int
    batches: int
    mismatch: float
    interval: Interval
    equivalent_batch_size: float | None
    theory: float
    standing: Literal["passes", "undecided", "fails"]


@dataclass(frozen=True)
class Smallest:
    """The smallest of the measured batch sizes from which on there is a pass; None: no measured size.

    Attributes:
        surely: The whole interval passes there.
        likely: The measured value passes there, and at every larger size.
    """

    surely: int | None
    likely: int | None


@dataclass(frozen=True)
class SweepLayer:
    """One layer at several batch sizes.

    Attributes:
        threshold: Equivalent batch size that it has to reach.
        flagged, undecided, note: As a scan at the scanned batch size says.
        eval: The eval path, every size from the same images; empty where it could not be measured.
        train: The train path at the scanned size and at the ``--train-sizes``, one measurement each.
        smallest: Of the eval path.
    """

    name: str
    kind: str
    channels: int
    threshold: float
    flagged: bool
    undecided: bool
    note: str | None
    eval: tuple[SweepPoint, ...]
    train: tuple[SweepPoint, ...]
    smallest: Smallest


@dataclass(frozen=True)
class Tracking:
    """How well running statistics of one rate follow: D of each micro-batch against those of before it.

    Attributes:
        mismatch: Mean over the second half of the recorded micro-batches.
        standard_error: Of ``mismatch``, by batch means, without what is no chance (the way from the start or from a
            shift); None with too few micro-batches.
    """

    mismatch: float
    standard_error: float | None


@dataclass(frozen=True)
class MomentumPoint:
    """One rate.

    Attributes:
        rate: Weight of the new batch, PyTorch's ``momentum``; None: cumulative average.
        effective_batches: (2 - rate) / rate micro-batches; None for the cumulative average.
        loaded: From the running statistics that the model was loaded with.
        converged: From statistics that have settled on the recorded micro-batches.
        shifted: As ``converged``, settled on the first half, with other data in the second; None without ``--shift``.
        recovery: Micro-batches after the shift until the mismatch is, and stays, within twice that without a shift;
            None without ``--shift``, or if that many were not recorded.
    """

    rate: float | None
    effective_batches: float | None
    loaded: Tracking
    converged: Tracking
    shifted: Tracking | None
    recovery: int | None


@dataclass(frozen=True)
class BestRates:
    """The rate that tracks best first, then those that it does not surely beat (95%)."""

    loaded: tuple[float | None, ...]
    converged: tuple[float | None, ...]
    shifted: tuple[float | None, ...]


@dataclass(frozen=True)
class MomentumCurve:
    """All rates, for one layer or for the mean over layers.

    Attributes:
        layer: Name; None: mean over the layers.
        momentum: What the layer is set to (None: cumulative average); for the mean over layers what all are set to.
        one_momentum: Whether ``momentum`` holds: False for the mean over layers that differ in it.
        points: By falling rate, the cumulative average last.
    """

    layer: str | None
    momentum: float | None
    one_momentum: bool
    points: tuple[MomentumPoint, ...]
    best: BestRates


@dataclass(frozen=True)
class MomentumSweep:
    """The running average replayed at several rates on recorded batch statistics of the train path.

    Attributes:
        batches: Micro-batches recorded.
        shift: Standard deviations of its channel added to every batch mean from the middle on; None: none.
        scale: Factor on the batch standard deviations from the middle on.
        dtype: In which the batch statistics were kept.
        bytes: Memory that they took.
        omitted: Layers that could not be replayed, and why.
    """

    batches: int
    batch_size: int
    shift: float | None
    scale: float
    dtype: str
    bytes: int
    omitted: tuple[SkippedLayer, ...]
    model: MomentumCurve
    layers: tuple[MomentumCurve, ...]


@dataclass(frozen=True)
class SweepReport:
    """The result of a sweep.

    Attributes:
        scan: The scan at the batch size of the data, which also gave the eval path at the other sizes.
        smallest: The smallest batch size at which every layer passes on the eval path.
        notes: Further facts that bear on the sweep, a sentence each.
        partial: True if Ctrl-C ended it early.
    """

    schema_version: int
    tool: Tool
    environment: Environment
    scan: Scan
    layers: tuple[SweepLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    smallest: Smallest
    momentum: MomentumSweep | None
    notes: tuple[str, ...]
    partial: bool
