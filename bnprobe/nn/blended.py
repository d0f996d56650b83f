"""Normalizing with running statistics, wholly or in part: what frozen, gated and instance renorm share (internal)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.nn.kernels import AffineMap, Statistics, snapshot
from bnprobe.stats.moments import wide


def widened(input: Tensor) -> Tensor:
    """The input in at least float32: half precision is too coarse for statistics."""
    return input.to(wide(input.dtype))


def normalize_blended(
    x: Tensor, own: Statistics, towards_running: AffineMap, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Compute weight * map(z) + bias, with z = (x - own.mean) / own.deviation, in one pass after centring.

    Args:
        x: Shape (samples, channels, *space).
        own: Statistics of x, of shape (channels,) or (samples, channels); the variance is biased.
        towards_running: The map, of the same shape as ``own``.
        weight, bias: Shape (channels,); None stands for 1 and 0.
    """
    scaling = AffineMap(own.deviation.reciprocal(), torch.zeros_like(own.mean))
    space = (1,) * (x.dim() - 2)
    # Centre first: folding the mean into the shift would lose digits where the mean is large against the deviation.
    return scaling.then(towards_running).fold(weight, bias)(x - own.mean.unflatten(-1, (-1, *space)))


def running_statistics(layer: _BatchNorm) -> Statistics:
    """The layer's running mean and (unbiased) running variance, in at least float32."""
    mean, variance = layer.running_mean, layer.running_var
    assert mean is not None  # these layers always track
    assert variance is not None
    if layer.training:  # at inference nothing updates them, and exporters know no operator of ours
        mean, variance = snapshot(mean), snapshot(variance)
    return Statistics(widened(mean), widened(variance), layer.eps)


def normalize_running(layer: _BatchNorm, input: Tensor, updated_before_backward: bool = False) -> Tensor:
    """Normalize as BN does at inference.

    Args:
        layer: Has running statistics.
        input: Shape (N, C, *space).
        updated_before_backward: The running statistics will be updated before the backward pass, which needs the
            values used here: copy them.
    """
    statistics = layer.running_mean, layer.running_var
    mean, variance = (each.clone() if updated_before_backward and each is not None else each for each in statistics)
    # Not F.batch_norm: a scan intercepts that to measure BN.
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(input, layer.weight, layer.bias, mean, variance, False, 0.0, layer.eps, cudnn)


@torch.no_grad()
def update_running(layer: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move the running statistics as BN does.

    One value per channel has no variance: then only the running mean moves.

    Args:
        layer: Has running statistics.
        mean, variance: Of the batch, shape (channels,); the variance biased. The running one gets it unbiased.
        count: Values per channel.
    """
    running_mean, running_var, tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert running_mean is not None  # these layers always track
    assert running_var is not None
    assert tracked is not None
    tracked.add_(1)
    rate = 1 / tracked.to(mean.dtype) if layer.momentum is None else layer.momentum
    running_mean.add_((rate * (mean - running_mean)).to(running_mean.dtype))
    if count > 1:
        unbiased = variance * (count / (count - 1))
        running_var.add_((rate * (unbiased - running_var)).to(running_var.dtype))
