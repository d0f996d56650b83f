"""How Batch Renorm is computed in one process (internal; users call ``bnprobe.nn.functional``).

Two normalizations of x with statistics A and B differ by an affine map per channel, whatever the data:

    z_A = (x - mean_A) / sqrt(var_A + eps)        z_B = scale * z_A + shift
    scale = sqrt(var_A + eps) / sqrt(var_B + eps)         shift = (mean_A - mean_B) / sqrt(var_B + eps)

From batch to running statistics, (scale, shift) are the r and d of Batch Renormalization (Ioffe 2017, section 3). With
r and d constant, ``weight * (r * xhat + d) + bias`` is BN with weight ``weight * r`` and bias ``bias + weight * d``. So
Batch Renorm costs what BN costs: the forward pass is the moments and one multiply-add, and the backward pass is
PyTorch's own for BN with that weight. docs/explanation/batch-renorm.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bnprobe.nn import plain
from bnprobe.nn.plain import clipped_channels, unbiased, update_running
from bnprobe.stats.moments import RELATIVE_ERROR, wide

_LARGE = 2**15
"""Smallest batch, in values, for which two fast passes cost less than one exact pass."""

_ROW = (16, 2**16)
"""Fewest and most positions per sample for ``vector_norm``: it is slow for few, and inexact for many, since it adds the
squares one by one."""

_ADJACENT = (16, 2**17)
"""Fewest channels and values for which ``addcmul`` is faster than BN's own kernel where channels are adjacent."""


@dataclass(frozen=True)
class Statistics:
    """The mean and variance that a normalization uses.

    Attributes:
        mean: Any shape, e.g. (channels,), or (samples, channels) for statistics of single samples.
        variance: Broadcasts with ``mean``. Biased for batch and instance statistics; unbiased for the running variance.
        eps: Added to the variance before the square root.
    """

    mean: Tensor
    variance: Tensor
    eps: float = 1e-5

    @property
    def deviation(self) -> Tensor:
        """sqrt(variance + eps)."""
        return (self.variance + self.eps).sqrt()


@dataclass(frozen=True)
class AffineMap:
    """The map z -> scale * z + shift, per channel.

    Attributes:
        scale, shift: Shape (channels,) or (samples, channels), or any shapes that broadcast.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def between(cls, source: Statistics, target: Statistics) -> AffineMap:
        """The map from an input normalized with ``source`` to the same input normalized with ``target``.

        The shapes need only broadcast, e.g. from per-sample statistics, (samples, channels), to (channels,).
        """
        return cls(*plain.relative(source.mean, source.deviation, target.mean, target.deviation))

    def __call__(self, z: Tensor) -> Tensor:
        """Apply the map to z of shape (samples, channels, *space)."""
        space = (1,) * (z.dim() - 2)
        return torch.addcmul(self.shift.unflatten(-1, (-1, *space)), z, self.scale.unflatten(-1, (-1, *space)))

    def then(self, following: AffineMap) -> AffineMap:
        """This map followed by another one."""
        return AffineMap(following.scale * self.scale, following.scale * self.shift + following.shift)

    def clamp(self, r_max: float | Tensor, d_max: float | Tensor, r_min: float | Tensor | None = None) -> AffineMap:
        """The map with scale clipped to [r_min, r_max] and shift to [-d_max, d_max] (Ioffe 2017, algorithm 1).

        Args:
            r_max: At least 1; 1 makes the scale 1.
            d_max: At least 0; 0 makes the shift 0.
            r_min: At most 1; None: 1 / r_max.
        """
        return AffineMap(
            _clip(self.scale, 1 / r_max if r_min is None else r_min, r_max), _clip(self.shift, -d_max, d_max)
        )

    def blend(self, weight: float | Tensor) -> AffineMap:
        """The map that gives (1 - weight) * z + weight * (scale * z + shift).

        Args:
            weight: 0 gives the identity, 1 this map. A number, or a tensor that broadcasts, e.g. (channels,).
        """
        return AffineMap(1 + weight * (self.scale - 1), weight * self.shift)

    def fold(self, weight: Tensor | None, bias: Tensor | None) -> AffineMap:
        """This map followed by a layer's weight and bias, as one map.

        Args:
            weight, bias: Shape (channels,); None stands for 1 and 0.
        """
        return AffineMap(*plain.folded(self.scale, self.shift, weight, bias))

    def detach(self) -> AffineMap:
        """The same map, without gradient."""
        return AffineMap(self.scale.detach(), self.shift.detach())


def _as(buffer: Tensor, like: Tensor) -> Tensor:
    """In the dtype of another tensor; not through ``to``, which takes time where it does nothing."""
    return buffer if buffer.dtype == like.dtype else buffer.to(like.dtype)


def _clip(values: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.clamp(values, low.to(values), high.to(values))
    return torch.clamp(values, float(low), float(high))


@dataclass(frozen=True)
class BatchMoments:
    """Mean and variance of each channel over a batch.

    Attributes:
        mean: Shape (channels,), at least float32.
        variance: Biased; same shape and dtype.
        count: Values per channel; a tensor of shape () on the device where it was summed over processes.
    """

    mean: Tensor
    variance: Tensor
    count: int | Tensor

    def unbiased_variance(self, otherwise: Tensor) -> Tensor:
        """The variance with Bessel's correction; ``otherwise`` where there is only one value per channel."""
        if isinstance(self.count, Tensor):
            return unbiased(self.variance, self.count, otherwise)
        if self.count == 1:
            return otherwise
        return torch.add(self.variance, self.variance, alpha=1 / (self.count - 1))  # faster than times a number

    def biased_variance(self, otherwise: Tensor) -> Tensor:
        """The variance; ``otherwise`` where there is only one value per channel."""
        if isinstance(self.count, Tensor):
            return torch.where(self.count > 1, self.variance, otherwise.to(self.variance.dtype))
        return self.variance if self.count > 1 else otherwise


def batch_moments(x: Tensor, eps: float) -> BatchMoments:
    """Mean and biased variance of x, of shape (N, C, *space), over all axes but the channels; fast on every device.

    Args:
        x: The batch.
        eps: The layer's eps: errors of the variance well below it do not matter.
    """
    count = x.numel() // x.shape[1]
    fast = _fast_moments(x, eps) if _suits_norms(x) else None
    return BatchMoments(*(fast or _exact_moments(x)), count)


def _suits_norms(x: Tensor) -> bool:
    """Whether ``vector_norm`` is fast and exact enough for x, and x large enough to benefit."""
    return (
        x.is_cpu
        and x.numel() >= _LARGE
        and _ROW[0] <= x.shape[2:].numel() <= _ROW[1]
        and x.is_contiguous()
        and wide(x.dtype) == x.dtype
    )


def _fast_moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """Moments from ``mean`` and ``vector_norm``, 3 to 4 times faster; None if E[x^2] - E[x]^2 cancels or overflows."""
    images = x.flatten(2)
    mean = images.mean(2).double().mean(0)
    mean_square = torch.linalg.vector_norm(images, dim=2).double().square_().mean(0).div_(images.shape[2])
    variance = torch.addcmul(mean_square, mean, mean, value=-1)
    kept = float(((variance + eps) / mean_square).min())  # NaN where a square overflowed
    if not kept >= torch.finfo(x.dtype).eps / RELATIVE_ERROR:
        return None
    return mean.to(x.dtype), variance.clamp_(min=0.0).to(x.dtype)


def _exact_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Moments from centred values, accumulated wide (on CPU in float64) and returned in at least float32."""
    dtype, mean, variance = wide(x.dtype), None, None
    if x.is_cpu and x.dtype != dtype:
        # For half precision PyTorch returns float32 only if it gets running statistics of float32; momentum 0 leaves
        # these as they are.
        mean, variance = x.new_zeros((2, x.shape[1]), dtype=dtype).unbind()
    return torch.batch_norm_update_stats(x, mean, variance, 0.0)


@dataclass(slots=True)
class Renorm:
    """The arguments of ``functional.batch_renorm`` in training, besides input, weight, bias and mask."""

    running_mean: Tensor
    running_var: Tensor
    momentum: float | Tensor
    eps: float
    r_min: float | Tensor | None
    r_max: float | Tensor
    d_max: float | Tensor
    clipped: Tensor | None
    of_std: bool = False
    track: bool = True
    renorm_mean: Tensor | None = None
    renorm_var: Tensor | None = None
    renorm_momentum: float | None = None

    def step(self, batch: BatchMoments, invstd: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the clipped r and d from the running statistics, then update these.

        Call it with grad mode off: r and d are constants for the gradient.

        Args:
            batch: Moments of the batch.
            invstd: Its 1 / sqrt(variance + eps).

        Returns:
            (r, d).
        """
        mean, variance = self.running_mean, self.running_var
        if self.renorm_mean is not None and self.renorm_var is not None:
            mean, variance = self.renorm_mean, self.renorm_var
        inverse = (_as(variance, invstd) + self.eps).rsqrt_()
        exact_r, exact_d = inverse / invstd, (batch.mean - _as(mean, invstd)).mul_(inverse)
        r = _clip(exact_r, 1 / self.r_max if self.r_min is None else self.r_min, self.r_max)
        d = _clip(exact_d, -self.d_max, self.d_max)
        if self.clipped is not None:
            self.clipped.add_(clipped_channels(exact_r, exact_d, r, d))
        if self.track:
            self._update(batch, self.running_mean, self.running_var, self.momentum)
            if self.renorm_momentum is not None:
                self._update(batch, mean, variance, self.renorm_momentum)
        return r, d

    def plainly(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """Normalize a batch in plain operations."""
        device, dtype = input.device, wide(input.dtype)
        r_min, r_max, d_max, momentum = (  # numbers to a script; else they may be tensors of shape ()
            cast(float, value.to(device, dtype) if isinstance(value, Tensor) else value)
            for value in (self.r_min, self.r_max, self.d_max, self.momentum)
        )
        if r_min is None:
            r_min = 1 / r_max
        elif isinstance(r_max, Tensor) and not isinstance(r_min, Tensor):  # clamp wants both of one kind
            r_min = torch.full_like(r_max, r_min)
        return plain.renormalize(
            input, weight, bias, self.running_mean, self.running_var, self.renorm_mean, self.renorm_var, mask,
            self.clipped, momentum, self.renorm_momentum or 0.0, self.eps, r_min, r_max, d_max, self.of_std, self.track,
        )  # fmt: skip

    def _update(self, batch: BatchMoments, mean: Tensor, variance: Tensor, momentum: float | Tensor) -> None:
        rate: Any = momentum.to(mean.dtype) if isinstance(momentum, Tensor) else momentum
        own = batch.mean
        if isinstance(batch.count, Tensor):  # of all processes, which may all have had no values
            own = torch.where(batch.count > 0, own, mean.to(own.dtype))
        if self.of_std:
            new = batch.biased_variance(otherwise=variance)
            update_running(mean, variance, own, new, rate, True, self.eps)
            return
        new = batch.unbiased_variance(otherwise=variance)
        mean.lerp_(_as(own, mean), rate)
        variance.lerp_(_as(new, variance), rate)


def renormalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, renorm: Renorm, mask: Tensor | None = None
) -> Tensor:
    """``functional.batch_renorm`` in training, in one process."""
    if mask is not None or is_looked_into(input):
        return renorm.plainly(input, weight, bias, mask)
    return _differentiably(input, weight, bias, renorm)


def is_looked_into(input: Tensor) -> bool:
    """Whether a compiler, a function transform, forward-mode AD or a tensor subclass needs plain operations.

    So do devices that lack the kernels, among them the meta device.
    """
    return (
        torch.compiler.is_compiling()
        or not (input.is_cpu or input.is_cuda)
        or torch.jit.is_tracing()
        or type(input) not in (Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


class _Renormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, renorm: Renorm) -> Tensor:
        batch = batch_moments(input, renorm.eps)
        invstd = (batch.variance + renorm.eps).rsqrt_()
        r, d = renorm.step(batch, invstd)
        scale, shift = plain.folded(r, d, weight, bias)
        ctx.eps = renorm.eps
        ctx.save_for_backward(input, weight, batch.mean, invstd, r, d, scale)
        return normalize(input, scale, shift, batch, invstd, renorm.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, mean, invstd, r, d, scale = ctx.saved_tensors
        if torch.is_grad_enabled() and weight is not None:
            scale = weight * r  # again, with its gradient by the weight
        by_input, by_weight, by_bias, _ = ctx.needs_input_grad
        grad_input, grad_scale, grad_shift = _batch_norm_backward(
            laid_out_as(x, grad), x, scale, None, None, mean, invstd, True, ctx.eps,
            [by_input, by_weight, by_weight or by_bias],
        )  # fmt: skip
        grad_weight = torch.addcmul(r * grad_scale, d, grad_shift) if by_weight else None
        return grad_input, grad_weight, grad_shift if by_bias else None, None


_differentiably: Callable[..., Tensor] = _Renormalize.apply
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def normalize(input: Tensor, scale: Tensor, shift: Tensor, batch: BatchMoments, invstd: Tensor, eps: float) -> Tensor:
    """``(x - mean) * invstd * scale + shift``, in the dtype and memory format of the input."""
    if input.is_cuda:
        return torch.batch_norm_elemt(input, scale, shift, batch.mean, invstd, eps)
    if _suits_addcmul(input, scale):
        slope = scale * invstd
        shape = (-1, *(1,) * (input.dim() - 2))
        # The mean is folded into the shift, as in BN's own kernel.
        shift = torch.addcmul(shift, batch.mean, slope, value=-1)
        return torch.addcmul(shift.view(shape), input, slope.view(shape))
    return torch.batch_norm(input, scale, shift, batch.mean, batch.variance, False, 0.0, eps, False)


def _suits_addcmul(input: Tensor, scale: Tensor) -> bool:
    """Whether channels are adjacent in memory, where ``addcmul`` takes half the time of BN's own kernel on CPU."""
    channels, values = _ADJACENT
    return (
        input.numel() >= values
        and input.shape[1] >= channels
        and input.dtype == scale.dtype
        and _channels_last(input) is not None
    )


def laid_out_as(input: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory format of the input: PyTorch's kernel is up to 50 times slower if they differ."""
    if input.is_contiguous():
        return grad.contiguous()
    layout = _channels_last(input)
    return grad if layout is None else grad.contiguous(memory_format=layout)


def _channels_last(x: Tensor) -> torch.memory_format | None:
    """The memory format of x if its channels are adjacent and it has no gaps, else None."""
    layout = _CHANNELS_LAST.get(x.dim())
    return layout if layout is not None and x.is_contiguous(memory_format=layout) and x.stride(1) == 1 else None


_CHANNELS_LAST = {2: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
