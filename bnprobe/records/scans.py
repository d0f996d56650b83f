"""What was run, and the model as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bnprobe.records.basics import StopReason
from bnprobe.records.layers import Shares


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
        unselected: Layers that ``--include``/``--exclude`` leave out of the report, in network order.
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
