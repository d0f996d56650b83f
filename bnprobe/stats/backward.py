"""Noise of the batch statistics in the backward pass, with a confidence interval."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bnprobe.records import Backward
from bnprobe.stats.intervals import log_interval


def backward_noise(
    gradient: Float[Tensor, "batches channels"],
    product: Float[Tensor, "batches channels"],
    square: Float[Tensor, "batches channels"],
) -> Backward | None:
    """Noise of E[g] and E[g * xhat], the batch statistics of BN's backward pass (Yan et al. 2020, arXiv 2001.06838).

    For each channel, the unbiased variances of E[g] and of E[g * xhat] over micro-batches are added and divided by the
    mean of g^2; the noise is the mean of this ratio over channels. If the n values of a batch are independent, g has
    mean 0 and g does not depend on xhat, each variance is E[g^2] / n, so the noise is 2 / n. The 95% interval is
    Student's t with the standard error of a delete-one jackknife over micro-batches (Efron 1982, chapter 3), which
    makes no assumption about the distribution of g.

    Args:
        gradient: E[g] of each micro-batch.
        product: E[g * xhat].
        square: E[g^2]. Channels where it is 0 in all micro-batches have no gradient and are left out.

    Returns:
        The noise and its interval; None with fewer than two micro-batches, or without any gradient. With two
        micro-batches there is no interval.
    """
    count = square.shape[0]
    live = (square > 0).any(0)
    if count < 2 or not bool(live.any()):
        return None
    means = torch.stack([gradient, product])[:, :, live]
    deviations = (means - means.mean(1, keepdim=True)).square()
    spread, squares = deviations.sum((0, 1)), square[:, live]
    noise = float((spread / (count - 1) / squares.mean(0)).mean())
    interval = None
    if count > 2:
        left_out = _delete_one(deviations.sum(0), spread, squares)
        # Pseudo-values centred on the noise: their mean is the noise, their standard error that of the jackknife.
        pseudo = noise - (count - 1) * (left_out - left_out.mean())
        interval = log_interval(count, float(pseudo.sum()), float(pseudo.square().sum()))
    return Backward(noise, interval, 2.0 / noise if noise > 0.0 else None)


def _delete_one(
    deviations: Float[Tensor, "batches channels"],
    spread: Float[Tensor, " channels"],
    squares: Float[Tensor, "batches channels"],
) -> Float[Tensor, " batches"]:
    """The noise with each micro-batch left out in turn; 0 where only that one had a gradient."""
    count = squares.shape[0]
    without = (spread - deviations * count / (count - 1)).clamp_min(0.0) / (count - 2)
    mean_square = (squares.sum(0) - squares) / (count - 1)
    return torch.where(mean_square > 0.0, without / mean_square, torch.nan).nanmean(1).nan_to_num(0.0)
