"""What a training run is asked to do, and what comes of it."""

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
"""Optimizer steps of a run where nobody says."""

EVALUATIONS = 10
"""Evaluations of a run where nobody says, besides that of the start."""


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        model: Trained in place; its flags are those of training as the user sets them: what is in eval mode beside a
            root in train mode stays so.
        loss: ``loss(model, batch)``, a tensor of one number.
        source: Micro-batches of the size to train with.
        spec: How training goes.
        seed: Of the data's order and of what the model draws.
        device: Where to run.
        autocast: Dtype of the forward passes; gradients are scaled where it is float16.
        make_optimizer: Of the trainable parameters.
        make_schedule: Of the optimizer; None: the learning rate stays as it is.
        score: On evaluation batches set apart for choosing, by ``evaluate``: training flags and random state come back.
            None: the last weights are kept.
        measure, goal: Which weights are best; a loss is best small.
        renorm: Limits of the Batch Renorm layers over the run; None: they are the layers' own.
        arm: What the run is called in the log.
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
    """What training gave; the fields up to ``clipped_d`` are those of ``records.Run``.

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
    """Optimizer steps of a run, and between its evaluations."""

    steps: int
    evaluate_every: int

    def evaluates(self, step: int) -> bool:
        """Whether the weights after this step are evaluated: every so often, and at the end."""
        return step % self.evaluate_every == 0 or step == self.steps


def length_of(spec: TrainSpec, source: BatchSource, world: World) -> Length:
    """How long a run is.

    Raises:
        UsageError: Steps and epochs are both given, or the length of an epoch is not known.
    """
    if spec.steps is not None and spec.epochs is not None:
        raise UsageError(
            f"Both --steps {spec.steps} and --epochs {spec.epochs} are given (train.steps, train.epochs); give one."
        )
    steps = spec.steps or DEFAULT_STEPS
    if spec.epochs is not None:
        steps = spec.epochs * steps_per_epoch(source, spec.accumulate, world)
    return Length(steps, spec.evaluate_every or max(1, steps // EVALUATIONS))


def check(job: Job) -> None:
    """Refuse what cannot work, before anything is trained.

    Raises:
        UsageError: Nothing to train, or ``patience`` without evaluations.
    """
    if not any(parameter.requires_grad for parameter in job.model.parameters()):
        raise UsageError("There are no parameters to train: every parameter has requires_grad=False.")
    if job.spec.patience is not None and job.score is None:
        raise UsageError(
            "--patience (train.patience) stops training when evaluations get no better, and there is nothing to"
            " evaluate: give evaluation data (load_eval_data or eval_data) with a loss or metric."
        )
