"""The jackknife over replicates: bias, variance and intervals of figures that are no plain means.

Micro-batches are dealt to a fixed number of replicates, and sums are kept per replicate. A figure computed from all
sums and from the sums without one replicate each says what it owes to chance, also where the reference that
micro-batches are compared with was estimated from these micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bnprobe.records import Interval
from bnprobe.stats.uncertainty import t_quantile

REPLICATES = 16
"""Few, since memory grows with them; enough for Student's t with 15 degrees of freedom, 9% wider than the normal."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its bias taken out.

    Attributes:
        value: Bias-corrected.
        bias: What was taken out of the figure computed from all data.
        variance: Of ``value``; infinite if fewer than two replicates hold data.
        degrees: Degrees of freedom of ``variance``.
    """

    value: float
    bias: float
    variance: float
    degrees: int

    def interval(self, extra_variance: float = 0.0) -> Interval | None:
        """95% interval; ``extra_variance`` is independent of this one. None if nothing is known of the spread."""
        if self.degrees < 1:
            return None
        half = t_quantile(self.degrees, 0.95) * math.sqrt(self.variance + extra_variance)
        return self.value - half, self.value + half


def leave_one_out(sums: Float[Tensor, "replicates ..."]) -> Float[Tensor, "estimates ..."]:
    """The sum of all replicates, and of all but each one."""
    total = sums.sum(0, keepdim=True)
    return torch.cat([total, total - sums])


def jackknife(estimates: Float[Tensor, " estimates"], counts: Float[Tensor, " replicates"]) -> Estimate:
    """Combine a figure from all replicates, and from all but each one.

    The delete-m jackknife for groups of unequal size (Busing, Meijer & van der Leeden 1999, Statistics and Computing 9,
    section 2.3), which for equal groups is Quenouille's and Tukey's.

    Args:
        estimates: As the sums of ``leave_one_out``: all data first.
        counts: Micro-batches in each replicate; empty ones are left out.
    """
    held = counts > 0
    groups = int(held.sum())
    total = estimates[0]
    if groups < 2:
        return Estimate(float(total), 0.0, math.inf, 0)
    deleted, sizes = estimates[1:][held], counts[held]
    ratio = sizes.sum() / sizes
    value = groups * total - ((1 - 1 / ratio) * deleted).sum()
    pseudo = ratio * total - (ratio - 1) * deleted
    variance = ((pseudo - value).square() / (ratio - 1)).mean()
    return Estimate(float(value), float(total - value), float(variance), groups - 1)
