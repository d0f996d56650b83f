"""One optimizer step: forward and backward of its micro-batches, gradient clipping, and the step itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.loading.returned import trainable_loss
from bnprobe.measure.batch import copy_tensors, to_device
from bnprobe.measure.session import casting, model_code
from bnprobe.measure.training_copy import require_gradients, training_code
from bnprobe.training.job import Job, bad_gradient
from bnprobe.training.replicas import Replicas

_SMALL = 2**14
"""Parameters of up to so many values show by their gradients whether a backward pass met NaN or Inf: it passes through
the layers that they belong to. To read all gradients takes up to a twentieth of a step on a CPU."""

_FIRST = "in training step {} (the first is 1)"


@dataclass(frozen=True)
class Taken:
    """The result of a step.

    Attributes:
        gradient_norm: L2 norm of the gradient before clipping; None if nothing is clipped.
        skipped: Whether the float16 scaler skipped the step because the gradients were not finite.
        problem: Why no step could be taken, as a clause; None if one was taken.
    """

    gradient_norm: float | None = None
    skipped: bool = False
    problem: str | None = None


class Stepper:
    """Takes the optimizer steps of a job.

    Args:
        job: The run's settings.
        replicas: The job's model, in this process and others.

    Attributes:
        optimizer, schedule: As made by the job; the schedule may be None.
        scaler: Gradient scaler; active only for float16.
    """

    def __init__(self, job: Job, replicas: Replicas) -> None:
        self._job, self._replicas = job, replicas
        self._all = list(job.model.parameters())
        self._parameters = [each for each in self._all if each.requires_grad]
        self.optimizer = job.make_optimizer(self._parameters)
        self.schedule = None if job.make_schedule is None else job.make_schedule(self.optimizer)
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.autocast is torch.float16)
        small = [each for each in self._parameters if each.numel() <= _SMALL]
        self._normed = self._parameters if job.spec.clip_norm is not None or not small else small
        self._norm: Tensor | None = None  # of their gradient, before clipping

    @property
    def rate(self) -> float:
        """Learning rate of the first parameter group; NaN if the optimizer does not tell."""
        groups = getattr(self.optimizer, "param_groups", None) or [{}]
        return float(groups[0].get("lr", math.nan))

    def losses(self, group: Sequence[Any], step: int) -> float:
        """Run forward and backward of a step's micro-batches, and return their mean loss.

        The gradient is that of the mean over the micro-batches of all processes; each micro-batch has the same weight.

        Raises:
            UserCodeError, UsageError, DeviceError: The user's loss failed; the message names the step.
        """
        self.forget_gradients()
        values = [
            self._one(batch, len(group), position == len(group) - 1, step) for position, batch in enumerate(group)
        ]
        if step == 1:
            require_gradients(self._parameters)
        self.scaler.unscale_(self.optimizer)
        # Begun before the losses are waited for: otherwise a GPU would be idle meanwhile.
        self._norm = nn.utils.get_total_norm([each.grad for each in self._normed if each.grad is not None])
        return sum(value.item() for value in values) / len(values)

    def apply(self, step: int) -> Taken:
        """Clip the gradients of ``losses`` and take the step, if the gradients are finite.

        Where nothing is clipped, NaN in the gradient of a large parameter alone shows in the next loss.
        """
        assert self._norm is not None  # of losses
        norm, limit = float(self._norm), self._job.spec.clip_norm
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            return Taken(problem=_not_finite(self._job.model))
        if limit is not None and math.isfinite(norm):
            nn.utils.clip_grads_with_norm_(self._parameters, limit, self._norm)
        scale = self.scaler.get_scale()
        with model_code(f"calling step() of {type(self.optimizer).__name__} {_FIRST.format(step)}"):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < scale
        if self.schedule is not None and not skipped:
            with model_code(f"calling step() of {type(self.schedule).__name__} {_FIRST.format(step)}"):
                self.schedule.step()
        return Taken(None if limit is None else norm, skipped)

    def forget_gradients(self) -> None:
        """Clear the gradients of the previous step."""
        for parameter in self._all:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer, schedule and scaler."""
        schedule = None if self.schedule is None else self.schedule.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "schedule": schedule, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])

    def _one(self, batch: Any, of: int, last: bool, step: int) -> Tensor:
        job, place = self._job, _FIRST.format(step)
        batch = copy_tensors(to_device(batch, job.device))
        with self._replicas.without_sync(last):
            with _border(f"calling loss(model, batch) {place}", job), casting(job.device, job.autocast):
                returned = job.loss(self._replicas.callee, batch)
            value = trainable_loss(job.loss, returned)
            self._replicas.require_called()
            border = _border(f"running backward() from loss(model, batch) {place}", job)
            with border, self._replicas.averaging(last):
                self.scaler.scale(value if of == 1 else value / of).backward()
        return value.detach()


def _border(call: str, job: Job) -> Any:
    return training_code(call, "Training the model", job.device)


def _not_finite(model: nn.Module) -> str:
    name = bad_gradient(model)
    if name is None:
        return "the norm of the gradient is too large for its dtype"
    return f"the loss is finite, but the gradient is not; in the backward pass NaN or Inf first appears in {name}"
