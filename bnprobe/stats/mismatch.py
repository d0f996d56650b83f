"""Batch Renorm's r and d, and the mismatch D, from batch and running statistics alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Corrections:
    """r, d, rho = v_B / (v_B + eps) and D per micro-batch and channel, float64.

    ``r_clipped`` and ``d_clipped`` are the corrections that the layer itself applies in training: 1 and 0 for BN.
    """

    r: Float[Tensor, "batches channels"]
    d: Float[Tensor, "batches channels"]
    rho: Float[Tensor, "batches channels"]
    mismatch: Float[Tensor, "batches channels"]
    r_clipped: Float[Tensor, "batches channels"]
    d_clipped: Float[Tensor, "batches channels"]


def corrections(
    batch_mean: Float[Tensor, "batches channels"],
    batch_variance: Float[Tensor, "batches channels"],
    running_mean: Float[Tensor, " channels"],
    running_variance: Float[Tensor, " channels"],
    eps: Float[Tensor, " channels"],
    r_max: Float[Tensor, " channels"] | None = None,
    d_max: Float[Tensor, " channels"] | None = None,
    gate: Float[Tensor, " channels"] | None = None,
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
    """
    running_std = (running_variance + eps).sqrt()
    r = (batch_variance + eps).sqrt() / running_std
    d = (batch_mean - running_mean) / running_std
    rho = batch_variance / (batch_variance + eps)
    r_clipped = torch.ones_like(r) if r_max is None else r.clamp(1 / r_max, r_max)
    d_clipped = torch.zeros_like(d) if d_max is None else d.clamp(-d_max, d_max)
    if gate is not None:
        r_clipped, d_clipped = r_clipped + gate * (1 - r_clipped), d_clipped - gate * d_clipped
    mismatch = (d - d_clipped).square() + rho * (r - r_clipped).square()
    return Corrections(r, d, rho, mismatch, r_clipped, d_clipped)


def distance(
    mean: Float[Tensor, "batches channels"],
    variance: Float[Tensor, "batches channels"],
    reference_mean: Float[Tensor, "batches channels"],
    reference_variance: Float[Tensor, "batches channels"],
    eps: float,
) -> float:
    """Root mean square difference of two sets of batch statistics, in units of the reference's standard deviation.

    The square root of the mean over batches and channels of (mu - mu_ref)^2 / (v_ref + eps) + (s / s_ref - 1)^2.
    """
    reference_std = (reference_variance + eps).sqrt()
    shift = (mean - reference_mean) / reference_std
    scale = (variance + eps).sqrt() / reference_std - 1
    return float((shift.square() + scale.square()).mean().sqrt())
