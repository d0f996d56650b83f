"""Normalization layers written from their equations, to be read; tests hold them against torch's and bnprobe.nn's.

All take inputs of shape (samples, channels, *positions). A layer normalizes with a mean and a variance, then scales and
shifts each channel: y = weight (x - mean) / sqrt(variance + eps) + bias. What differs is over which values of the input
mean and variance are taken, and whether others are used at inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.nn.limits import RenormSchedule
from bnprobe.numbers import percent

EPS = 1e-5


class Affine(nn.Module):
    """What all layers end with: a weight and a bias for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def affine(self, normalized: Tensor) -> Tensor:
        """Scale and shift each channel."""
        return normalized * per_channel(self.weight, normalized) + per_channel(self.bias, normalized)


class BatchNorm(Affine):
    """Statistics of the batch in training, their moving average at inference (Ioffe & Szegedy 2015, algorithms 1, 2).

    The variance that normalizes is biased, the one that is averaged unbiased.

    Args:
        channels: Dimension 1 of the input.
        momentum: Weight of the newest batch in the moving averages.
        frozen: Whether the moving averages normalize in training too, and stay as they are.
        eps: Added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, frozen: bool = False, eps: float = EPS) -> None:
        super().__init__(channels)
        self.momentum, self.frozen, self.eps = momentum, frozen, eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        if not self.training or self.frozen:
            return self.affine(standardize(x, self.running_mean, self.running_var, self.eps))
        mean, variance = batch_moments(x)
        normalized = self.normalize(x, mean, variance)
        self.track(mean.detach(), variance.detach(), x.numel() // x.shape[1])
        return self.affine(normalized)

    def normalize(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """With the statistics of the batch, through which gradients flow."""
        return standardize(x, mean, variance, self.eps)

    def track(self, mean: Tensor, variance: Tensor, values: int) -> None:
        """Move the averages toward the batch, whose biased variance is over so many values."""
        self.running_mean += self.momentum * (mean - self.running_mean)
        self.running_var += self.momentum * (variance * values / max(values - 1, 1) - self.running_var)


class BatchNormByHand(BatchNorm):
    """Batch norm whose gradients are written by hand too."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        if not self.training or self.frozen:
            return super().forward(x)
        y, mean, variance = _batch_transform(x, self.weight, self.bias, self.eps)
        self.track(mean, variance, x.numel() // x.shape[1])
        return y


class _BatchTransform(torch.autograd.Function):
    """What batch norm does in training, and its gradients by the chain rule (Ioffe & Szegedy 2015, section 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = batch_moments(x)
        normalized = standardize(x, mean, variance, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, mean, variance, normalized, weight)
        ctx.mark_non_differentiable(mean, variance)
        return normalized * per_channel(weight, x) + per_channel(bias, x), mean, variance

    @staticmethod
    def backward(ctx: Any, by_y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """From the gradient of the loss by y to those by x, weight and bias."""
        x, mean, variance, normalized, weight = ctx.saved_tensors
        values = x.numel() // x.shape[1]
        centered = x - per_channel(mean, x)
        sigma = (variance + ctx.eps).sqrt()
        by_normalized = by_y * per_channel(weight, x)
        by_variance = _sums(by_normalized * centered) * -0.5 / sigma**3
        by_mean = -_sums(by_normalized) / sigma - by_variance * 2 * _sums(centered) / values
        by_x = (
            by_normalized / per_channel(sigma, x)
            + per_channel(by_variance, x) * 2 * centered / values
            + per_channel(by_mean, x) / values
        )
        return by_x, _sums(by_y * normalized), _sums(by_y), None


_batch_transform: Callable[..., tuple[Tensor, Tensor, Tensor]] = _BatchTransform.apply


class BatchRenorm(BatchNorm):
    """Batch norm whose output in training is that at inference, but for limits (Ioffe 2017, algorithm 1).

    r = sigma_batch / sigma and d = (mean_batch - mean) / sigma are constants to the gradient. With r_max = 1 and
    d_max = 0 the layer is batch norm.

    Args:
        channels: Dimension 1 of the input.
        momentum: Weight of the newest batch in the moving averages.
        r_max, d_max: Limits: 1 / r_max <= r <= r_max and -d_max <= d <= d_max.
    """

    def __init__(self, channels: int, momentum: float = 0.1, r_max: float = 3.0, d_max: float = 5.0) -> None:
        super().__init__(channels, momentum)
        self.r_max, self.d_max = r_max, d_max

    def normalize(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """With the statistics of the batch, then back to those of the moving averages."""
        r, d = corrections(mean.detach(), variance.detach(), self.running_mean, self.running_var)
        r, d = r.clamp(1 / self.r_max, self.r_max), d.clamp(-self.d_max, self.d_max)
        return standardize(x, mean, variance) * per_channel(r, x) + per_channel(d, x)


_WARM_UP, _D_OPEN, _R_OPEN = 0.25, 0.5, 0.75

SCHEDULE = (
    f"The limits of Batch Renorm open over training: closed for {percent(_WARM_UP)} of the steps, then d_max rises to 5"
    f" at {percent(_D_OPEN)} of them and r_max to 3 at {percent(_R_OPEN)}. In the paper they open earlier, after 4% of"
    " 130,000 steps; here that would be too few for the moving averages to forget where they started."
)
"""What reports say of `opening`."""


def opening(steps: int) -> RenormSchedule:
    """Limits for so many steps of training: first those of batch norm, then wider (Ioffe 2017, sections 3 and 4)."""
    return RenormSchedule(steps, warmup=_WARM_UP, r_ramp=_R_OPEN, d_ramp=_D_OPEN)


def set_limits(model: nn.Module, r_max: float, d_max: float) -> None:
    """Set the limits of all Batch Renorm layers, e.g. at each step of a schedule."""
    for layer in model.modules():
        if isinstance(layer, BatchRenorm):
            layer.r_max, layer.d_max = r_max, d_max


class PerWorkerBatchNorm(BatchNorm):
    """Batch norm of a batch that is split over workers, each of which has the statistics of its own part alone.

    The moving averages are those of the first worker, as ``DistributedDataParallel`` keeps them.

    Args:
        channels: Dimension 1 of the input.
        workers: Into how many parts of consecutive samples a batch is split.
        momentum, frozen: As of `BatchNorm`.
    """

    def __init__(self, channels: int, workers: int, momentum: float = 0.1, frozen: bool = False) -> None:
        super().__init__(channels, momentum, frozen)
        self.workers = workers

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        if not self.training or self.frozen:
            return super().forward(x)
        first, *others = x.chunk(self.workers)
        normalized = [self.affine(self.normalize(part, *batch_moments(part))) for part in others]
        return torch.cat([super().forward(first), *normalized])


class GroupNorm(Affine):
    """Statistics of groups of channels of one sample, in both modes (Wu & He 2018, arXiv 1803.08494).

    One group is layer norm, a group for each channel instance norm.

    Args:
        channels: Dimension 1 of the input.
        groups: Into how many they are divided.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        grouped = x.reshape(len(x), self.groups, -1)
        mean = grouped.mean(2, keepdim=True)
        variance = (grouped - mean).square().mean(2, keepdim=True)
        return self.affine(((grouped - mean) / (variance + EPS).sqrt()).reshape(x.shape))


def layer_norm(channels: int) -> GroupNorm:
    """Statistics of one sample over all channels and positions, as ``nn.GroupNorm(1, channels)``."""
    return GroupNorm(channels, 1)


def instance_norm(channels: int) -> GroupNorm:
    """Statistics of one channel of one sample."""
    return GroupNorm(channels, channels)


def group_norm(channels: int) -> GroupNorm:
    """Statistics of eight groups of channels, or of as many as divide their number."""
    return GroupNorm(channels, math.gcd(channels, 8))


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over samples and positions, each of shape (channels,)."""
    over = [0, *range(2, x.dim())]
    mean = x.mean(over)
    return mean, (x - per_channel(mean, x)).square().mean(over)


def corrections(mean: Tensor, variance: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
    """r = sigma_batch / sigma and d = (mean_batch - mean) / sigma of each channel (Ioffe 2017, section 3)."""
    sigma = (running_var + EPS).sqrt()
    return (variance + EPS).sqrt() / sigma, (mean - running_mean) / sigma


def mismatch(mean: Tensor, variance: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """d^2 + (1 - r)^2 of a batch, mean over channels; the mismatch D is its mean over batches."""
    r, d = corrections(mean, variance, running_mean, running_var)
    return (d.square() + (1 - r).square()).mean()


def standardize(x: Tensor, mean: Tensor, variance: Tensor, eps: float = EPS) -> Tensor:
    """(x - mean) / sqrt(variance + eps), channel by channel."""
    return (x - per_channel(mean, x)) / per_channel((variance + eps).sqrt(), x)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """A value for each channel, in a shape that meets that of the input."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def _sums(x: Tensor) -> Tensor:
    """Over samples and positions, shape (channels,)."""
    return x.sum([0, *range(2, x.dim())])
