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

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bnprobe.nn import plain
from bnprobe.nn.plain import clipped_channels, snapshot, unbiased, update_running
from bnprobe.stats.moments import RELATIVE_ERROR, wide

_LARGE = 2**16
"""Smallest batch, in values, for which two fast passes cost less than one exact pass."""

_ROW = (4, 2**16)
"""Fewest and most positions per sample for ``vector_norm``: it is slow for few, and inexact for many, since it adds the
squares one by one."""


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
        scale = self.scale if weight is None else weight * self.scale
        if weight is None or bias is None:
            shift = self.shift if weight is None else weight * self.shift
            return AffineMap(scale, shift if bias is None else shift + bias)
        return AffineMap(scale, torch.addcmul(bias, weight, self.shift))

    def detach(self) -> AffineMap:
        """The same map, without gradient."""
        return AffineMap(self.scale.detach(), self.shift.detach())


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
        return self.variance * (self.count / (self.count - 1)) if self.count > 1 else otherwise

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
    if x.is_cuda:
        mean, invstd = torch.batch_norm_stats(x, eps)
        return BatchMoments(mean, (invstd.square().reciprocal() - eps).clamp_(min=0.0), count)
    fast = _fast_moments(x, eps) if _suits_norms(x) else None
    return BatchMoments(*(fast or _exact_moments(x)), count)


def _suits_norms(x: Tensor) -> bool:
    """Whether ``vector_norm`` is fast and exact enough for x, and x large enough to benefit."""
    positions = x.shape[2:].numel()
    return x.numel() >= _LARGE and _ROW[0] <= positions <= _ROW[1] and x.is_contiguous() and wide(x.dtype) == x.dtype


def _fast_moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """Moments from ``mean`` and ``vector_norm``, 3 to 4 times faster; None if E[x^2] - E[x]^2 cancels or overflows."""
    images = x.flatten(2)
    mean = images.mean(2).double().mean(0)
    square = mean.square()
    mean_square = torch.linalg.vector_norm(images, dim=2).double().square_().sum(0).div_(x.numel() // x.shape[1])
    variance = mean_square - square
    limit = RELATIVE_ERROR / torch.finfo(x.dtype).eps
    safe = (square <= limit * (variance + eps)) & (variance < math.inf)
    return (mean.to(x.dtype), variance.clamp_(min=0.0).to(x.dtype)) if bool(safe.all()) else None


def _exact_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Moments from centred values, accumulated in float64 and returned in at least float32."""
    dtype, channels = wide(x.dtype), x.shape[1]
    # PyTorch returns float32 for half-precision input only if it gets float32 running statistics; momentum 0 leaves
    # these as they are.
    mean, variance = (None, None) if x.dtype == dtype else x.new_zeros((2, channels), dtype=dtype).unbind()
    return torch.batch_norm_update_stats(x, mean, variance, 0.0)


@dataclass(frozen=True)
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

    def step(self, batch: BatchMoments) -> AffineMap:
        """Compute the clipped r and d from the running statistics, then update these.

        Call it with grad mode off: r and d are constants for the gradient.

        Args:
            batch: Moments of the batch.

        Returns:
            r as the scale and d as the shift.
        """
        dtype = batch.mean.dtype
        mean, variance = (snapshot(buffer).to(dtype) for buffer in self._averages()[-1][:2])
        running, own = Statistics(mean, variance, self.eps), Statistics(batch.mean, batch.variance, self.eps)
        exact = AffineMap.between(own, running)
        limited = exact.clamp(self.r_max, self.d_max, self.r_min)
        if self.clipped is not None:
            self.clipped.add_(clipped_channels(exact.scale, exact.shift, limited.scale, limited.shift))
        for running_mean, running_var, rate in self._averages() if self.track else ():
            self._update(batch, running_mean, running_var, rate)
        return limited

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

    def _averages(self) -> list[tuple[Tensor, Tensor, float | Tensor]]:
        """The running averages with their momentum; r and d refer to the last ones."""
        own: list[tuple[Tensor, Tensor, float | Tensor]] = [(self.running_mean, self.running_var, self.momentum)]
        if self.renorm_mean is not None and self.renorm_var is not None and self.renorm_momentum is not None:
            own.append((self.renorm_mean, self.renorm_var, self.renorm_momentum))
        return own

    def _update(self, batch: BatchMoments, mean: Tensor, variance: Tensor, momentum: float | Tensor) -> None:
        rate: Any = momentum.to(mean.dtype) if isinstance(momentum, Tensor) else momentum
        new = batch.biased_variance(otherwise=variance) if self.of_std else batch.unbiased_variance(otherwise=variance)
        own = batch.mean
        if isinstance(batch.count, Tensor):  # of all processes, which may all have had no values
            own = torch.where(batch.count > 0, own, mean.to(own.dtype))
        update_running(mean, variance, own, new, rate, self.of_std, self.eps)


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
            laid_out_as(saved.input, grad), saved.input, scale, None, None, saved.mean, saved.invstd, True, ctx.eps,
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


def laid_out_as(input: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory format of the input: PyTorch's kernel is up to 50 times slower if they differ."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    other = formats.get(input.dim())
    if other and input.is_contiguous(memory_format=other) and not input.is_contiguous():
        return grad.contiguous(memory_format=other)
    return grad.contiguous() if input.is_contiguous() else grad
