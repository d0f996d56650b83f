"""Moving average batch norm (Yan et al. 2020): statistics of the last batches, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bnprobe.errors import UsageError
from bnprobe.nn.base import BatchNormLike, takes_numbers
from bnprobe.nn.plain import along_channels, batch_axes, corrected, moments, towards_running, update_from, widened


class MovingAverageBatchNorm(BatchNormLike):
    """Base class of the moving average layers (Yan et al. 2020, arXiv 2001.06838, sections 4.1 and 4.2).

    Both passes of BN need statistics of the batch: the forward pass mean and variance, and the backward pass, with
    g = r * weight * dL/dy, the means of g and of g * z. Of a small batch all four are noisy. This layer takes each from
    the last ``window`` batches together. In training, with simple averages over these batches (of which the current one
    is the last), batch means mu_i and biased batch variances v_i:

        mean = avg(mu_i)        var = avg(v_i + (mu_i - mean)^2)
        z = (x - mean) / sqrt(var + eps)
        y = weight * (r * z + d) + bias                   r, d: from these to the running statistics, clipped
        dL/dx = (g - avg(mean(g)) - z * avg(mean(g * z))) / sqrt(var + eps)

    r and d are as in Batch Renorm, with limits near 1 and 0. The running statistics move as in BN, and at inference the
    layer is BN. While fewer batches than the window were seen, averages are over those; batches count alike.

    Left out of the paper: its layer has no mean, but divides by the root of the second moment, and the weight of the
    convolution before is centred instead (section 4.3). Here the mean and its term of the gradient are averaged too, so
    that a trained BN can become this layer, and back. And r is clipped to 1 / ``r_max`` from the first batch on, where
    the authors' code waits for the averages to settle.

    The averages are buffers, which ``nn.BatchNorm`` does not have; inference does not use them:
    ``bnprobe.deployable_state`` leaves them out. The gradient is not the derivative of the output: function transforms,
    forward-mode AD, second derivatives and TorchScript are refused in training, and ``torch.compile`` breaks its graph.
    While the window holds only one value per channel, the running statistics normalize, and the gradient of the input
    is 0. The input has at least 2 dimensions.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root; must be positive in training.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        window: Number of batches that are averaged; in the paper as many as have 32 samples together.
        device, dtype: Of parameters and buffers.
        bias: Whether an affine layer has a bias.
        r_max, d_max: r is clipped to [1 / r_max, r_max] and d to [-d_max, d_max].

    Attributes:
        batch_means, batch_vars: Shape (window, channels), of the last batches.
        gradient_means, gradient_products: The same of g and of g * z.
        batches_seen, gradients_seen: int64, shape ().

    Raises:
        UsageError: ``window``, ``r_max`` or ``d_max`` is out of range.
    """

    training_only: ClassVar[tuple[str, ...]] = (
        *("batch_means", "batch_vars", "gradient_means", "gradient_products"),
        *("batches_seen", "gradients_seen"),
    )
    """Tensors of the state_dict that inference does not use."""

    @takes_numbers
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        window: int = 16,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        r_max: float = 1.05,
        d_max: float = 0.05,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype, bias=bias)
        if window < 1:
            raise UsageError(f"window is {window}, but must be at least 1.")
        if not (r_max >= 1 and d_max >= 0):  # so that NaN is refused, too
            raise UsageError(f"r_max is {r_max} and d_max is {d_max}, but they must be at least 1 and 0.")
        self.window, self.r_max, self.d_max = window, r_max, d_max
        # In at least float32, whatever the layer has: they are averaged.
        like = widened(torch.zeros(1, num_features, device=device, dtype=dtype))
        for name in self.training_only[:4]:
            self.register_buffer(name, like.repeat(window, 1))
        for name in self.training_only[4:]:
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device=device))
        self.batch_means: Tensor
        self.batch_vars: Tensor
        self.gradient_means: Tensor
        self.gradient_products: Tensor
        self.batches_seen: Tensor
        self.gradients_seen: Tensor

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        for name in self.training_only:
            if name in self._buffers:  # not yet while the layer is made
                getattr(self, name).zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, r_max={self.r_max:g}, d_max={self.d_max:g}"

    def _normalize(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if not self.training:
            return self._at_inference(input)
        if torch.compiler.is_compiling():
            output: Tensor = torch.compiler.disable(self._in_training)(input, mask)
            return output
        return self._in_training(input, mask)

    def _in_training(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if (
            torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
            or torch.jit.is_tracing()
        ):
            raise UsageError(
                f"{type(self).__name__} keeps averages of its backward pass, which function transforms, forward-mode AD"
                " and traces do not run: use it in eval mode there."
            )
        rate = self._count_batch()
        if input.numel() == 0:
            return self._at_inference(input)
        x = widened(input)
        with torch.no_grad():
            used = self._step(x, mask, rate)
        return _differentiably(input, self.weight, self.bias, used, self)

    def _step(self, x: Tensor, mask: Tensor | None, rate: float) -> _Used:
        """Take a batch into the averages, and say what normalizes it."""
        own_mean, own_variance, count = moments(x, mask, batch_axes(x.dim()))
        mean = _average(self.batch_means, self.batches_seen, own_mean)
        # The spread of the means is that of the values in the window: batches of one value have a variance, too.
        seen = (self.batches_seen + 1).clamp(max=self.window)
        _average(self.batch_vars, self.batches_seen, own_variance)
        known = (torch.arange(self.window, device=x.device) < seen).unsqueeze(1)
        spread = widened(self.batch_vars) + (widened(self.batch_means) - mean).square()
        variance = torch.where(known, spread, 0.0).sum(0) / seen
        self.batches_seen.add_(count.max() > 0)  # not for padding alone: the next batch takes its place
        running_mean, running_var = self._statistics()
        r, d = towards_running(mean, variance, running_mean, running_var, self._eps)
        enough = count.max() * seen > 1
        scale = torch.where(enough, r.clamp(1 / self.r_max, self.r_max), r)
        shift = torch.where(enough, d.clamp(-self.d_max, self.d_max), d)
        if self.track_running_stats:
            update_from(running_mean, running_var, own_mean, own_variance, count, rate, False, 0.0)
        return _Used(mean, variance, scale, shift, count)

    def _scripted(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if self.training:
            raise ValueError("moving average batch norm keeps averages of its backward pass: script it in eval mode")
        return self._at_inference(input)


class _Used(NamedTuple):
    """What a batch is normalized with: moments, the correction, and the number of its values."""

    mean: Tensor
    variance: Tensor
    scale: Tensor
    shift: Tensor
    number: Tensor


def _average(ring: Tensor, seen: Tensor, new: Tensor) -> Tensor:
    """Put the values of a batch in the place of the oldest, and return the mean of the batches that are there.

    Args:
        ring: Shape (window, channels), changed in place.
        seen: Number of batches before this one, shape (); a tensor, so that nothing waits for the device.
        new: Shape (channels,).
    """
    place = (seen % len(ring)).reshape(1)
    ring.index_copy_(0, place, new.to(ring.dtype).unsqueeze(0))
    number = (seen + 1).clamp(max=len(ring))
    known = (torch.arange(len(ring), device=ring.device) < number).unsqueeze(1)
    return torch.where(known, widened(ring), 0.0).sum(0) / number


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, used: _Used, layer: MovingAverageBatchNorm
    ) -> Tensor:
        ctx.layer, ctx.count = layer, used.number
        ctx.save_for_backward(input, weight, *used[:4])
        x = widened(input)
        output = corrected(x, used.mean, used.variance, layer._eps, used.scale, used.shift, weight, bias)
        return output.to(input.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, weight, mean, variance, scale, shift = ctx.saved_tensors
        layer: MovingAverageBatchNorm = ctx.layer
        x, grad = widened(given), widened(grad)
        axes, dimensions = batch_axes(x.dim()), x.dim()
        invstd = (variance + layer._eps).rsqrt()
        z = (x - along_channels(mean, dimensions)) * along_channels(invstd, dimensions)
        sums, products = grad.sum(axes), (grad * z).sum(axes)
        grad_weight = scale * products + shift * sums if ctx.needs_input_grad[1] else None
        grad_bias = sums if ctx.needs_input_grad[2] else None
        factor = scale if weight is None else scale * weight
        divisor = ctx.count.clamp(min=1.0)
        by_mean = _average(layer.gradient_means, layer.gradients_seen, factor * sums / divisor)
        by_product = _average(layer.gradient_products, layer.gradients_seen, factor * products / divisor)
        layer.gradients_seen.add_(ctx.count.max() > 0)
        centred = grad * along_channels(factor, dimensions) - along_channels(by_mean, dimensions)
        grad_x = (centred - z * along_channels(by_product, dimensions)) * along_channels(invstd, dimensions)
        return grad_x.to(given.dtype), grad_weight, grad_bias, None, None


_differentiably: Callable[..., Tensor] = _Normalize.apply


class MovingAverageBatchNorm1d(nn.BatchNorm1d, MovingAverageBatchNorm):
    """Moving average batch norm for (N, C) or (N, C, L); arguments as for ``MovingAverageBatchNorm``."""


class MovingAverageBatchNorm2d(nn.BatchNorm2d, MovingAverageBatchNorm):
    """Moving average batch norm for (N, C, H, W); arguments as for ``MovingAverageBatchNorm``."""


class MovingAverageBatchNorm3d(nn.BatchNorm3d, MovingAverageBatchNorm):
    """Moving average batch norm for (N, C, D, H, W); arguments as for ``MovingAverageBatchNorm``."""
