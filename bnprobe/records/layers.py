"""One layer: what was measured of it, and where its mismatch comes from."""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.records.basics import Interval
from bnprobe.records.measurements import BatchSizePoint, CallMeasurement, PathMeasurement


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
