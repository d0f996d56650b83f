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

The channels of many layers lie side by side, and every function gives the figures of all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bnprobe.stats.intervals import REPLICATES, JackknifeEstimate, jackknife_each, leave_one_out
from bnprobe.stats.moments import Corrections
from bnprobe.stats.segments import Segments

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
        "d_squared": values.d_squared,
        "rho": values.rho,
        "rho_r": rho_r,
        "variance": variance,
        "unbiased": variance * bessel,
    }


@dataclass(frozen=True)
class BatchSums:
    """Sums over micro-batches on one path, in units of the layers' running statistics.

    Attributes:
        segments: Which channels are those of which layer.
        counts: Micro-batches of each layer per replicate.
        d, d_squared, rho, rho_r, variance, unbiased: Sums of what ``Means`` has the means of.
        eps: The layer's eps in the same units, eps / (running variance + eps).
    """

    segments: Segments
    counts: Float[Tensor, "replicates layers"]
    d: Float[Tensor, "replicates channels"]
    d_squared: Float[Tensor, "replicates channels"]
    rho: Float[Tensor, "replicates channels"]
    rho_r: Float[Tensor, "replicates channels"]
    variance: Float[Tensor, "replicates channels"]
    unbiased: Float[Tensor, "replicates channels"]
    eps: Float[Tensor, " channels"]

    def by_sample(
        self, mean: Float[Tensor, "samples channels"], variance: Float[Tensor, "samples channels"]
    ) -> BatchSums:
        """Sums of the same layers over samples instead of micro-batches, which go to the replicates in turn.

        For the eval path, where samples are independent: with few micro-batches their spread says little.

        Args:
            mean: As d.
            variance: In units of the running variance, biased.
        """
        mean, variance = mean.double(), variance.double()
        scale = variance + self.eps
        rho = variance / scale
        replicate = torch.arange(mean.shape[0]) % REPLICATES
        counts = torch.bincount(replicate, minlength=REPLICATES).double()

        def summed(values: Tensor) -> Tensor:
            return values.new_zeros(REPLICATES, values.shape[1]).index_add_(0, replicate, values)

        return BatchSums(
            segments=self.segments,
            counts=counts[:, None].expand(-1, len(self.segments.sizes)),
            d=summed(mean),
            d_squared=summed(mean.square()),
            rho=summed(rho),
            rho_r=summed(rho * scale.sqrt()),
            variance=summed(variance),
            unbiased=summed(variance),
            eps=self.eps,
        )

    def __add__(self, other: BatchSums) -> BatchSums:
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        return BatchSums(self.segments, self.counts + other.counts, eps=self.eps, **sums)

    def folded(self, replicates: int) -> BatchSums:
        """The same with fewer replicates, which the others go to in turn."""
        index = torch.arange(len(self.counts)) % replicates

        def fold(sums: Tensor) -> Tensor:
            return sums.new_zeros(replicates, sums.shape[1]).index_add(0, index, sums)

        sums = {name: fold(getattr(self, name)) for name in SUMS}
        return BatchSums(self.segments, fold(self.counts), eps=self.eps, **sums)

    def means(self) -> Means:
        """Means over all micro-batches, and with each replicate left out."""
        return self._over(leave_one_out)

    def whole(self) -> Means:
        """Means over all micro-batches alone."""
        return self._over(lambda sums: sums.sum(0, keepdim=True))

    def _over(self, total: Callable[[Tensor], Tensor]) -> Means:
        counts = self.segments.spread(total(self.counts))
        # Without its only replicate nothing is left. That row is never read; zeros avoid warnings about NaN.
        means = {name: (total(getattr(self, name)) / counts).nan_to_num_(0.0) for name in SUMS}
        return Means(self.segments, eps=self.eps, **means)


@dataclass(frozen=True)
class Means:
    """Means over micro-batches: over all of them in the first row, without one replicate in each further row.

    Attributes:
        segments: Which channels are those of which layer.
        d, d_squared: E[d] and E[d^2].
        rho, rho_r: E[rho] and E[rho s_B].
        variance: E[v_B], biased within the micro-batch.
        unbiased: E[v_B n / (n - 1)], which a running variance averages.
        eps: As in ``BatchSums``.
    """

    segments: Segments
    d: Float[Tensor, "estimates channels"]
    d_squared: Float[Tensor, "estimates channels"]
    rho: Float[Tensor, "estimates channels"]
    rho_r: Float[Tensor, "estimates channels"]
    variance: Float[Tensor, "estimates channels"]
    unbiased: Float[Tensor, "estimates channels"]
    eps: Float[Tensor, " channels"]

    def whole(self) -> Means:
        """The first row alone."""
        return Means(self.segments, eps=self.eps, **{name: getattr(self, name)[:1] for name in SUMS})

    @cached_property
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
        change: Change of each layer's mean D when a replicate's samples are left out of the pool; 0 in the first row.
        chance: Variance of each layer's mean D due to the random orders.
        excess: What the random orders add to the jackknife's variance through ``change``, on average.
        pooled: The part of the measured samples that was regrouped.
    """

    variance: Float[Tensor, "estimates channels"]
    rho_r: Float[Tensor, "estimates channels"]
    rho: Float[Tensor, " channels"]
    change: Float[Tensor, "estimates layers"]
    chance: Float[Tensor, " layers"]
    excess: Float[Tensor, " layers"]
    pooled: Float[Tensor, " layers"]


def blend(means: Means, values: Int[Tensor, " layers"]) -> Float[Tensor, "estimates layers"]:
    """Position of the running variances between settled (0) and pooled (1) ones, by least squares over channels."""
    low, high = _unbiased(means, values) + means.eps, means.pooled + means.eps
    way = (high - low) / high
    along, square = ((1 - low) / high * way), way.square()
    return (means.segments.mean(along) / means.segments.mean(square)).nan_to_num_(0.0).clamp_(0, 1)


def settled(means: Means, values: Int[Tensor, " layers"], way: Float[Tensor, "estimates layers"]) -> Reference:
    """Settled statistics, interpolated by ``way`` from those of this batch size to those of all data at once.

    Args:
        values: Values per channel in a micro-batch.
    """
    return _interpolated(means, _unbiased(means, values), way)


def distance(means: Means, reference: Reference) -> Float[Tensor, "estimates layers"]:
    """Mean square distance of ``reference`` from the running statistics, in standard deviations of ``reference``."""
    shift = reference.mean.square() + (1 - reference.std).square()
    return means.segments.mean(shift / reference.std.square())


def _unbiased(means: Means, values: Int[Tensor, " layers"]) -> Float[Tensor, "estimates channels"]:
    """E of the unbiased variance; for a single value, on which torch refuses to train, the pooled variance instead."""
    return torch.where(means.segments.spread(values > 1), means.unbiased, means.pooled)


def _interpolated(means: Means, unbiased: Tensor, way: Tensor) -> Reference:
    way = means.segments.spread(way)
    return Reference(means.d, (means.pooled - unbiased).mul_(way).add_(unbiased).add_(means.eps).sqrt_())


def running(means: Means) -> Reference:
    """The running statistics themselves."""
    return Reference(torch.zeros_like(means.d), torch.ones_like(means.d))


def mismatch(means: Means, reference: Reference) -> Float[Tensor, "estimates layers"]:
    """Mean of D over micro-batches and channels against ``reference``."""
    # E[d^2 - 2 m d + m^2] + E[rho s_B^2 - 2 s rho s_B + s^2 rho], over s^2
    found = torch.addcmul(means.d_squared, reference.mean, torch.sub(reference.mean, means.d, alpha=2))
    found += means.variance
    found.addcmul_(reference.std, (means.rho * reference.std).sub_(means.rho_r, alpha=2))
    return means.segments.mean(found.div_(reference.std).div_(reference.std))


def mismatch_drawn(
    means: Means, drawn: Regrouped, values: Int[Tensor, " layers"], way: Float[Tensor, "estimates layers"]
) -> Float[Tensor, "estimates layers"]:
    """Mean of D for micro-batches drawn at random, against the settled statistics of such batches.

    The variance of the means of such batches is the pooled variance minus the variance within them.
    """
    n = means.segments.spread(values).double()
    unbiased = torch.where(n > 1, drawn.variance * (n / (n - 1)), means.pooled)
    std = _interpolated(means, unbiased, way).std
    found = torch.addcmul(means.pooled, std, (drawn.rho * std).sub_(drawn.rho_r, alpha=2)).div_(std).div_(std)
    return means.segments.mean(found) + drawn.change


def shift_between(here: Means, there: Means) -> Float[Tensor, "estimates layers"]:
    """D of an infinitely large batch from the population of ``here``, against the population of ``there``.

    Each of them has either one row per estimate, or a single row.
    """
    std, reference = ((means.pooled + means.eps).sqrt() for means in (here, there))
    rho = here.pooled / std.square()
    shift = (here.d - there.d).square() + rho * (std - reference).square()
    return here.segments.mean(shift / reference.square())


def shift(here: BatchSums, there: BatchSums) -> Iterator[JackknifeEstimate]:
    """``shift_between`` two independent samples of each layer.

    The biases and variances found by each one's replicates add up.
    """
    ones = jackknife_each(shift_between(here.means(), there.whole()), here.counts)
    others = jackknife_each(shift_between(here.whole(), there.means()), there.counts)
    for one, other in zip(ones, others, strict=True):
        yield JackknifeEstimate(
            value=one.value - other.bias,
            bias=one.bias + other.bias,
            variance=one.variance + other.variance,
            degrees=min(one.degrees, other.degrees),
        )
