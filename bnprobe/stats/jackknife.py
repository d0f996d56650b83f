"""The jackknife over replicates: bias, variance and intervals of figures that are not plain means.

Micro-batches are assigned to a fixed number of replicates, and sums are kept per replicate. A figure is computed from
all sums, and again without each replicate in turn. The differences show how much it varies by chance. This works also
if the reference that micro-batches are compared with was estimated from the same micro-batches.
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
"""Few, since memory grows with them, but enough: Student's t with 15 degrees of freedom is 9% wider than the normal."""


@dataclass(frozen=True)
class Estimate:
    """A bias-corrected figure.

    Attributes:
        value: The bias-corrected value.
        bias: The bias that was subtracted from the figure computed from all data.
        variance: Variance of ``value``; infinite if fewer than two replicates have data.
        degrees: Degrees of freedom of ``variance``.
    """

    value: float
    bias: float
    variance: float
    degrees: int

    def interval(self, extra_variance: float = 0.0) -> Interval | None:
        """95% interval, with the ``extra_variance`` of an independent error added; None if the spread is unknown."""
        if self.degrees < 1:
            return None
        half = t_quantile(self.degrees, 0.95) * math.sqrt(self.variance + extra_variance)
        return self.value - half, self.value + half


def leave_one_out(sums: Float[Tensor, "replicates ..."]) -> Float[Tensor, "estimates ..."]:
    """The sum over all replicates, then the sums that leave out each one."""
    total = sums.sum(0, keepdim=True)
    return torch.cat([total, total - sums])


def jackknife(estimates: Float[Tensor, " estimates"], counts: Float[Tensor, " replicates"]) -> Estimate:
    """Combine a figure from all replicates with those that leave out each one.

    This is the delete-m jackknife for groups of unequal size (Busing, Meijer & van der Leeden 1999, Statistics and
    Computing 9, section 2.3); for equal groups it is the jackknife of Quenouille and Tukey.

    Args:
        estimates: In the order of ``leave_one_out``: all data first.
        counts: Micro-batches in each replicate; empty replicates are left out.
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
