"""r_max and d_max of Batch Renorm, and how they rise over a training run (Ioffe 2017, section 4)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.errors import StateError, UsageError

POSITION = "renorm_schedule"
"""Name of a schedule's position among the tensors of a layer's state_dict."""

FORGOTTEN = 200
"""Training passes at the first step of a schedule after which ``advance`` seems to have been forgotten."""


class Limits:
    """r_max and d_max, which may change between steps (internal: set them on the layer or use a schedule).

    A compiled layer reads the tensors, since a changed Python number would recompile it at every step of a schedule.

    Attributes:
        r_max_tensor, d_max_tensor: The limits as float64 tensors of shape () on the CPU.

    Raises:
        UsageError: r_max is below 1 or d_max below 0, or one of them is not finite.
    """

    def __init__(self, r_max: float, d_max: float) -> None:
        self.r_max_tensor = torch.ones((), dtype=torch.float64, device="cpu")
        self.d_max_tensor = torch.zeros((), dtype=torch.float64, device="cpu")
        self.r_max, self.d_max = r_max, d_max

    @property
    def r_max(self) -> float:
        """r is clipped to [1 / r_max, r_max]."""
        return self._r_max

    @r_max.setter
    def r_max(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 1):
            raise UsageError(
                f"r_max is {value}, but must be a finite number of at least 1: r is kept in [1/r_max, r_max]."
            )
        self._r_max = float(value)
        self.r_max_tensor.fill_(self._r_max)

    @property
    def d_max(self) -> float:
        """d is clipped to [-d_max, d_max]."""
        return self._d_max

    @d_max.setter
    def d_max(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(
                f"d_max is {value}, but must be a finite number of at least 0: d is kept in [-d_max, d_max]."
            )
        self._d_max = float(value)
        self.d_max_tensor.fill_(self._d_max)

    def read(self, training: bool) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """(r_max, d_max) for a layer's forward: tensors while it is being compiled, else numbers."""
        if torch.compiler.is_compiling():
            return self.r_max_tensor, self.d_max_tensor
        return self._r_max, self._d_max


class RenormSchedule(Limits):
    """r_max and d_max over a training run, in the shape of Ioffe 2017, section 4.

    During the warm-up the limits are 1 and 0, which is plain BN. Then each rises linearly to its final value and stays
    there. Attached layers read the schedule at every forward pass; call ``advance`` after every optimizer step.

    The position is saved in the state_dict of every attached layer, as the tensor ``renorm_schedule``, and comes back
    when that is loaded, before or after ``attach``. Inference does not use it: ``bnprobe.deployable_state`` leaves it
    out.

    Args:
        steps: Optimizer steps of the run.
        r_max, d_max: Final limits.
        warmup: Fraction of the run with limits 1 and 0.
        r_ramp, d_ramp: Fractions of the run after which r_max and d_max have their final values.

    Raises:
        UsageError: An argument is out of range, or a ramp would end before the warm-up.

    Warns:
        UserWarning: Layers have trained for 200 passes, and ``advance`` was never called.

    Example:
        >>> schedule = RenormSchedule(steps=500)
        >>> schedule.attach(nn.Sequential(BatchRenorm2d(8)))
        1
        >>> schedule.at(500)
        (3.0, 5.0)
    """

    def __init__(
        self,
        steps: int,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: float = 5 / 130,
        r_ramp: float = 40 / 130,
        d_ramp: float = 25 / 130,
    ) -> None:
        if steps < 1:
            raise UsageError(
                f"steps is {steps}, but a schedule needs the number of optimizer steps of the run, at least 1."
            )
        for name, ramp in (("r_ramp", r_ramp), ("d_ramp", d_ramp)):
            if not 0 <= warmup <= ramp <= 1:
                raise UsageError(
                    f"warmup is {warmup:g} and {name} is {ramp:g}, but as fractions of the run they must satisfy"
                    f" 0 <= warmup <= {name} <= 1."
                )
        super().__init__(r_max, d_max)  # validates the ends
        self._steps, self._warmup, self._ramps = steps, warmup, (r_ramp, d_ramp)
        self._ends = (self.r_max, self.d_max)
        self._layers = self._reads = 0
        self._set(0)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far, at most ``steps``."""
        return self._step

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self._steps

    def at(self, step: int) -> tuple[float, float]:
        """(r_max, d_max) after ``step`` optimizer steps."""
        r_part, d_part = (_progress(step / self._steps, self._warmup, ramp) for ramp in self._ramps)
        r_end, d_end = self._ends
        return 1 + r_part * (r_end - 1), d_part * d_end

    def advance(self) -> None:
        """Count one optimizer step; after the last one, the limits stay as they are."""
        self._set(min(self._step + 1, self._steps))

    def attach(self, model: nn.Module) -> int:
        """Make every Batch Renorm layer of a model follow this schedule.

        A layer that has loaded a position, as the last one to do so, sets that of the schedule.

        Returns:
            The number of these layers.

        Raises:
            StateError: A layer has loaded the position of a schedule with other settings. No layer is attached.

        Warns:
            UserWarning: There is no such layer.
        """
        layers = [module for module in model.modules() if isinstance(module, Scheduled)]
        for position in [layer.loaded_position for layer in layers if layer.loaded_position is not None]:
            self.load_position(position)
        if not layers:
            warnings.warn(
                f"{type(model).__name__} has no Batch Renorm layer that could follow the schedule: convert its layers"
                ' first, by bnprobe.convert(model, to="batch-renorm").',
                stacklevel=2,
            )
        for layer in layers:
            layer.schedule, layer.loaded_position = self, None
        self._layers = len(layers)
        return len(layers)

    def read(self, training: bool) -> tuple[float, float] | tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling() and training and self._step == 0:
            self._reads += 1
            if self._reads == FORGOTTEN * max(self._layers, 1):
                warnings.warn(
                    f"The Batch Renorm layers have trained for {FORGOTTEN} passes at the first step of their schedule,"
                    " where they are plain BN: call RenormSchedule.advance() after every optimizer step.",
                    stacklevel=2,
                )
        return super().read(training)

    def position(self) -> Tensor:
        """The step and the settings, float64 of shape (7,): step, steps, r_max, d_max, warmup, r_ramp, d_ramp."""
        return torch.tensor([self._step, *self._settings().values()], dtype=torch.float64, device="cpu")

    def load_position(self, position: Tensor) -> None:
        """Continue from what ``position`` returned; errors as for ``load_state_dict``."""
        step, *settings = position.tolist()
        saved = dict(zip(self._settings(), settings, strict=True))
        self.load_state_dict({**saved, "step": int(step)})

    def state_dict(self) -> dict[str, Any]:
        """The settings and ``step``, as plain numbers."""
        return {**self._settings(), "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the saved step of a schedule with the same settings.

        Raises:
            StateError: The saved schedule has other settings, or its step is out of range. This one is unchanged.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise StateError(
                    f"The saved Batch Renorm schedule has {name} = {state.get(name)}, but this run has {value}:"
                    " resume with the settings of the saved run, or start a new run."
                )
        step = state.get("step")
        if not isinstance(step, int) or not 0 <= step <= self._steps:
            raise StateError(f"The saved Batch Renorm schedule is at step {step} of {self._steps}: it is damaged.")
        self._set(step)

    def _settings(self) -> dict[str, float]:
        names = ("steps", "r_max", "d_max", "warmup", "r_ramp", "d_ramp")
        return dict(zip(names, (self._steps, *self._ends, self._warmup, *self._ramps), strict=True))

    def _set(self, step: int) -> None:
        self._step = step
        self.r_max, self.d_max = self.at(step)


class Scheduled(nn.Module):
    """A layer whose limits a schedule may set (internal).

    Attributes:
        schedule: If not None, the limits are read from it at every forward pass.
        loaded_position: Of a schedule that was attached when the weights were saved, until one is attached here.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.schedule: RenormSchedule | None = None  # not annotated in the class: TorchScript would read it
        self.loaded_position: Tensor | None = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        position = self.loaded_position if self.schedule is None else self.schedule.position()
        if position is not None:
            destination[prefix + POSITION] = position

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        position = state_dict.pop(prefix + POSITION, None)
        super()._load_from_state_dict(state_dict, prefix, *others)
        if position is None:
            return
        if self.schedule is None:
            self.loaded_position = position
            return
        try:
            self.schedule.load_position(position)
        except (StateError, ValueError) as error:
            others[-1].append(str(error))


def _progress(now: float, start: float, end: float) -> float:
    """Progress of a ramp, in [0, 1]; all arguments are fractions of the run."""
    if now >= end:
        return 1.0
    return max(0.0, (now - start) / (end - start)) if end > start else 0.0
