"""Batch Renorm as the paper writes it (Ioffe 2017, algorithm 1): slow, obvious, in float64, by autograd.

Nothing here comes from bnprobe, so that an error there cannot hide here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Limits:
    """What r and d are clipped to, and the rest of a layer's settings."""

    r_max: float = 3.0
    d_max: float = 5.0
    momentum: float = 0.01
    eps: float = 1e-5


def algorithm_1(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, limits: Limits
) -> tuple[Tensor, Tensor, Tensor]:
    """One training step, channel by channel.

    Args:
        x: Shape (N, C, *space).
        running_mean, running_var, weight, bias: Shape (C,).

    Returns:
        (output, running mean, running variance) after the step.
    """
    outputs, means, variances = [], [], []
    for channel in range(x.shape[1]):
        values = x[:, channel].double()
        mean, running_deviation = values.mean(), (running_var[channel].double() + limits.eps).sqrt()
        variance = (values - mean).square().mean()
        deviation = (variance + limits.eps).sqrt()
        r = (deviation / running_deviation).detach().clamp(1 / limits.r_max, limits.r_max)
        d = ((mean - running_mean[channel]) / running_deviation).detach().clamp(-limits.d_max, limits.d_max)
        xhat = (values - mean) / deviation * r + d
        outputs.append(weight[channel].double() * xhat + bias[channel].double())
        means.append(_average(running_mean[channel], mean, limits.momentum))
        unbiased = variance * values.numel() / (values.numel() - 1)
        variances.append(_average(running_var[channel], unbiased, limits.momentum))
    return torch.stack(outputs, dim=1), torch.stack(means), torch.stack(variances)


def _average(running: Tensor, new: Tensor, momentum: float) -> Tensor:
    return (1 - momentum) * running.double() + momentum * new.detach()
