"""Channels of many layers side by side: a figure of every layer costs as many operators as that of one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which of the channels that lie side by side are those of which layer. Everything is in host memory.

    Attributes:
        sizes: Channels of each layer, at least 1.
    """

    sizes: Int[Tensor, " layers"]

    @cached_property
    def layer(self) -> Int[Tensor, " channels"]:
        """The layer of each channel."""
        return torch.arange(len(self.sizes)).repeat_interleave(self.sizes)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The first channel of each layer."""
        return (self.sizes.cumsum(0) - self.sizes).numpy()

    def spread(self, values: Shaped[Tensor, "*rows layers"]) -> Shaped[Tensor, "*rows channels"]:
        """What each layer has, for each of its channels."""
        return values[..., self.layer]

    def mean(self, values: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows layers"]:
        """Mean over the channels of each layer."""
        return _reduced(np.add, values, self.starts) / self.sizes

    def least(self, values: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows layers"]:
        """Minimum over the channels of each layer; NaN where one is NaN."""
        return _reduced(np.minimum, values, self.starts)

    def add_sums(self, totals: Float[Tensor, "rows layers"], values: Float[Tensor, "rows some"], start: int) -> None:
        """Add sums over the channels of each layer to ``totals``, of the channels from ``start`` on."""
        first, last = int(self.layer[start]), int(self.layer[start + values.shape[1] - 1])
        starts = np.maximum(self.starts[first : last + 1] - start, 0)
        totals[:, first : last + 1] += _reduced(np.add, values, starts)


def _reduced(how: np.ufunc, values: Tensor, starts: NDArray[np.int64]) -> Tensor:
    """Reduce the last axis from each start to the next; torch's ``index_add`` takes ten times as long."""
    with np.errstate(all="ignore"):  # what overflows is told from the result
        return torch.from_numpy(how.reduceat(values.numpy(), starts, -1))
