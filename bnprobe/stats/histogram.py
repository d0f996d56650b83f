"""Histograms with fixed bins: any number of batches fits into constant memory, and histograms merge by addition.

Each axis has coarse bins, which the report shows. Every coarse bin is split into fine bins, from which quantiles are
read. The outermost bins include everything beyond them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

PROBABILITIES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

_LABELS = tuple(f"{probability:g}" for probability in PROBABILITIES)


def _asinh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """As ``torch.asinh``, to 1e-15 absolute, and five times as fast on CPU."""
    size = x.abs()
    return size.square().add_(1.0).sqrt_().add_(size).log_().copysign_(x)


@dataclass(frozen=True)
class Axis:
    """A monotone scale with equal bins.

    Attributes:
        scale: "log2" for ratios (r), "asinh" for signed deviations (d).
        half_width: The coarse bins cover [-half_width, half_width] of the scaled value.
        coarse: Number of coarse bins.
        fine: Fine bins per coarse bin.
        reach: The fine bins cover ``reach`` times the half width.
    """

    scale: str
    half_width: float
    coarse: int
    fine: int
    reach: int

    @property
    def bins(self) -> int:
        """Number of fine bins."""
        return self.coarse * self.fine * self.reach

    @cached_property
    def edges(self) -> tuple[float, ...]:
        """Edges of the coarse bins, in the unit of the values."""
        return tuple(self.unscale(np.linspace(-self.half_width, self.half_width, self.coarse + 1)).tolist())

    def index(self, values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Fine bin of each value; NaN goes to bin 0."""
        scaled = torch.log2(values) if self.scale == "log2" else _asinh(values / D_UNIT)
        middle = self.bins / 2
        position = scaled.mul_(middle / (self.half_width * self.reach)).add_(middle)
        return position.nan_to_num_(0.0).clamp_(0, self.bins - 1).long()

    def unscale(self, scaled: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values at positions on the scaled axis."""
        return np.exp2(scaled) if self.scale == "log2" else D_UNIT * np.sinh(scaled)

    def coarsen(self, counts: NDArray[np.int64]) -> tuple[int, ...]:
        """Counts of the coarse bins; values beyond them are counted in the outermost ones."""
        inner = self.coarse * self.fine
        start = (self.bins - inner) // 2
        result = counts[start : start + inner].reshape(self.coarse, self.fine).sum(1)
        result[0] += counts[:start].sum()
        result[-1] += counts[start + inner :].sum()
        return tuple(result.tolist())

    def quantiles(self, counts: NDArray[np.int64], low: float, high: float) -> dict[str, float]:
        """Quantiles by linear interpolation within fine bins.

        Args:
            counts: Counts of the fine bins.
            low, high: The exact minimum and maximum, which bound every quantile.
        """
        width = 2 * self.half_width * self.reach / self.bins
        cumulative = counts.cumsum()
        targets = cumulative[-1] * np.array(PROBABILITIES)
        bins = cumulative.searchsorted(targets)
        held = counts[bins]
        inside = (targets - (cumulative[bins] - held)) / np.maximum(held, 1)
        values = self.unscale((bins + inside) * width - self.half_width * self.reach)
        return dict(zip(_LABELS, np.minimum(np.maximum(values, low), high).tolist(), strict=True))


D_UNIT = 0.1
"""The axis of d is about linear below this |d|, and about logarithmic above it."""

R_AXIS = Axis("log2", half_width=2.0, coarse=32, fine=8, reach=6)
"""r from 1/4 to 4 in steps of 1/8 octave; quantiles are accurate to 1.1%."""

D_AXIS = Axis("asinh", half_width=math.asinh(10.0 / D_UNIT), coarse=32, fine=16, reach=3)
"""d from -10 to 10; quantiles are accurate to 2%, or to 0.002 near 0."""
