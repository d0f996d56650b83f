"""The limits of Batch Renorm over a training run."""

from __future__ import annotations

from typing import Any

from torch import nn

from bnprobe.errors import StateError, UsageError
from bnprobe.nn.batch_renorm import BatchRenormBase
from bnprobe.nn.limits import Limits


class RenormSchedule(Limits):
    """r_max and d_max as functions of the optimizer steps done; the shape is that of Ioffe 2017, section 4.

    During the warm-up the limits are 1 and 0: plain BN. Then each rises in a straight line to its end value, and stays
    there. Layers that are attached read it at every forward; ``advance`` it after every optimizer step.

    Args:
        steps: Optimizer steps of the run.
        r_max, d_max: Limits at the end.
        warmup: Fraction of the run at limits 1 and 0.
        r_ramp, d_ramp: Fractions of the run at which r_max and d_max reach their end values.

    Raises:
        UsageError: An argument is out of range, or a ramp would end before the warm-up.
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
                f"A schedule of {steps} steps has no shape: give the optimizer steps of the run, at least 1."
            )
        for name, ramp in (("r_ramp", r_ramp), ("d_ramp", d_ramp)):
            if not 0 <= warmup <= ramp <= 1:
                raise UsageError(
                    f"warmup is {warmup:g} and {name} {ramp:g}, but they are fractions of the run, in this order:"
                    f" 0 <= warmup <= {name} <= 1."
                )
        super().__init__(r_max, d_max)  # validates the ends
        self._steps, self._warmup, self._ramps = steps, warmup, (r_ramp, d_ramp)
        self._ends = (self.r_max, self.d_max)
        self._set(0)

    @property
    def step(self) -> int:
        """Optimizer steps done, at most ``steps``."""
        return self._step

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self._steps

    def at(self, step: int) -> tuple[float, float]:
        """(r_max, d_max) after so many optimizer steps."""
        r_part, d_part = (_progress(step / self._steps, self._warmup, ramp) for ramp in self._ramps)
        r_end, d_end = self._ends
        return 1 + r_part * (r_end - 1), d_part * d_end

    def advance(self) -> None:
        """One optimizer step is done; after the last one, nothing changes any more."""
        self._set(min(self._step + 1, self._steps))

    def attach(self, model: nn.Module) -> int:
        """Have every Batch Renorm layer of a model read this schedule.

        Returns:
            How many layers there are.
        """
        layers = [module for module in model.modules() if isinstance(module, BatchRenormBase)]
        for layer in layers:
            layer.schedule = self
        return len(layers)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the settings, and ``step``."""
        return {**self._settings(), "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a schedule of the same settings stood.

        Raises:
            StateError: The state is of a schedule with other settings; this one is unchanged.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise StateError(
                    f"The saved Batch Renorm schedule has {name} = {state.get(name)}, but this run has {value}:"
                    " resume with the settings of the saved run, or start anew."
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


def _progress(now: float, start: float, end: float) -> float:
    """How far a ramp has come, in [0, 1]; all arguments are fractions of the run."""
    if now >= end:
        return 1.0
    return max(0.0, (now - start) / (end - start)) if end > start else 0.0
