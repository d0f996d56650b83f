"""Batch Renorm with the statistics of all processes (internal; users call ``bnprobe.nn.functional``).

Moments are merged by count (Chan et al. 1983), so batches of different sizes get the right weights. The backward pass
sums over the processes what the gradient through the common statistics needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from bnprobe.nn.kernels import BatchMoments, Renorm, batch_moments, normalize
from bnprobe.nn.plain import folded
from bnprobe.stats.moments import wide


def processes(group: Any) -> int:
    """Number of processes in a group; 1 without ``torch.distributed``."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(group)


def synchronized_renorm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, renorm: Renorm, group: Any
) -> Tensor:
    """``functional.sync_batch_renorm`` in training, in several processes."""
    return _differentiably(input, weight, bias, renorm, group)


def merge(moments: Tensor) -> BatchMoments:
    """Merge the moments of the processes.

    Args:
        moments: Shape (processes, 2 * channels + 1), float64. Each row holds the mean and the biased variance of every
            channel, then the count.

    Returns:
        Mean, biased variance and count over all processes, float64; 0 where no process has values.
    """
    channels = (moments.shape[1] - 1) // 2
    means, variances, counts = moments.split((channels, channels, 1), dim=1)
    count = counts.sum()
    divisor = count.clamp(min=1)
    mean = (counts * means).sum(0) / divisor
    variance = (counts * (variances + (means - mean).square())).sum(0) / divisor
    return BatchMoments(mean, variance, count)


class _SyncRenormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, renorm: Renorm, group: Any
    ) -> Tensor:
        dtype = wide(input.dtype)
        merged = merge(_gather(_own_moments(input, renorm.eps), group))
        batch = BatchMoments(merged.mean.to(dtype), merged.variance.to(dtype), merged.count)
        invstd = (batch.variance + renorm.eps).rsqrt_()
        r, d = renorm.step(batch, invstd)
        ctx.save_for_backward(input, weight, batch.mean, invstd, r, d, merged.count)
        ctx.group = group
        return normalize(input, *folded(r, d, weight, bias), batch, invstd, renorm.eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of weight and bias are local: DDP averages them, as for any other parameter."""
        x, weight, mean, invstd, r, d, count = ctx.saved_tensors
        shape = (1, -1, *[1] * (x.dim() - 2))
        axes = (0, *range(2, x.dim()))
        gradient = grad.to(mean.dtype)
        xhat = (x.to(mean.dtype) - mean.view(shape)) * invstd.view(shape)
        sums = torch.stack([gradient.sum(axes), (gradient * xhat).sum(axes)])
        grad_weight = r * sums[1] + d * sums[0] if ctx.needs_input_grad[1] else None
        grad_bias = sums[0].clone() if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, None, None
        distributed.all_reduce(sums, group=ctx.group)
        by_gradient, by_xhat = (sums / count.to(sums.dtype)).view(2, *shape)
        scale = (r if weight is None else weight * r) * invstd
        grad_input = (gradient - by_gradient - xhat * by_xhat) * scale.view(shape)
        return grad_input.to(x.dtype), grad_weight, grad_bias, None, None


_differentiably: Callable[..., Tensor] = _SyncRenormalize.apply


def _own_moments(input: Tensor, eps: float) -> Tensor:
    """Mean, biased variance and count of this process, in float64, shape (2 * channels + 1,)."""
    if input.numel() == 0:
        return torch.zeros(2 * input.shape[1] + 1, dtype=torch.float64, device=input.device)
    own = batch_moments(input, eps)
    count = torch.full((1,), input.numel() // input.shape[1], dtype=torch.float64, device=input.device)
    return torch.cat([own.mean.double(), own.variance.double(), count])


def _gather(moments: Tensor, group: Any) -> Tensor:
    gathered = [torch.empty_like(moments) for _ in range(processes(group))]
    distributed.all_gather(gathered, moments, group=group)
    return torch.stack(gathered)
