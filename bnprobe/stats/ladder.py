"""The ladder of counterfactuals: where the eval-path mismatch of a layer comes from (docs/explanation/ladder.md).

D is quadratic in the reference, so that sums over micro-batches give D against any reference statistics. Each rung
replaces one thing by its counterfactual, and the differences between neighbouring rungs are the shares:

    D(batches as loaded, running statistics)
        - D(as loaded, settled statistics of the train path)        = lag
    ... - D(as loaded, settled, train path without random layers)   = dropout
    ... - D(as loaded, settled, eval path)                          = propagation
    ... - D(drawn at random, settled on batches drawn at random)    = composition
    the remainder                                                   = small batch

*Settled* statistics are those that running statistics converge to if weights and data do not change: the mean of the
batch means, and the mean of the unbiased batch variances. They are not population statistics, because the mean of
batch variances leaves out the variance between batches. Small or non-i.i.d. batches distort running statistics in this
way permanently, so the effect belongs to these two shares and not to lag (stale running statistics).

A scan does not know at which batch size the running statistics were collected. Statistics of any size between the
scanned one (settled statistics) and all data at once (pooled statistics) therefore count as settled, and so do those
of the later paths. The running statistics did not come from the rungs before the one that explains them best: the
shares of these rungs are 0 (docs/decisions/0010).

All figures are in units of the layer's running statistics: means as d, variances divided by (running variance + eps).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bnprobe.stats.intervals import REPLICATES, JackknifeEstimate, jackknife, leave_one_out
from bnprobe.stats.moments import Corrections

SUMS = ("d", "d_squared", "rho", "rho_r", "variance", "unbiased")
"""What is summed over micro-batches, per replicate and channel: fields of ``BatchSums`` and ``Means``."""


def summands(values: Corrections, bessel: Float[Tensor, " channels"]) -> dict[str, Float[Tensor, "batches channels"]]:
    """What each micro-batch adds to the sums, by the names of ``SUMS``.

    Args:
        bessel: n / (n - 1) for the n values per channel of a micro-batch.
    """
    rho_r = values.rho * values.r
    variance = rho_r * values.r
    return {
        "d": values.d,
        "d_squared": values.d.square(),
        "rho": values.rho,
        "rho_r": rho_r,
        "variance": variance,
        "unbiased": variance * bessel,
    }


@dataclass(frozen=True)
class BatchSums:
    """Sums over micro-batches of one layer on one path, in units of its running statistics.

    Attributes:
        counts: Micro-batches per replicate.
        d, d_squared, rho, rho_r, variance, unbiased: Sums of what ``Means`` has the means of.
        eps: The layer's eps in the same units, eps / (running variance + eps).
    """

    counts: Float[Tensor, " replicates"]
    d: Float[Tensor, "replicates channels"]
    d_squared: Float[Tensor, "replicates channels"]
    rho: Float[Tensor, "replicates channels"]
    rho_r: Float[Tensor, "replicates channels"]
    variance: Float[Tensor, "replicates channels"]
    unbiased: Float[Tensor, "replicates channels"]
    eps: Float[Tensor, " channels"]

    @classmethod
    def of_samples(
        cls, mean: Float[Tensor, "samples channels"], variance: Float[Tensor, "samples channels"], eps: Tensor
    ) -> BatchSums:
        """Sums over samples instead of micro-batches, which go to the replicates in turn.

        For the eval path, where samples are independent: with few micro-batches their spread says little.

        Args:
            mean: As d.
            variance: In units of the running variance, biased.
            eps: As ``eps``.
        """
        mean, variance = mean.double(), variance.double()
        scale = variance + eps
        rho = variance / scale
        rows = {
            "d": mean,
            "d_squared": mean.square(),
            "rho": rho,
            "rho_r": rho * scale.sqrt(),
            "variance": variance,
            "unbiased": variance,
        }
        replicate = torch.arange(mean.shape[0]) % REPLICATES
        empty = mean.new_zeros(REPLICATES, mean.shape[1])
        sums = {name: empty.index_add(0, replicate, values) for name, values in rows.items()}
        return cls(counts=torch.bincount(replicate, minlength=REPLICATES).double(), eps=eps, **sums)

    def __add__(self, other: BatchSums) -> BatchSums:
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        return BatchSums(counts=self.counts + other.counts, eps=self.eps, **sums)

    def folded(self, replicates: int) -> BatchSums:
        """The same with fewer replicates, which the others go to in turn."""
        index = torch.arange(len(self.counts)) % replicates

        def fold(sums: Tensor) -> Tensor:
            return sums.new_zeros(replicates, *sums.shape[1:]).index_add(0, index.to(sums.device), sums)

        return BatchSums(counts=fold(self.counts), eps=self.eps, **{name: fold(getattr(self, name)) for name in SUMS})

    def totals(self) -> dict[str, Float[Tensor, " channels"]]:
        """Sums over all replicates, by the names of ``SUMS``."""
        return dict(zip(SUMS, self._stacked().sum(0), strict=True))

    def means(self) -> Means:
        """Means over all micro-batches, and with each replicate left out."""
        means = leave_one_out(self._stacked()) / leave_one_out(self.counts)[:, None, None]
        # Without its only replicate nothing is left. That row is never read; zeros avoid warnings about NaN.
        found = dict(zip(SUMS, means.nan_to_num(0.0).unbind(1), strict=True))
        return Means(eps=self.eps, **found)

    def _stacked(self) -> Float[Tensor, "replicates sums channels"]:
        """All sums in one tensor, to be reduced at once."""
        return torch.stack([getattr(self, name) for name in SUMS], 1)


@dataclass(frozen=True)
class Means:
    """Means over micro-batches: over all of them in the first row, without one replicate in each further row.

    Attributes:
        d, d_squared: E[d] and E[d^2].
        rho, rho_r: E[rho] and E[rho s_B].
        variance: E[v_B], biased within the micro-batch.
        unbiased: E[v_B n / (n - 1)], which a running variance averages.
        eps: As in ``BatchSums``.
    """

    d: Float[Tensor, "estimates channels"]
    d_squared: Float[Tensor, "estimates channels"]
    rho: Float[Tensor, "estimates channels"]
    rho_r: Float[Tensor, "estimates channels"]
    variance: Float[Tensor, "estimates channels"]
    unbiased: Float[Tensor, "estimates channels"]
    eps: Float[Tensor, " channels"]

    def whole(self) -> Means:
        """The first row alone."""
        return Means(eps=self.eps, **{name: getattr(self, name)[:1] for name in SUMS})

    @property
    def pooled(self) -> Float[Tensor, "estimates channels"]:
        """Variance of all values together, biased."""
        return self.variance + (self.d_squared - self.d.square()).clamp(min=0)


@dataclass(frozen=True)
class Reference:
    """Statistics that a layer could normalize with, in units of its running statistics."""

    mean: Float[Tensor, "estimates channels"]
    std: Float[Tensor, "estimates channels"]


@dataclass(frozen=True)
class Regrouped:
    """What micro-batches of samples drawn at random give, in units of the running statistics.

    Attributes:
        variance: E[v_B], from all samples.
        rho_r: E[rho s_B].
        rho: E[rho].
        change: Change of the layer's mean D when each replicate's samples are left out of the pool; 0 in the first row.
        chance: Variance of the layer's mean D due to the random orders.
        excess: What the random orders add to the jackknife's variance through ``change``, on average.
        pooled: The part of the measured samples that was regrouped.
    """

    variance: Float[Tensor, "estimates channels"]
    rho_r: Float[Tensor, "estimates channels"]
    rho: Float[Tensor, " channels"]
    change: Float[Tensor, " estimates"]
    chance: float
    excess: float
    pooled: float


def blend(means: Means, values: int) -> Float[Tensor, "estimates 1"]:
    """Position of the running variances between settled (0) and pooled (1) ones, by least squares over channels."""
    low, high = _unbiased(means, values) + means.eps, means.pooled + means.eps
    way = high - low
    position = ((1 - low) * way / high.square()).sum(1) / (way / high).square().sum(1)
    return position.nan_to_num(0.0).clamp(0, 1)[:, None]


def settled(means: Means, values: int, way: Float[Tensor, "estimates 1"]) -> Reference:
    """Settled statistics, interpolated by ``way`` from those of this batch size to those of all data at once.

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
    """E of the unbiased variance; for a single value, on which torch refuses to train, the pooled variance instead."""
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
    """Mean of D for micro-batches drawn at random, against the settled statistics of such batches.

    The variance of the means of such batches is the pooled variance minus the variance within them.
    """
    unbiased = drawn.variance * values / (values - 1) if values > 1 else means.pooled
    std = (unbiased + way * (means.pooled - unbiased) + means.eps).sqrt()
    return ((means.pooled - 2 * drawn.rho_r * std + drawn.rho * std.square()) / std.square()).mean(1) + drawn.change


def shift_between(here: Means, there: Means) -> Float[Tensor, " estimates"]:
    """D of an infinitely large batch from the population of ``here``, against the population of ``there``.

    Each of them has either one row per estimate, or a single row.
    """
    std, reference = ((means.pooled + means.eps).sqrt() for means in (here, there))
    rho = here.pooled / std.square()
    shift = (here.d - there.d).square() + rho * (std - reference).square()
    return (shift / reference.square()).mean(1)


def shift(here: BatchSums, there: BatchSums) -> JackknifeEstimate:
    """``shift_between`` two independent samples; the biases and variances found by each one's replicates add up."""
    first, second = here.means(), there.means()
    one = jackknife(shift_between(first, second.whole()), here.counts)
    other = jackknife(shift_between(first.whole(), second), there.counts)
    return JackknifeEstimate(
        value=one.value - other.bias,
        bias=one.bias + other.bias,
        variance=one.variance + other.variance,
        degrees=min(one.degrees, other.degrees),
    )
