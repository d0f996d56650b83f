"""Detect that training has diverged, and find the first value that is not finite."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bnprobe.probing.batch import copy_tensors, tensors_of, to_device
from bnprobe.probing.layers import ROOT
from bnprobe.probing.session import casting, model_code
from bnprobe.randomness import preserved_random_state
from bnprobe.usercode import BatchFunction

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
    found: list[str] = []
    with preserved_random_state(), _noting(model, found), casting(device, autocast):
        for batch in group:
            with model_code("calling loss(model, batch) once more, to find where it is NaN or Inf"):
                loss(model, copy_tensors(to_device(batch, device)))
    return found[0] if found else None


def bad_gradient(model: nn.Module) -> str | None:
    """Name of the last parameter whose gradient is NaN or Inf, which the backward pass reaches first."""
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    return next((name for name, gradient in reversed(named) if not bool(torch.isfinite(gradient).all())), None)


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all values of all floating-point tensors are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


@contextmanager
def _noting(model: nn.Module, found: list[str]) -> Iterator[None]:
    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any) -> None:
            if not found and not is_finite(tensors_of(list(inputs))):
                found.append(name)

        return look

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, _NORMS):
                stack.callback(module.register_forward_pre_hook(hook(name or ROOT)).remove)
        yield
