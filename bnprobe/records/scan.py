"""What a scan and a lint return: what was run, what was measured of every layer, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

SCHEMA_VERSION = 1

DEFAULT_THRESHOLD = 32.0
"""Layers with a smaller equivalent batch size are flagged (docs/explanation/equations.md)."""

Interval = tuple[float, float | None]
"""Lower and upper end of a 95% interval; None: no upper end can be given."""

StopReason = Literal["requested", "decided", "max_batches", "data_exhausted", "interrupted", "failed"]

Cause = str
"""Why a layer is off, or may become so, e.g. "small_batch": the ``cause`` of one of ``bnprobe.rules.RULES``."""

Severity = Literal["error", "warning", "info"]
"""error: training and inference differ, or will; warning: likely a mistake, or harmless so far; info: a remark."""

Outcome = Literal["passed", "failed", "skipped"]

EXEMPT = "Exempt: "
"""The message of a verdict begins so if, and only if, it was skipped because the user exempts the layer."""


OMITTED_WHEN_EMPTY = frozenset({"statistics"})
"""Fields that a document leaves out where they are empty."""


class Record:
    """Base of all records. Where pydantic reads one, a key that is no field is an error."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True)
class Histogram(Record):
    """Counts of values between consecutive edges; the outer bins take what lies beyond them."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


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
    """Eval-path mismatch of one layer at one batch size; all sizes are measured on the same samples."""

    batch_size: int
    batches: int
    mismatch: float
    interval: Interval
    equivalent_batch_size: float | None


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
        location: File and line in the user's code where the layer was assigned, where Python can tell.
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
    """A layer that could not be judged, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Verdict(Record):
    """What one rule says about one layer, or about the model.

    Attributes:
        rule: Code, e.g. "BN201".
        cause: What the rule looks for, e.g. "small_batch".
        layer: Name of the layer; None: the model or the run as a whole.
        message: What was found, a sentence.
        value, limit, unit: What was measured, the limit from which on the rule fails, and the unit of both.
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
class Diagnosis(Record):
    """One root cause, and all layers that it explains.

    Attributes:
        cause: What is wrong, e.g. "small_batch".
        rule: Code of the rule that found it.
        layers: In network order; empty if it concerns the model as a whole.
        impact: Relative L2 change of the model's outputs if these layers normalize with batch statistics; None where
            it was not measured.
        message: What is wrong, and how that is known.
        remedy: What to do first.
        consequences: Causes that follow from this one and are therefore not diagnosed separately, with their layers,
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
class Estimate(Record):
    """A mean and its 95% interval; None where there is none, e.g. with one value, or where all values are the same."""

    mean: float
    interval: Interval | None


@dataclass(frozen=True)
class Score(Record):
    """Loss and metric; None where not given."""

    loss: float | None
    metric: float | None


FreeRemedy = Literal["recalibrated", "evaluation statistics", "batch statistics", "instance statistics"]
"""What a scan tries without training: running statistics of the training data, or of the held-out data; the statistics
of every batch, or of every sample."""

FREE_REMEDIES: tuple[FreeRemedy, ...] = get_args(FreeRemedy)


@dataclass(frozen=True)
class Remedy(Record):
    """The effect of a remedy that needs no training, measured without changing the model.

    Attributes:
        name: A ``FreeRemedy``, or "batch statistics, batches of N".
        layers: Layers whose statistics were changed.
        before, after: Scores without and with the remedy.
        control: The baseline that the gain is to be compared with; None: ``before``.
        images: Number of samples scored.
        detail: How it was done, a phrase, e.g. "statistics of 512 training samples".
        loss_change, metric_change: ``after`` minus the baseline, paired by sample where the user's function is a mean
            over samples, otherwise by batch.
        scored_on: Where the samples come from; without held-out data, training samples that the statistics were not
            taken from.
    """

    name: str
    layers: tuple[str, ...]
    before: Score
    after: Score
    control: Score | None
    images: int
    detail: str
    loss_change: Estimate | None = None
    metric_change: Estimate | None = None
    scored_on: Literal["held-out", "training"] = "held-out"


@dataclass(frozen=True)
class PathValues(Record):
    """A loss or metric on both paths, mean over micro-batches."""

    train: float
    eval: float


@dataclass(frozen=True)
class Output(Record):
    """How far the two paths are apart at the model's output, on the same samples.

    Attributes:
        relative_l2: ||y_train - y_eval|| / ||y_eval|| over all outputs; None if not finite or no tensors.
        argmax_changed: Fraction of samples (or positions) whose largest score is another one; None if no output is a
            table of scores.
        kl_divergence: Mean KL(eval || train) of the softmax of the scores, in nats; None likewise.
        loss, metric: Values of the user's functions; None where not given.
        note: Why a figure is missing, where that is not obvious.
        repeat: Relative L2 distance of two eval-path passes over the same samples: 0 unless the model is random at
            inference. None if not measured.
        predicts_labels: Whether the largest scores are the labels of the batch surely more often than chance; without
            that nothing says that they are scores of classes. None without labels.
        batch_dependence: Relative L2 distance of the eval path's outputs for the same samples in other batches: 0 where
            samples are independent. None if not measured: it is where a layer uses batch statistics at inference.
    """

    relative_l2: float | None
    argmax_changed: float | None
    kl_divergence: float | None
    loss: PathValues | None
    metric: PathValues | None
    note: str | None = None
    repeat: float | None = None
    batch_dependence: float | None = None
    predicts_labels: bool | None = None


@dataclass(frozen=True)
class Gap(Record):
    """The gap between training and held-out data, step by step (Wu & Johnson 2021, arXiv 2105.07576).

    ``training_noise + inconsistency + generalization`` is ``held_out - training``.

    Attributes:
        measure: "loss" or "metric".
        training: Training batches as in training: batch statistics, dropout active.
        without_noise: Training batches with batch statistics, dropout and other random layers off.
        inference: Training batches with running statistics.
        held_out: Held-out batches with running statistics; None without held-out data.
        training_noise: ``without_noise - training``.
        inconsistency: ``inference - without_noise``: the change from batch to running statistics.
        generalization: ``held_out - inference``.
        goal: "min" if smaller values are better, "max" if larger ones are.
        training_noise_interval, inconsistency_interval, generalization_interval: 95% intervals; None where none can be
            given.
        samples, held_out_samples: Samples that the figures are means over.
    """

    measure: Literal["loss", "metric"]
    training: float
    without_noise: float
    inference: float
    held_out: float | None
    training_noise: float
    inconsistency: float
    generalization: float | None
    goal: Literal["max", "min"] = "min"
    training_noise_interval: Interval | None = None
    inconsistency_interval: Interval | None = None
    generalization_interval: Interval | None = None
    samples: int = 0
    held_out_samples: int | None = None


@dataclass(frozen=True)
class Chance(Record):
    """What the outputs know about their own samples: a loss or metric against that of outputs of other samples.

    Attributes:
        measure: "loss" or "metric".
        training, inference: The value with the outputs of other samples, and with the own ones, on batch statistics and
            on running statistics; None where it could not be measured.
    """

    measure: Literal["loss", "metric"]
    training: ChanceValues | None
    inference: ChanceValues | None


@dataclass(frozen=True)
class ChanceValues(Record):
    """One mode.

    Attributes:
        own: With every sample's own output.
        other: With the output of another sample.
        change: ``own`` minus ``other``, paired by micro-batch.
    """

    own: float
    other: float
    change: Estimate


@dataclass(frozen=True)
class GradientAngle(Record):
    """The parameters' gradient with batch statistics against the one with population statistics.

    Attributes:
        cosine: Cosine of the two gradients of one micro-batch, mean over micro-batches.
        mean_cosine: Cosine of the two gradients averaged over all micro-batches; below 1 there is a bias, which
            averaging does not remove.
        batches: Number of micro-batches.
    """

    cosine: float
    mean_cosine: float
    batches: int


@dataclass(frozen=True)
class Summary(Record):
    """Counts of layers, and the model as a whole.

    Attributes:
        shares: Mean over the layers whose mismatch was decomposed; None if there is none.
        gaps: One for the loss and one for the metric, where given.
        gradient_angle: With ``--gradients``.
        chance: One for the loss and one for the metric, where outputs of other samples could be scored.
    """

    layers: int
    flagged: int
    undecided: int
    skipped: int
    output: Output
    shares: Shares | None = None
    gaps: tuple[Gap, ...] = ()
    gradient_angle: GradientAngle | None = None
    chance: tuple[Chance, ...] = ()


@dataclass(frozen=True)
class SelfCheck(Record):
    """One emulated step compared with the same micro-batches run one by one.

    Attributes:
        output_error: Relative L2 difference of the outputs.
        statistic_error: Largest relative difference of a layer's normalized statistics.
        tolerance: The largest difference that rounding explains for this model; above it emulation is not used.
        passed: Whether emulation can be trusted.
        first_layer: The first layer, in call order, that differs; None where the check passed.
        paths: The paths that were compared. With "steady" among them, training draws random numbers: the step was
            compared without random layers, and on "train" it was whether a micro-batch depends on the others.
        float64: A copy of the model was compared in float64, since rounding hides differences in its own dtype.
    """

    output_error: float
    statistic_error: float
    tolerance: float
    passed: bool
    first_layer: str | None
    paths: tuple[Literal["train", "steady", "eval"], ...] = ("train", "eval")
    float64: bool = False


@dataclass(frozen=True)
class ExtraPass(Record):
    """A measurement beyond the two paths: its name, why it was run, and its cost."""

    name: str
    reason: str
    images: int
    seconds: float


@dataclass(frozen=True)
class Pool(Record):
    """Moments of single samples, kept for regrouping samples at random.

    Attributes:
        images: Samples in the pool, drawn at random from those measured.
        bytes: Its size.
        regrouped: Number of micro-batches that were formed from it.
    """

    images: int
    bytes: int
    regrouped: int


@dataclass(frozen=True)
class Scan(Record):
    """What was run.

    Attributes:
        model: How the model was named, e.g. "model.py:load_model".
        data: Where the micro-batches came from, in words.
        synthetic: Inputs were generated from ``--input-shape``.
        checkpoint: The weights file, where one was given.
        batch_size: Samples in a micro-batch; where they differ in size, their mean, rounded.
        batches: Micro-batches measured on both paths.
        batches_requested: ``--batches``, where given.
        images: Samples measured.
        left_out: Samples of a partial last batch that was not measured.
        emulated: Several micro-batches ran together as one physical batch, with statistics per micro-batch
            (docs/explanation/emulation.md).
        physical_batch: Samples that ran at once.
        emulation: Why emulation was or was not used, one sentence.
        self_check: The comparison behind that decision; None if none was needed.
        seed: Seed of torch, numpy and random during the scan.
        device: E.g. "cpu", "cuda:0".
        dtype: Of the model's parameters, e.g. "float32".
        autocast: The autocast dtype, where used.
        stopped: Why no more batches were drawn.
        partial: True if Ctrl-C, or an error in the user's loader or model, ended the scan early.
        seconds: Wall time of the measurement.
        notes: Further facts that affect the result, a sentence each.
        passes: Measurements beyond the two paths, with their cost.
        pool: What the composition share was measured with; None if the samples could not be regrouped.
        unselected: Layers that ``--include`` and ``--exclude`` leave out of the report, in network order.
        size_range: Fewest and most samples of a micro-batch, where they differ.
        held_out: Where the held-out data came from, in words; None without any.
        held_out_images: Held-out samples measured.
        sample: What a sample is, a noun: "image", "row", "graph" or "sequence"; "sample" where that is not known.
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
    unselected: tuple[str, ...] = ()
    size_range: tuple[int, int] | None = None
    held_out: str | None = None
    held_out_images: int | None = None
    sample: str = "sample"


@dataclass(frozen=True)
class Tool(Record):
    """The program that wrote the document, and its version."""

    name: str
    version: str


@dataclass(frozen=True)
class Environment(Record):
    """The machine and the software it ran on."""

    python: str
    torch: str
    platform: str
    device_name: str
    threads: int


@dataclass(frozen=True)
class Report(Record):
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


@dataclass(frozen=True)
class LintReport(Record):
    """The result of a lint.

    Attributes:
        model: How the model was named, e.g. "model.py:load_model".
        layers: Number of layers judged.
        verdicts: Of the rules that need the model alone.
        diagnoses: The failed ones, grouped by root cause, the worst first.
        skipped: Layers that could not be judged.
    """

    tool: Tool
    model: str
    layers: int
    verdicts: tuple[Verdict, ...]
    diagnoses: tuple[Diagnosis, ...]
    skipped: tuple[SkippedLayer, ...] = ()
    schema_version: int = SCHEMA_VERSION
