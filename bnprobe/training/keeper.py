"""Decide which weights of a run are kept."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn

from bnprobe.records import Score
from bnprobe.training.divergence import is_finite


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

    def __init__(
        self, measure: Literal["metric", "loss"], goal: Literal["max", "min"], patience: int | None = None
    ) -> None:
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
        if not self.weights or is_finite(list(weights.values())):
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
    """Copies of the tensors of a model's state_dict, on the CPU."""
    state = model.state_dict()
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items() if isinstance(value, Tensor)}
