"""What is measured at the model's output: the distance of the two modes, and what it does to loss and metric."""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.records.base import Estimate, Goal, Interval, Measure, Record


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
        without_noise: Training batches with batch statistics, all else in eval mode: no dropout, and no heads or losses
            of training alone.
        inference: Training batches with running statistics.
        held_out: Held-out batches with running statistics; None without held-out data.
        training_noise: ``without_noise - training``.
        inconsistency: ``inference - without_noise``: the change from batch to running statistics.
        generalization: ``held_out - inference``.
        goal: "min" if smaller values are better, "max" if larger ones are.
        goal_is_known: False for a metric of which nobody said so: then "max" is a guess.
        training_noise_interval, inconsistency_interval, generalization_interval: 95% intervals; None where none can be
            given.
        samples, held_out_samples: Samples that the figures are means over.
    """

    measure: Measure
    training: float
    without_noise: float
    inference: float
    held_out: float | None
    training_noise: float
    inconsistency: float
    generalization: float | None
    goal: Goal = "min"
    training_noise_interval: Interval | None = None
    inconsistency_interval: Interval | None = None
    generalization_interval: Interval | None = None
    samples: int = 0
    held_out_samples: int | None = None
    goal_is_known: bool = True


@dataclass(frozen=True)
class Chance(Record):
    """What the outputs know about their own samples: a loss or metric against that of outputs of other samples.

    Attributes:
        measure: "loss" or "metric".
        training, inference: The value with the outputs of other samples, and with the own ones, on batch statistics and
            on running statistics; None where it could not be measured.
    """

    measure: Measure
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
