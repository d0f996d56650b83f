"""The moments of all calls of a pass at once, from what was read of their inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bnprobe.stats.moments import Moments, RowSums, pool_moments

_RELATIVE_ERROR = 2e-6
"""Relative error of a micro-batch's variance above which its moments are to be taken more carefully."""

_ANY = 1e200
"""No squared mean is more than so many variances; times a variance it is still a number, also where that is huge."""


def moments_of_sums(parts: Sequence[RowSums], size: int, pooled: bool, floor: float) -> tuple[list[Moments], list[int]]:
    """The moments of several inputs, in as many operators as for one.

    Args:
        parts: With the same number of rows.
        size: Rows per micro-batch.
        pooled: Pool the rows of every micro-batch.
        floor: Variance below which precision does not matter.

    Returns:
        (mean, biased variance) of each part, float64; and the positions of those that may have lost digits to
        cancellation, or overflown: where the variance of a micro-batch is small beside its squared mean. Variances of
        single rows are as exact as that of the micro-batch that they are in. This is the only look at values, which
        waits for the device; there is none where no part is a sum of squares.
    """
    mean = torch.cat([part.mean for part in parts], 1).double()
    variance = torch.cat([part.squares for part in parts], 1).double()
    widths = tuple(part.mean.shape[1] for part in parts)
    looked_at = any(part.positions is not None for part in parts)
    bounds: tuple[Tensor, Tensor] | None = None
    if looked_at:
        kinds = tuple((part.positions, part.mean.dtype) for part in parts)
        per_position, centre, bounds = _by_column(kinds, widths, floor, mean.device)
        centred = mean if centre is None else mean * centre
        variance.mul_(per_position).addcmul_(centred, mean, value=-1).clamp_min_(0.0)
    whole = (mean, variance) if size == 1 else pool_moments(mean, variance, size)
    uncertain = [] if bounds is None else _uncertain(*whole, *bounds, widths)
    mean, variance = whole if pooled else (mean, variance)
    return list(zip(mean.split(widths, 1), variance.split(widths, 1), strict=True)), uncertain


def _uncertain(mean: Tensor, variance: Tensor, limits: Tensor, offset: Tensor, widths: tuple[int, ...]) -> list[int]:
    excess = torch.addcmul(offset, mean, mean).addcmul_(variance, limits, value=-1)
    lowest, highest = torch.stack(excess.aminmax()).tolist()
    if -math.inf < lowest and highest <= 0:  # neither is so of NaN
        return []
    bad = ~((excess <= 0) & (excess > -math.inf)).all(0)
    return [position for position, part in enumerate(bad.split(widths)) if bool(part.any())]


@functools.lru_cache(maxsize=64)
def _by_column(
    kinds: tuple[tuple[int | None, torch.dtype], ...], widths: tuple[int, ...], floor: float, device: torch.device
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """The part of a position in the sums; whether the squared mean is to be subtracted (None: everywhere); the squared
    mean over the variance up to which the difference is exact; and the squared mean, negative, that is exact whatever
    the variance.
    """
    rows = [
        [1 / (positions or 1) for positions, _ in kinds],
        [float(positions is not None) for positions, _ in kinds],
        [_ANY if positions is None else _RELATIVE_ERROR / torch.finfo(dtype).eps for positions, dtype in kinds],
    ]
    with torch.inference_mode(False):
        values = torch.tensor(rows, dtype=torch.float64, device=device)
        part, centre, limits = values.repeat_interleave(torch.tensor(widths, device=device), 1)
        everywhere = all(positions is not None for positions, _ in kinds)
        return part, None if everywhere else centre, (limits, -floor * limits)
