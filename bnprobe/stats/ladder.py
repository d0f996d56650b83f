"""The ladder of counterfactuals: where the eval-path mismatch of a layer comes from (DESIGN section 3).

D is quadratic in the reference, so sums over micro-batches give it against any reference statistics. Each rung swaps
one thing for its counterfactual, and the differences of neighbouring rungs are the shares:

    D(batches as loaded, running statistics)
        - D(as loaded, settled statistics of the train path)        = lag
    ... - D(as loaded, settled, train path without random layers)   = dropout
    ... - D(as loaded, settled, eval path)                          = propagation
    ... - D(drawn at random, settled on batches drawn at random)    = composition
    what is left                                                    = small batch

*Settled* statistics are what running statistics tend to if weights and data stay as they are: the mean of the batch
means, and the mean of the unbiased batch variances. They are no population statistics: the mean of batch variances
leaves out the variance between batches. That is what small or composed batches do to running statistics for good, so
it belongs to these shares and not to lag. A scan does not know at which batch size the running statistics came about:
any one from the scanned size (settled statistics) to all data at once (pooled statistics) counts as settled, and so do
those of the later paths: rungs before the one that explains the running statistics best are no way that they took, and
their shares are 0 (docs/decisions/0010).

All figures are in units of the layer's running statistics: means as d, variances over (running variance + eps).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bnprobe.stats.jackknife import Estimate, jackknife, leave_one_out
from bnprobe.stats.mismatch import Corrections

SUMS = ("d", "d squared", "rho", "rho r", "variance", "unbiased variance")
"""What is summed over micro-batches, per replicate and channel; sums and means hold it in this order."""


def summands(values: Corrections, bessel: Float[Tensor, " channels"]) -> dict[str, Float[Tensor, "batches channels"]]:
    """What each micro-batch adds to the sums, by the names of ``SUMS``.

    Args:
        bessel: n / (n - 1) for the n values per channel of a micro-batch.
    """
    rho_r = values.rho * values.r
    variance = rho_r * values.r
    found = (values.d, values.d.square(), values.rho, rho_r, variance, variance * bessel)
    return dict(zip(SUMS, found, strict=True))


@dataclass(frozen=True)
class BatchSums:
    """Sums over micro-batches of one layer on one path, in units of its running statistics.

    Attributes:
        counts: Micro-batches per replicate.
        sums: In the order of ``SUMS``.
        eps: The layer's eps in the same units, eps / (running variance + eps).
    """

    counts: Float[Tensor, " replicates"]
    sums: Float[Tensor, "replicates 6 channels"]
    eps: Float[Tensor, " channels"]

    def __add__(self, other: BatchSums) -> BatchSums:
        return BatchSums(self.counts + other.counts, self.sums + other.sums, self.eps)

    def total(self, name: str) -> Float[Tensor, " channels"]:
        """One of ``SUMS``, over all replicates."""
        return self.sums.sum(0)[SUMS.index(name)]

    def means(self) -> Means:
        """Means over all micro-batches, and over all but each replicate."""
        counts = leave_one_out(self.counts)
        means = leave_one_out(self.sums) / counts[:, None, None]
        # With a single replicate nothing is left without it; it is never looked at, and NaN would be noise.
        return Means(means.nan_to_num(0.0), self.eps)


@dataclass(frozen=True)
class Means:
    """Means over micro-batches: of all in the first row, of all but one replicate in each further row."""

    values: Float[Tensor, "estimates 6 channels"]
    eps: Float[Tensor, " channels"]

    def _of(self, name: str) -> Float[Tensor, "estimates channels"]:
        return self.values[:, SUMS.index(name)]

    @property
    def d(self) -> Float[Tensor, "estimates channels"]:
        """E[d]."""
        return self._of("d")

    @property
    def d_squared(self) -> Float[Tensor, "estimates channels"]:
        """E[d^2]."""
        return self._of("d squared")

    @property
    def rho(self) -> Float[Tensor, "estimates channels"]:
        """E[rho]."""
        return self._of("rho")

    @property
    def rho_r(self) -> Float[Tensor, "estimates channels"]:
        """E[rho s_B]."""
        return self._of("rho r")

    @property
    def variance(self) -> Float[Tensor, "estimates channels"]:
        """E[v_B], biased within the micro-batch."""
        return self._of("variance")

    @property
    def unbiased(self) -> Float[Tensor, "estimates channels"]:
        """E[v_B n / (n - 1)], which a running variance averages."""
        return self._of("unbiased variance")

    @property
    def pooled(self) -> Float[Tensor, "estimates channels"]:
        """Variance of all values together, biased."""
        return self.variance + (self.d_squared - self.d.square()).clamp(min=0)


@dataclass(frozen=True)
class Reference:
    """Statistics that a layer might normalize with, in units of its running statistics."""

    mean: Float[Tensor, "estimates channels"]
    std: Float[Tensor, "estimates channels"]


@dataclass(frozen=True)
class Regrouped:
    """What images drawn at random into micro-batches give, in units of the running statistics.

    Attributes:
        variance: E[v_B], from all images.
        rho_r: E[rho s_B].
        rho: E[rho].
        change: What leaving out each replicate's images in the pool adds to the layer's mean D; 0 for all.
        chance: Variance of the layer's mean D that comes from the random orders.
    """

    variance: Float[Tensor, "estimates channels"]
    rho_r: Float[Tensor, "estimates channels"]
    rho: Float[Tensor, " channels"]
    change: Float[Tensor, " estimates"]
    chance: float


def blend(means: Means, values: int) -> Float[Tensor, "estimates 1"]:
    """How far the running variances lie on the way from settled (0) to pooled ones (1): least squares over channels."""
    low, high = _unbiased(means, values) + means.eps, means.pooled + means.eps
    way = high - low
    position = ((1 - low) * way / high.square()).sum(1) / (way / high).square().sum(1)
    return position.nan_to_num(0.0).clamp(0, 1)[:, None]


def settled(means: Means, values: int, way: Float[Tensor, "estimates 1"]) -> Reference:
    """What running statistics tend to, ``way`` from those of this batch size to those of all data at once.

    Args:
        values: Values per channel in a micro-batch.
    """
    unbiased = _unbiased(means, values)
    return Reference(means.d, (unbiased + way * (means.pooled - unbiased) + means.eps).sqrt())


def distance(reference: Reference) -> float:
    """Mean square distance of ``reference`` from the running statistics, in standard deviations of ``reference``."""
    shift = reference.mean[0].square() + (1 - reference.std[0]).square()
    return float((shift / reference.std[0].square()).mean())


def _unbiased(means: Means, values: int) -> Float[Tensor, "estimates channels"]:
    """A single value has no variance: torch refuses to train on it, and the pooled variance stands in."""
    return means.unbiased if values > 1 else means.pooled


def running(means: Means) -> Reference:
    """The running statistics themselves."""
    return Reference(torch.zeros_like(means.d), torch.ones_like(means.d))


def mismatch(means: Means, reference: Reference) -> Float[Tensor, " estimates"]:
    """Mean of D over micro-batches and channels against ``reference``."""
    shift = means.d_squared - 2 * reference.mean * means.d + reference.mean.square()
    scale = means.variance - 2 * means.rho_r * reference.std + means.rho * reference.std.square()
    return ((shift + scale) / reference.std.square()).mean(1)


def mismatch_drawn(
    means: Means, drawn: Regrouped, values: int, way: Float[Tensor, "estimates 1"]
) -> Float[Tensor, " estimates"]:
    """Mean of D for micro-batches drawn at random, against the statistics that settle on them.

    The means of such batches vary by what of the pooled variance is not within them.
    """
    unbiased = drawn.variance * values / (values - 1) if values > 1 else means.pooled
    std = (unbiased + way * (means.pooled - unbiased) + means.eps).sqrt()
    return ((means.pooled - 2 * drawn.rho_r * std + drawn.rho * std.square()) / std.square()).mean(1) + drawn.change


def shift_between(here: Means, there: Means) -> Float[Tensor, " estimates"]:
    """D of one endless batch with the population of ``here`` against the population of ``there``.

    Either has one row for all of its replicates, or one row in all.
    """
    std, reference = ((means.pooled + means.eps).sqrt() for means in (here, there))
    rho = here.pooled / std.square()
    shift = (here.d - there.d).square() + rho * (std - reference).square()
    return (shift / reference.square()).mean(1)


def shift(here: BatchSums, there: BatchSums) -> Estimate:
    """``shift_between`` two independent samples: biases and variances that the replicates of either show add up."""
    first, second = here.means(), there.means()
    whole_first, whole_second = (Means(means.values[:1], means.eps) for means in (first, second))
    one = jackknife(shift_between(first, whole_second), here.counts)
    other = jackknife(shift_between(whole_first, second), there.counts)
    return Estimate(
        value=one.value - other.bias,
        bias=one.bias + other.bias,
        variance=one.variance + other.variance,
        degrees=min(one.degrees, other.degrees),
    )
