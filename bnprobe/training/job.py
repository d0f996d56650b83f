"""What a run trains and how, and what is watched meanwhile: clipping, the best weights so far, divergence."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bnprobe.config.spec import RenormSpec, TrainSpec
from bnprobe.distributed import World
from bnprobe.errors import UsageError
from bnprobe.loading.data import BatchSource
from bnprobe.loading.model import BatchFunction
from bnprobe.measure.batch import copy_tensors, is_finite, to_device
from bnprobe.measure.hooks import noting_non_finite
from bnprobe.measure.restore import preserved_random_state
from bnprobe.measure.session import casting, model_code
from bnprobe.nn.limits import POSITION
from bnprobe.records import ROOT, Curve, Ending, Goal, Measure, Score
from bnprobe.training.data import KeptEpochs, steps_per_epoch

Fractions = tuple[float, float]
"""Fractions of r and of d that were clipped in a step."""

_PART = 10


class ClippedAtEnd:
    """Means over the last tenth of the steps taken.

    Args:
        steps: Upper limit on the number of steps.
    """

    def __init__(self, steps: int) -> None:
        self._last: deque[Fractions] = deque(maxlen=_tenth(steps))

    def add(self, fractions: Fractions | None) -> None:
        """Add the fractions of one step; None if there is nothing to clip."""
        if fractions is not None:
            self._last.append(fractions)

    def mean(self, steps: int) -> Fractions | None:
        """Mean over the last tenth of ``steps`` steps; None if nothing was added."""
        last = list(self._last)[-_tenth(steps) :]
        if not last:
            return None
        r, d = zip(*last, strict=True)
        return sum(r) / len(r), sum(d) / len(d)

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain types."""
        return {"last": list(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._last.clear()
        self._last.extend((r, d) for r, d in state["last"])


def _tenth(steps: int) -> int:
    return max(1, steps // _PART)


_POINTS = 50
"""Points of a curve of each kind."""


class CurveOfRun:
    """The losses of a run, averaged over as many steps each as leave fifty points, and its evaluations.

    Args:
        length: Of the run.
    """

    def __init__(self, length: Length) -> None:
        self._every = math.ceil(length.steps / _POINTS)
        self._scored_every = math.ceil(length.steps / length.evaluate_every / _POINTS)
        self._last = length.steps
        self._pending: list[float] = []
        self._losses: list[tuple[int, float | None]] = []
        self._scores: list[tuple[int, float | None, float | None]] = []
        self._scored = 0

    def add(self, step: int, loss: float) -> None:
        """Add the training loss of a step."""
        self._pending.append(loss)
        if len(self._pending) == self._every or step == self._last:
            self._end(step)

    def note(self, step: int, score: Score | None) -> None:
        """Note the score after a step, or at the start; the last one always, the others at regular intervals."""
        if score is None:
            return
        if self._scored % self._scored_every == 0 or step == self._last:
            self._scores.append((step, _finite(score.loss), _finite(score.metric)))
        self._scored += 1

    def curve(self, step: int) -> Curve:
        """The curve of a run that ends after this step."""
        if self._pending:
            self._end(step)
        scores = [tuple(column) for column in zip(*self._scores, strict=True)] or [(), (), ()]
        return Curve(tuple(at for at, _ in self._losses), tuple(loss for _, loss in self._losses), *scores)

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain types."""
        return {"pending": self._pending, "losses": self._losses, "scores": self._scores, "scored": self._scored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._pending = [float(loss) for loss in state["pending"]]
        self._losses = [(step, loss) for step, loss in state["losses"]]
        self._scores = [(step, loss, metric) for step, loss, metric in state["scores"]]
        self._scored = state["scored"]

    def _end(self, step: int) -> None:
        self._losses.append((step, _finite(statistics.fmean(self._pending))))
        self._pending = []


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


EXPLODED = 1000.0
"""Multiple of the usual loss above which the loss has exploded, if it stays there."""

USUAL_STEPS = 10
"""Steps at the start whose median gives the usual loss."""

LASTING = 5
"""Steps in a row that make a divergence: one bad batch does not."""

MOST_SKIPPED = 50
"""Steps in a row without finite gradients after which float16 gives up: the scale has then shrunk by 2^-50."""

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


class DivergenceGuard:
    """Watches the losses of a run.

    Training has diverged if the loss is NaN or Inf, or if its absolute value stays above ``EXPLODED`` times the usual
    one for ``LASTING`` steps. The usual value is the median of the first ``USUAL_STEPS`` steps, but at least 1: the
    loss of a model that has learned its data is near 0, and a thousand times that is not an explosion.
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._high = 0
        self._skipped = 0

    def of_loss(self, loss: float) -> str | None:
        """What is wrong with the loss of a step, as a clause; None if it is fine."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if len(self._first) < USUAL_STEPS:
            self._first.append(abs(loss))
            return None
        usual = statistics.median(self._first)
        self._high = self._high + 1 if abs(loss) > EXPLODED * max(1.0, usual) else 0
        if self._high < LASTING:
            return None
        return f"the loss has exploded: {loss:.3g}, up from {usual:.3g} in the first {USUAL_STEPS} steps"

    def of_step(self, skipped: bool) -> str | None:
        """What is wrong after a step, as a clause; None if nothing is.

        Args:
            skipped: Whether the float16 scaler skipped the step because the gradients were not finite.
        """
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped < MOST_SKIPPED:
            return None
        return f"the gradients were NaN or Inf for {MOST_SKIPPED} steps in a row, at every float16 loss scale"

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain types."""
        return {"first": list(self._first), "high": self._high, "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._first, self._high, self._skipped = list(state["first"]), state["high"], state["skipped"]


def first_non_finite(
    model: nn.Module, loss: BatchFunction, group: Sequence[Any], device: torch.device, autocast: torch.dtype | None
) -> str | None:
    """Name of the first norm layer whose input is NaN or Inf, found by repeating the forward passes of a step.

    All passes run, whatever is found: a layer that waits for other processes must be called in each of them.
    """
    norms = [(name or ROOT, module) for name, module in model.named_modules() if isinstance(module, _NORMS)]
    with preserved_random_state(), noting_non_finite(norms) as found, casting(device, autocast):
        for batch in group:
            with model_code("calling loss(model, batch) once more, to find where it is NaN or Inf"):
                loss(model, copy_tensors(to_device(batch, device)))
    return found[0] if found else None


def bad_gradient(model: nn.Module) -> str | None:
    """Name of the last parameter whose gradient is NaN or Inf, which the backward pass reaches first."""
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    return next((name for name, gradient in reversed(named) if not bool(torch.isfinite(gradient).all())), None)


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
        kept: What other runs on the same data have read; None: nothing is kept.
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
    measure: Measure
    goal: Goal
    renorm: RenormSpec | None
    arm: str
    kept: KeptEpochs | None = None


@dataclass(frozen=True)
class TrainingOutcome:
    """The result of training; the fields up to ``clipped_d`` are those of ``records.Run``.

    Attributes:
        weights: The kept weights on the CPU, by their names in the model's state_dict.
        curve: As in ``records.Run``.
    """

    steps: int
    best_step: int
    ending: Ending
    note: str
    seconds: float
    clipped_r: float | None
    clipped_d: float | None
    weights: dict[str, Tensor]
    curve: Curve | None = None


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


def check_job(job: Job) -> None:
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


class Keeper:
    """Keeps the weights with the best evaluation; without evaluations, the last weights that are finite.

    The start counts as the evaluation of step 0. Of equal evaluations the earlier one is kept.

    Args:
        measure, goal: What decides. A loss is minimized; for a metric ``goal`` gives the direction.
        patience: Evaluations without improvement after which training stops; None: never.

    Attributes:
        step: Step of the kept weights.
        weights: The kept weights, on the CPU.
    """

    def __init__(self, measure: Measure, goal: Goal, patience: int | None = None) -> None:
        self._measure = measure
        self._sign = 1.0 if measure == "metric" and goal == "max" else -1.0
        self._patience = patience
        self._best: float | None = None
        self._since = 0
        self.step = 0
        self.weights: dict[str, Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether there were ``patience`` evaluations without improvement."""
        return self._patience is not None and self._since >= self._patience

    @property
    def chose(self) -> bool:
        """Whether the weights were chosen by an evaluation."""
        return self._best is not None

    def note(self, step: int, model: nn.Module, score: Score | None) -> None:
        """Record the evaluation after a step; ``score`` is None if nothing can be evaluated."""
        value = getattr(score, self._measure, None)
        if value is None or not math.isfinite(value):
            self._since += int(score is not None)
            if self._best is None:
                self.keep_last(step, model)
        elif self._best is None or self._sign * value > self._sign * self._best:
            self._best, self._since = value, 0
            self._keep(step, weights_of(model))
        else:
            self._since += 1

    def keep_last(self, step: int, model: nn.Module) -> None:
        """Keep the weights if they are finite, or if none are kept yet."""
        weights = weights_of(model)
        if not self.weights or is_finite(weights.values()):
            self._keep(step, weights)

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain types."""
        return {"best": self._best, "since": self._since, "step": self.step, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._best, self._since = state["best"], state["since"]
        self._keep(state["step"], state["weights"])

    def _keep(self, step: int, weights: dict[str, Tensor]) -> None:
        self.step, self.weights = step, weights


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the tensors of a model's state_dict, on the CPU, without the position of a schedule of Batch Renorm.

    The best weights are given back with the limits at the end of the run.
    """
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in tensors.items()
        if name.rpartition(".")[2] != POSITION
    }
