"""Test whether micro-batches are i.i.d.: analysis of variance of sample means, and samples regrouped at random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bnprobe.stats.intervals import leave_one_out
from bnprobe.stats.ladder import BatchSums, Means, Regrouped

REGROUPED = 512
"""Micro-batches to form from the pool: their noise is then small compared with that of the pool itself."""

_ORDERS = 4, 16
"""Lower and upper limit on random orders of the pool. A sample's contribution to D is estimated from the batches
that contain it, and the cost of an order grows with the size of the pool.
"""

_CHUNK_VALUES = 2**17
"""Values per temporary tensor: a few of them fit into a CPU's cache, which makes regrouping four times as fast."""

_ROUNDING = 1e-12
"""Rounding error of float64 sums: a constant channel (dead inputs) must not look like one that differs by batch."""


@dataclass(frozen=True)
class Variance:
    """One-way analysis of variance per channel, with batches as groups and sample means as values.

    Attributes:
        p_value: P(F or more) if batches are drawn at random; 1 where all sample means are equal.
        intraclass_correlation: (MSB - MSW) / (MSB + (b - 1) MSW), from -1/(b - 1) to 1.
    """

    p_value: Float[Tensor, " channels"]
    intraclass_correlation: Float[Tensor, " channels"]


@dataclass(frozen=True)
class Images:
    """Moments of samples drawn at random from those measured, in units of the running statistics of one or many layers.

    Attributes:
        mean: Mean of each sample, about any origin: only differences between samples are used.
        variance: Variance over the values of one sample, biased.
        replicate: Replicate to which the micro-batch of each sample belongs.
    """

    mean: Float[Tensor, "images channels"]
    variance: Float[Tensor, "images channels"]
    replicate: Int[Tensor, " images"]


def analyse(batches: BatchSums, image_squares: Float[Tensor, "replicates channels"], size: int) -> Variance:
    """F = N Var(batch means) / E[Var(sample means within a batch)] ~ F(K - 1, K (N - 1)), eval path.

    The values are sample means, never single positions, because the positions of one sample are correlated. On the
    train path the normalization of earlier layers couples the samples, and F is far below 1 even in a healthy network
    (docs/explanation/ladder.md).

    Args:
        batches: Sums over K micro-batches of each layer; K > 1.
        image_squares: Sum of squares of the sample means (in units of d) per replicate.
        size: Samples per micro-batch, N > 1.
    """
    from scipy.special import fdtrc  # scipy.stats takes half a second to import

    count = batches.segments.spread(batches.counts.sum(0))
    d, d_squared = batches.d.sum(0), batches.d_squared.sum(0)
    rounding = _ROUNDING * image_squares.sum(0)
    between = size * _above(d_squared - d.square() / count, rounding / size) / (count - 1)
    within = _above(image_squares.sum(0) - size * d_squared, rounding) / (count * (size - 1))
    ratio = (between / within).nan_to_num(nan=1.0, posinf=math.inf)
    p_value = torch.from_numpy(fdtrc((count - 1).numpy(), (count * (size - 1)).numpy(), ratio.numpy()))
    correlation = (between - within) / (between + (size - 1) * within)
    same = (between == 0) & (within == 0)
    return Variance(torch.where(same, 1.0, p_value), correlation.nan_to_num(0.0))


def false_discovery_rates(p_values: Float[Tensor, " tests"]) -> Float[Tensor, " tests"]:
    """The p-values of many tests, adjusted: of those at most q, a part of at most q is expected to be true hypotheses.

    By Benjamini & Hochberg (1995); the tests are independent, or depend on each other positively.
    """
    order = p_values.argsort(descending=True)
    ranks = torch.arange(len(p_values), 0, -1)
    rates = torch.empty_like(p_values)
    rates[order] = (p_values[order] * len(p_values) / ranks).clamp(max=1).cummin(0).values
    return rates


def _above(value: Tensor, rounding: Tensor) -> Tensor:
    """``value``, or 0 where it is not larger than the rounding error of subtracting equal sums."""
    return torch.where(value > rounding, value, 0.0)


def draw(
    means: Means,
    counts: Float[Tensor, "replicates layers"],
    image_squares: Float[Tensor, "replicates channels"],
    pool: Images,
    size: int,
    seed: int,
    population: float = math.inf,
) -> Regrouped:
    """What micro-batches of ``size`` samples drawn at random would give: the same samples for all layers.

    Means and variances over all samples are exact, from sums. The pool is needed only for the ratio of E[s_B] to the
    root of E[v_B], which is close to 1 and hardly varies between pools.

    Args:
        means, counts: Means and counts of the micro-batches as loaded.
        image_squares: Sum of squares of the sample means (in units of d) per replicate.
        pool: At least ``size`` samples.
        size: Samples per micro-batch.
        seed: Seed of the random orders.
        population: Samples of the whole data set, where it is finite and none is drawn twice.
    """
    segments = means.segments
    images = segments.spread(leave_one_out(counts) * size).clamp(min=2)
    squares = leave_one_out(image_squares) / images
    spread = (squares - means.d.square()).clamp(min=0)
    within = (means.pooled - spread).clamp(min=0)
    variance = within + (1 - 1 / size) * spread * images / (images - 1)
    orders = _orders(pool.mean.shape[0], size, seed)
    groups, used = orders.flatten(0, 1), orders[0].numel()
    pooled, root, rho = variance.new_empty(3, variance.shape[1])
    effects = variance.new_zeros(len(groups), len(segments.sizes))
    width = max(1, _CHUNK_VALUES // len(groups))
    for start in range(0, variance.shape[1], width):
        block = slice(start, start + width)
        pooled[block], root[block], rho[block], effect = _regroup(
            pool.mean[:, block], pool.variance[:, block], groups, means.eps[block], variance[0, block]
        )
        segments.add_sums(effects, effect, start)
    ratio = torch.where(pooled > 0, root / pooled.sqrt(), 0.0)
    # 1 - ratio is the spread of v_B. Batches drawn from n samples without repetition lack size / n of it: here n is
    # that of the pool, and should be that of the data.
    ratio = 1 - (1 - ratio) * (1 - size / population) / (1 - size / used)
    rho_r = ratio * variance.sqrt()
    change, chance, excess = _without_replicates(effects / segments.sizes, orders, pool.replicate[:used], len(counts))
    part = (used / (counts.sum(0) * size)).clamp(max=1)
    return Regrouped(variance, rho_r, rho, change, chance, excess, part)


def regrouped_batches(images: int, size: int) -> int:
    """How many micro-batches ``draw`` forms from a pool of ``images`` samples."""
    groups = images // size
    return groups * _number_of_orders(groups, size) if groups else 0


def _number_of_orders(groups: int, size: int) -> int:
    fewest, most = _ORDERS if size > 1 else (1, 1)  # for single samples every order gives the same
    return min(max(fewest, math.ceil(REGROUPED / groups)), most)


def _orders(images: int, size: int, seed: int) -> Int[Tensor, "orders groups size"]:
    """Random orders of the first samples that fill whole micro-batches."""
    groups = images // size
    generator = torch.Generator().manual_seed(seed)
    number = _number_of_orders(groups, size)
    drawn = [torch.randperm(groups * size, generator=generator) for _ in range(number)]
    return torch.stack(drawn).view(number, groups, size)


def _regroup(
    mean: Float[Tensor, "images channels"],
    variance: Float[Tensor, "images channels"],
    groups: Int[Tensor, "groups size"],
    eps: Float[Tensor, " channels"],
    drawn: Float[Tensor, " channels"],
) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "groups channels"]]:
    """E[v_B], E[rho s_B] and E[rho] over all groups of samples, and D of each group.

    D is up to a constant, and linearized in E[s_B] and E[rho] at fixed E[v_B].

    Args:
        mean, variance: As in ``Images``.
        groups: The samples in each.
        drawn: The variance of micro-batches drawn at random.
    """
    mean = mean.double()
    mean -= mean.mean(0)  # against cancellation
    squares = variance.double() + mean.square()
    # gathers and adds at once, without a copy of the samples for every group
    centre, found = (F.embedding_bag(groups, part / groups.shape[1], mode="sum") for part in (mean, squares))
    found.addcmul_(centre, centre, value=-1).clamp_(min=0)
    inverse = torch.add(found, eps, out=centre).rsqrt_()
    rho_std = found * inverse
    rho = inverse.mul_(rho_std)
    pooled, root, whole = found.mean(0), rho_std.mean(0), rho.mean(0)
    slope = torch.where(pooled > 0, -2 * (drawn / pooled).sqrt() / (drawn + eps).sqrt(), 0.0)
    half = torch.where(pooled > 0, root / (2 * pooled), 0.0)
    return pooled, root, whole, rho.addcmul_(rho_std, slope).addcmul_(found, slope * half, value=-1)


def _without_replicates(
    effects: Float[Tensor, "all layers"],
    orders: Int[Tensor, "orders groups size"],
    replicate: Int[Tensor, " images"],
    replicates: int,
) -> tuple[Float[Tensor, "estimates layers"], Float[Tensor, " layers"], Float[Tensor, " layers"]]:
    """Change of each layer's D when the pool's samples of a replicate are left out, and the noise of the orders.

    Averaged over random orders, D is a U-statistic of the samples, to which each sample contributes ``size / images``
    times its own part (Hoeffding 1948). The parts are averages over a few orders only, so they vary more than they
    would over all orders. By how much is known from how a sample's part varies between orders; half of that is called
    excess, since single parts do not show that pairs of samples matter too (docs/decisions/0030).

    Args:
        effects: D of the groups of all orders, one order after the other.

    Returns:
        The change; the variance of D due to the orders; and what they add to the jackknife's variance of the changes.
    """
    number, (each, size), layers = len(orders), orders.shape[1:], effects.shape[1]
    images = each * size
    change = effects.new_zeros(1 + replicates, layers)
    if number < 2:
        return change, effects.new_zeros(layers), effects.new_zeros(layers)
    effects = effects - effects.mean(0)
    group = orders.flatten(1).argsort(1) // size + each * torch.arange(number)[:, None]  # of each sample in each order
    own = F.embedding_bag(group.T.contiguous(), effects, mode="mean")
    sums = effects.new_zeros(replicates, layers).index_add_(0, replicate, own)
    held = torch.bincount(replicate, minlength=replicates)
    change[1:] = -size * sums / (images - held).clamp(min=1)[:, None]
    groups = int((held > 0).sum())
    between = size * effects.square().sum(0) - number * own.square().sum(0)  # squares of what differs between orders
    noise = between / (images * (number - 1)) / number  # of one sample's part
    excess = 0.5 * size**2 * noise / images * groups / max(groups - 1, 1)
    return change, effects.var(0) / len(effects), excess
