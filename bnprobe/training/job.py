"""A training run: its settings, length and outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnprobe.distributed import World
from bnprobe.errors import UsageError
from bnprobe.loading.data import BatchSource
from bnprobe.records import Ending, Score
from bnprobe.spec import RenormSpec, TrainSpec
from bnprobe.training.feed import steps_per_epoch
from bnprobe.usercode import BatchFunction

DEFAULT_STEPS = 500
"""Default number of optimizer steps of a run."""

EVALUATIONS = 10
"""Default number of evaluations of a run, not counting the one at the start."""


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        model: Trained in place, with the user's training flags: submodules in eval mode stay so if the root is in
            train mode.
        loss: ``loss(model, batch)``, which returns a tensor of one number.
        source: Micro-batches of the size to train with.
        spec: Settings of the training.
        seed: Seed of the data's order and of the model's random numbers.
        device: Device to run on.
        autocast: Dtype of the forward passes; gradients are scaled if it is float16.
        make_optimizer: Makes the optimizer for the trainable parameters.
        make_schedule: Makes the schedule for the optimizer; None: the learning rate is constant.
        score: Scores the model with ``evaluate`` on the held-out batches for model selection, and restores training
            flags and random state. None: the last weights are kept.
        measure, goal: What decides which weights are best, and in which direction; a loss is always minimized.
        renorm: Limits of the Batch Renorm layers over the run; None: the layers' own.
        arm: Name of the run in the log.
    """

    model: nn.Module
    loss: BatchFunction
    source: BatchSource
    spec: TrainSpec
    seed: int
    device: torch.device
    autocast: torch.dtype | None
    make_optimizer: Callable[[list[nn.Parameter]], Any]
    make_schedule: Callable[[Any], Any] | None
    score: Callable[[nn.Module], Score] | None
    measure: Literal["metric", "loss"]
    goal: Literal["max", "min"]
    renorm: RenormSpec | None
    arm: str


@dataclass(frozen=True)
class Outcome:
    """The result of training; the fields up to ``clipped_d`` are those of ``records.Run``.

    Attributes:
        weights: The kept weights on the CPU, by their names in the model's state_dict.
    """

    steps: int
    best_step: int
    ending: Ending
    note: str
    seconds: float
    clipped_r: float | None
    clipped_d: float | None
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Length:
    """Optimizer steps of a run, and steps between its evaluations."""

    steps: int
    evaluate_every: int

    def evaluates(self, step: int) -> bool:
        """Whether the weights after this step are evaluated: at regular intervals, and at the end."""
        return step % self.evaluate_every == 0 or step == self.steps


def length_of(spec: TrainSpec, source: BatchSource, world: World) -> Length:
    """The length of a run.

    Raises:
        UsageError: Steps and epochs are both given, or the length of an epoch is unknown.
    """
    if spec.steps is not None and spec.epochs is not None:
        raise UsageError(
            f"--steps {spec.steps} and --epochs {spec.epochs} exclude each other (train.steps, train.epochs); give one."
        )
    steps = spec.steps or DEFAULT_STEPS
    if spec.epochs is not None:
        steps = spec.epochs * steps_per_epoch(source, spec.accumulate, world)
    return Length(steps, spec.evaluate_every or max(1, steps // EVALUATIONS))


def check(job: Job) -> None:
    """Reject a job that cannot work, before anything is trained.

    Raises:
        UsageError: There is nothing to train, or ``patience`` is given without evaluations.
    """
    if not any(parameter.requires_grad for parameter in job.model.parameters()):
        raise UsageError("There is nothing to train: every parameter has requires_grad=False.")
    if job.spec.patience is not None and job.score is None:
        raise UsageError(
            "--patience (train.patience) stops training when the held-out score no longer improves, but there is no"
            " such score: give held-out data (load_eval_data or eval_data) with a loss or metric."
        )
