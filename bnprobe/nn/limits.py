"""The limits of Batch Renorm: validated numbers, and the same as tensors that a compiled layer reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnprobe.errors import UsageError
from bnprobe.nn.snapshot import snapshot


class Limits:
    """r_max and d_max, which may change between steps.

    A compiled layer reads the tensors: a changed number would have it compiled again at every step of a schedule.

    Attributes:
        r_max_tensor, d_max_tensor: The limits as float64 tensors of shape () on the CPU.

    Raises:
        UsageError: r_max below 1 or d_max below 0, or one of them not finite.
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

    def read(self) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """(r_max, d_max) as a layer's forward is to pass them on: tensors while it is being compiled."""
        if torch.compiler.is_compiling():
            return snapshot(self.r_max_tensor), snapshot(self.d_max_tensor)
        return self._r_max, self._d_max
