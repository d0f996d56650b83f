"""Means, biased variances, and the mismatch of one batch and channel; see docs/explanation/equations.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RELATIVE_ERROR = 1e-5
"""Relative error of a row's variance above which it is computed again from centred values."""

_CHUNK_VALUES = 2**20
"""Values squared at a time if a temporary tensor is needed: small enough for a CPU's cache."""

_CUDA_CHUNK_VALUES = 2**26
"""Values of a half-precision tensor widened at a time on CUDA, which limits the extra memory to 256 MiB."""

_PIECE, _HALF_PIECE = 2**16, 2**12
"""Positions whose squares ``vector_norm`` may sum in float32: it adds one by one, so rounding grows with their number.

The few distinct values of half precision have squares that may all round in the same direction; smaller pieces
cost no more.
"""

_FEW = 16
"""Positions that are summed in float64, which costs little more: the variance of so few is often small by chance."""

Moments = tuple[Float[Tensor, "rows channels"], Float[Tensor, "rows channels"]]


def row_moments(x: Float[Tensor, "rows channels *space"], floor: float = 0.0) -> Moments:
    """Mean and biased variance of each row and channel over the spatial positions.

    On CPU ``mean`` and ``vector_norm`` read x twice and are 10 to 40 times faster than ``var_mean``. Their difference
    suffers from cancellation where |mean| >> std; such channels are computed again from centred values.

    Args:
        x: Input of a normalization layer, any floating dtype, any memory format.
        floor: Variance below which precision does not matter (the layer's eps): rows with a far smaller variance are
            not computed again.

    Returns:
        (mean, variance), each float64 of shape (rows, channels). The variance is over the spatial positions of
        one row only: exactly 0 where there is one position.
    """
    if x.dim() == 2 or x.shape[2:].numel() == 1:
        mean = x.flatten(1).double()
        return mean, torch.zeros_like(mean)
    if x.is_cuda:
        mean, variance = _welford(x, tuple(range(2, x.dim())))
        return mean.double(), variance.double()
    return _cpu_moments(x, floor)


def pool_moments(mean: Tensor, variance: Tensor, size: int) -> Moments:
    """Pool every ``size`` consecutive rows into one (Chan et al. 1983, equal counts).

    Args:
        mean, variance: Shape (rows, channels), biased variances; all rows represent the same number of values.
        size: Rows per group; must divide the number of rows.

    Returns:
        (mean, variance) of shape (rows / size, channels); the variance is biased and includes the spread between
        the pooled rows.
    """
    means = mean.unflatten(0, (-1, size))
    pooled = means.mean(1)
    offset = means - pooled.unsqueeze(1)
    return pooled, torch.addcmul(variance.unflatten(0, (-1, size)), offset, offset).mean(1)


@dataclass(frozen=True)
class RowSums:
    """What reading an input once gives: moments that are still to be computed.

    Attributes:
        mean: Of each row and channel; a row may be a group of samples.
        squares: Sum of the squares over the positions; not yet checked for cancellation.
        positions: How many there are; None: ``squares`` is the biased variance itself, without cancellation.
    """

    mean: Float[Tensor, "rows channels"]
    squares: Float[Tensor, "rows channels"]
    positions: int | None


def row_sums(x: Float[Tensor, "rows channels *space"]) -> RowSums:
    """Of each row and channel over the spatial positions: three operators for a contiguous input of usual size."""
    if x.dim() == 2 or x.shape[2:].numel() == 1:
        mean = x.flatten(1).to(wide(x.dtype), copy=True)  # the input may be written into before they are pooled
        return RowSums(mean, torch.zeros_like(mean), None)
    space, positions = tuple(range(2, x.dim())), x.shape[2:].numel()
    if x.is_cuda:
        return RowSums(*_welford(x, space), None)
    if positions <= _FEW and x.is_contiguous():
        norm: Tensor = torch.linalg.vector_norm(x, dim=space, dtype=torch.float64)
        return RowSums(x.mean(space, dtype=torch.float64), norm.square_(), positions)
    return RowSums(x.mean(space, dtype=wide(x.dtype)), _square_sums(x), positions)


def group_sums(x: Float[Tensor, "rows channels *space"], size: int) -> RowSums:
    """Of every ``size`` consecutive rows together, in one operator, which is slow on CPU."""
    groups = x.unflatten(0, (-1, size))
    return RowSums(*_welford(groups, (1, *range(3, groups.dim()))), None)


def _cpu_moments(x: Tensor, floor: float) -> Moments:
    mean, variance = _fast_moments(x)
    limit = RELATIVE_ERROR / torch.finfo(wide(x.dtype)).eps
    lowest, highest = torch.stack(mean.square().sub_(variance, alpha=limit).aminmax()).tolist()
    certain = -math.inf < lowest and highest <= limit * floor  # neither is so of NaN
    return (mean, variance) if certain else _careful_moments(x, mean, variance, limit, floor)


def _careful_moments(x: Tensor, mean: Tensor, variance: Tensor, limit: float, floor: float) -> Moments:
    """The moments with those channels computed again that overflowed or lost digits to cancellation."""
    overflown = (~torch.isfinite(mean + variance)).any(0)
    if overflown.any():  # or NaN or Inf in x, which remain
        channels = overflown.nonzero().squeeze(1)
        exact = torch.var_mean(x.index_select(1, channels).double(), tuple(range(2, x.dim())), correction=0)
        variance[:, channels], mean[:, channels] = exact
    risky = (mean.square() > limit * (variance + floor)).any(0)
    if risky.any():
        channels = risky.nonzero().squeeze(1)
        centred = x.index_select(1, channels).to(wide(x.dtype))
        shift = mean[:, channels].to(centred.dtype)
        centred -= shift.reshape(*shift.shape, *[1] * (x.dim() - 2))
        offset, spread = _fast_moments(centred)
        mean[:, channels] = shift.double() + offset
        variance[:, channels] = spread
    return mean, variance


def _fast_moments(x: Tensor) -> Moments:
    sums = row_sums(x)
    mean = sums.mean.double()
    return mean, sums.squares.double().div_(x.shape[2:].numel()).addcmul_(mean, mean, value=-1).clamp_min_(0.0)


def _square_sums(x: Tensor) -> Tensor:
    """Sum of squares over the spatial positions, of shape (rows, channels)."""
    space, positions, dtype = tuple(range(2, x.dim())), x.shape[2:].numel(), wide(x.dtype)
    if x.is_contiguous():
        most = _PIECE if x.dtype == dtype else _HALF_PIECE
        if positions <= most:
            norm: Tensor = torch.linalg.vector_norm(x, dim=space, dtype=dtype)
            return norm.square_()
        pieces = x.flatten(2).split(most, dim=2)
        norms = [torch.linalg.vector_norm(piece, dim=2, dtype=dtype) for piece in pieces]
        return torch.stack(norms).double().square_().sum(0)
    # vector_norm is 10 to 20 times slower when channels are innermost; squaring in cache-sized pieces is not.
    rows = max(1, _CHUNK_VALUES // x[0].numel())
    return torch.cat([part.to(dtype).square().sum(space) for part in x.split(rows)])


def _welford(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in one pass without cancellation, nor a decision on the host that waits for the device.

    Args:
        x: On CUDA; on CPU it is slow.
        axes: Not the first.
    """
    rows = x.shape[0] if wide(x.dtype) == x.dtype else max(1, _CUDA_CHUNK_VALUES // x[0].numel())
    parts = [torch.var_mean(part.to(wide(x.dtype)), axes, correction=0) for part in x.split(rows)]
    if len(parts) == 1:
        variance, mean = parts[0]
        return mean, variance
    return torch.cat([mean for _, mean in parts]), torch.cat([variance for variance, _ in parts])


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for statistics of an input of this dtype: at least float32."""
    if dtype in (torch.float32, torch.float64):
        return dtype  # without an operator
    return torch.promote_types(dtype, torch.float32)


def bessel(values: int) -> float:
    """n / (n - 1), which makes the biased variance of n values unbiased; 1 for a single value."""
    return values / (values - 1) if values > 1 else 1.0


@dataclass(frozen=True)
class Corrections:
    """r, d, d^2, rho = v_B / (v_B + eps) and D per micro-batch and channel, float64.

    ``r_clipped`` and ``d_clipped`` are the corrections that the layer itself applies in training: 1 and 0 for BN.
    """

    r: Float[Tensor, "batches channels"]
    d: Float[Tensor, "batches channels"]
    d_squared: Float[Tensor, "batches channels"]
    rho: Float[Tensor, "batches channels"]
    mismatch: Float[Tensor, "batches channels"]
    r_clipped: Float[Tensor, "batches channels"]
    d_clipped: Float[Tensor, "batches channels"]


def eps_of_std(variance: Tensor, eps: Tensor | float) -> Tensor:
    """What, added to a variance, is as much as ``eps`` added to the standard deviation: (s + eps)^2 - s^2."""
    return eps * (2 * variance.clamp(min=0).sqrt() + eps)


def corrections(
    batch_mean: Float[Tensor, "batches channels"],
    batch_variance: Float[Tensor, "batches channels"],
    running_mean: Float[Tensor, " channels"],
    running_variance: Float[Tensor, " channels"],
    eps: Float[Tensor, " channels"],
    r_max: Float[Tensor, " channels"] | None = None,
    d_max: Float[Tensor, " channels"] | None = None,
    gate: Float[Tensor, " channels"] | None = None,
    factor: Float[Tensor, " channels"] | None = None,
    std_eps: Float[Tensor, " channels"] | None = None,
) -> Corrections:
    """The correction factors of Batch Renorm (Ioffe 2017, arXiv 1702.03275, section 3), and the remaining mismatch D.

    With s_B = sqrt(v_B + eps) and s = sqrt(v + eps):  r = s_B / s,  d = (mu_B - m) / s, unclipped, so that
    z_test = r * xhat + d, where xhat is the input normalized by its batch. In training a layer gives
    z_train = r' * xhat + d' (BN: r' = 1, d' = 0; Batch Renorm: r and d clipped to its limits; gated BN: in between).
    The mismatch is D = mean of (z_train - z_test)^2 = (d - d')^2 + rho * (r - r')^2 with rho = v_B / (v_B + eps). This
    is exact for any data.

    Args:
        batch_mean, batch_variance: Statistics of each micro-batch; the variance is biased.
        running_mean, running_variance: The layer's buffers.
        eps: The layer's eps, per channel, because channels of several layers may be concatenated.
        r_max, d_max: Limits of Batch Renorm; None: plain BN, as with 1 and 0.
        gate: Weight of the uncorrected batch statistics, in [0, 1]; None: 0, i.e. corrected up to the limits.
        factor: Of the batch variance in s_B: n / (n - 1) where a layer normalizes with the unbiased one; None: 1.
        std_eps: Where it is above 0, a layer adds it to the standard deviation of the batch, instead of eps to its
            variance; eps is then what that comes to for the running variance. None: 0.
    """
    running_std = (running_variance + eps).sqrt()
    squared = batch_variance if factor is None else batch_variance * factor
    squared = squared + (eps if std_eps is None else torch.where(std_eps > 0, eps_of_std(squared, std_eps), eps))
    r = squared.sqrt().div_(running_std)
    d = (batch_mean - running_mean).div_(running_std)
    rho, d_squared = batch_variance / squared, d.square()
    r_clipped = r.new_ones(()).expand_as(r) if r_max is None else r.clamp(1 / r_max, r_max)
    d_clipped = d.new_zeros(()).expand_as(d) if d_max is None else d.clamp(-d_max, d_max)
    if gate is not None:
        r_clipped, d_clipped = r_clipped + gate * (1 - r_clipped), d_clipped - gate * d_clipped
    left = d_squared if d_max is None else (d - d_clipped).square_()
    mismatch = (r - r_clipped).square_().mul_(rho).add_(left)
    return Corrections(r, d, d_squared, rho, mismatch, r_clipped, d_clipped)


def statistics_distance(
    mean: Float[Tensor, "batches channels"],
    variance: Float[Tensor, "batches channels"],
    reference_mean: Float[Tensor, "batches channels"],
    reference_variance: Float[Tensor, "batches channels"],
    eps: float,
) -> float:
    """Root mean square difference of two sets of batch statistics, in units of the reference's standard deviation."""
    return float(square_distances(mean, variance, reference_mean, reference_variance, eps).mean().sqrt())


def square_distances(
    mean: Float[Tensor, "batches channels"],
    variance: Float[Tensor, "batches channels"],
    reference_mean: Float[Tensor, "batches channels"],
    reference_variance: Float[Tensor, "batches channels"],
    eps: Float[Tensor, " channels"] | float,
) -> Float[Tensor, "batches channels"]:
    """Of each batch and channel (mu - mu_ref)^2 / (v_ref + eps) + (s / s_ref - 1)^2."""
    reference_std = (reference_variance + eps).sqrt()
    shift = (mean - reference_mean) / reference_std
    scale = (variance + eps).sqrt() / reference_std - 1
    return shift.square() + scale.square()
