"""How Batch Renorm is computed in one process: as fast as BN, since r and d only rescale what BN computes.

With r and d constant, ``weight * (r * xhat + d) + bias`` is BN of weight ``weight * r`` and bias ``bias + weight * d``.
The forward is moments and one multiply-add; the backward is PyTorch's own of BN with that weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnprobe.nn.affine import AffineMap, Statistics
from bnprobe.nn.moments import BatchMoments, batch_moments, wide
from bnprobe.nn.snapshot import snapshot


@dataclass(frozen=True)
class Renorm:
    """All that a training step of a layer needs beside input and parameters; see ``functional.batch_renorm``."""

    running_mean: Tensor
    running_var: Tensor
    momentum: float | Tensor
    eps: float
    r_max: float | Tensor
    d_max: float | Tensor
    clipped: Tensor | None

    def step(self, batch: BatchMoments) -> AffineMap:
        """r and d as scale and shift, clipped, from the running statistics; these are updated thereafter.

        To be called without grad mode: r and d are constants.
        """
        dtype = batch.mean.dtype
        mean, variance = (snapshot(buffer).to(dtype) for buffer in (self.running_mean, self.running_var))
        running, own = Statistics(mean, variance, self.eps), Statistics(batch.mean, batch.variance, self.eps)
        exact = AffineMap.between(own, running)
        limited = exact.clamp(self.r_max, self.d_max)
        if self.clipped is not None:
            _count_clipped(self.clipped, exact, limited)
        _average(self.running_mean, batch.mean, self.momentum)
        _average(self.running_var, batch.unbiased_variance(otherwise=self.running_var), self.momentum)
        return limited


def renormalize(input: Tensor, weight: Tensor | None, bias: Tensor | None, renorm: Renorm) -> Tensor:
    """A training step of ``functional.batch_renorm``."""
    if torch.compiler.is_compiling():
        return _traceable(input, weight, bias, renorm)
    return _differentiably(input, weight, bias, renorm)


class _Saved(NamedTuple):
    input: Tensor
    weight: Tensor | None
    mean: Tensor
    invstd: Tensor
    r: Tensor
    d: Tensor


class _Renormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, renorm: Renorm) -> Tensor:
        batch = batch_moments(input, renorm.eps)
        correction = renorm.step(batch)
        ctx.eps = renorm.eps
        invstd = (batch.variance + renorm.eps).rsqrt_()
        ctx.save_for_backward(input, weight, batch.mean, invstd, correction.scale, correction.shift)
        return normalize(input, correction.fold(weight, bias), batch, invstd, renorm.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        saved = _Saved(*ctx.saved_tensors)
        scale = saved.r if saved.weight is None else saved.weight * saved.r
        needed = ctx.needs_input_grad
        grad_input, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(
            _laid_out_as(saved.input, grad), saved.input, scale, None, None, saved.mean, saved.invstd, True, ctx.eps,
            [needed[0], needed[1], needed[1] or needed[2]],
        )  # fmt: skip
        grad_weight = saved.r * grad_scale + saved.d * grad_shift if needed[1] else None
        return grad_input, grad_weight, grad_shift if needed[2] else None, None


_differentiably: Callable[..., Tensor] = _Renormalize.apply


def normalize(input: Tensor, folded: AffineMap, batch: BatchMoments, invstd: Tensor, eps: float) -> Tensor:
    """``(x - mean) * invstd * scale + shift``, in the dtype and memory format of the input."""
    if input.is_cuda:
        return torch.batch_norm_elemt(input, folded.scale, folded.shift, batch.mean, invstd, eps)
    return torch.batch_norm(input, folded.scale, folded.shift, batch.mean, batch.variance, False, 0.0, eps, False)


def _laid_out_as(input: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory format of the input: PyTorch's kernel is up to 50 times slower where they differ."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    other = formats.get(input.dim())
    if other and input.is_contiguous(memory_format=other) and not input.is_contiguous():
        return grad.contiguous(memory_format=other)
    return grad.contiguous() if input.is_contiguous() else grad


def _traceable(input: Tensor, weight: Tensor | None, bias: Tensor | None, renorm: Renorm) -> Tensor:
    """The same in operations that a compiler can differentiate and fuse."""
    x = input.to(wide(input.dtype))
    variance, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
    with torch.no_grad():
        correction = renorm.step(BatchMoments(mean, variance, x.numel() // x.shape[1]))
    folded = correction.fold(weight, bias)
    invstd = (variance + renorm.eps).rsqrt()
    centred = x - mean.unflatten(0, (-1, *[1] * (x.dim() - 2)))
    return AffineMap(folded.scale * invstd, folded.shift)(centred).to(input.dtype)


def _average(running: Tensor, new: Tensor, momentum: float | Tensor) -> None:
    running.lerp_(new.to(running.dtype), momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum)


def _count_clipped(counts: Tensor, exact: AffineMap, limited: AffineMap) -> None:
    """NaN, of non-finite activations, counts as clipped."""
    r, d = (exact.scale != limited.scale).sum(), (exact.shift != limited.shift).sum()
    counts.add_(torch.stack([r, d, torch.full_like(r, exact.scale.numel())]))
