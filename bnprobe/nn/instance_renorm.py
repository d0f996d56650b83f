"""Instance renorm: every sample normalized with its own statistics, corrected towards the running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnprobe.nn.blended import BlendedBatchNorm
from bnprobe.nn.kernels import is_looked_into, laid_out_as
from bnprobe.nn.plain import (
    batch_axes,
    corrected,
    current,
    moments,
    normalize_running,
    pooled,
    relative,
    towards_running,
    update_from,
    widened,
)


class InstanceRenorm(BlendedBatchNorm):
    """Base class of the instance renorm layers: Batch Renorm (Ioffe 2017, section 3) with one sample as the batch.

    Per channel, with the mean mu_i and the biased variance v_i of sample i over its positions, the running mean m and
    variance v, s_i = sqrt(v_i + eps) and s = sqrt(v + eps):

        z_instance = (x - mu_i) / s_i        r_i = s_i / s        d_i = (mu_i - m) / s
        z = blend * z_instance + (1 - blend) * (r_i * z_instance + d_i)

    The bracket is (x - m) / s, BN with running statistics. So ``blend`` 1 is instance norm and 0 is BN at inference. No
    sample depends on the others of its batch: training and inference give exactly the same output for the same running
    statistics. Training differs in two ways. The statistics of the whole batch update the running ones as in BN, after
    these were used. And r_i and d_i are constants for the gradient, as in Batch Renorm: the gradient goes through the
    sample's own statistics, and sums to 0 over the positions of a sample for any ``blend``. (At inference the gradient
    is that of the whole formula.)

    A sample with one position has no instance variance: then the running statistics normalize, in training and at
    inference.

    The keys of the state_dict are those of ``nn.BatchNorm``. ``blend`` is a setting, like eps, and not among them:
    plain BN with the same weights gives the same output only for ``blend`` 0. The input has at least 2 dimensions.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root; must be positive in training.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        blend: Weight of the sample's own statistics, in [0, 1]; may be set later.
        device, dtype: Of parameters and buffers.
        bias: Whether an affine layer has a bias.

    Raises:
        UsageError: ``blend`` is out of range.
    """

    nothing_to_measure: ClassVar[str] = "instance renorm: the same output in training and at inference"

    def _normalize(self, input: Tensor, mask: Tensor | None) -> Tensor:
        return self._both(input, mask, self.training and mask is None and not is_looked_into(input))

    def _scripted(self, input: Tensor, mask: Tensor | None) -> Tensor:
        return self._both(input, mask, False)

    def _both(self, input: Tensor, mask: Tensor | None, natively: bool) -> Tensor:
        rate = self._count_batch() if self.training else 0.0
        if input.numel() == 0:
            return self._at_inference(input)
        x = widened(input)
        mean, variance, count = moments(x.detach() if natively else x, mask, batch_axes(x.dim())[1:])
        output = self._blended(input, x, mean, variance, count, natively)
        if self.training and self.track_running_stats:
            running_mean, running_var = self._statistics()
            mean, variance, count = pooled(mean, variance, count)
            update_from(running_mean, running_var, mean, variance, count, rate, False, 0.0)
        return output

    def _blended(
        self, input: Tensor, x: Tensor, mean: Tensor, variance: Tensor, count: Tensor, natively: bool
    ) -> Tensor:
        running_mean, running_var = self._statistics()
        if x.numel() == x.shape[0] * x.shape[1]:  # one position
            if self.training:  # the backward pass needs the values that are about to be updated
                running_mean, running_var = current(running_mean).clone(), current(running_var).clone()
            return normalize_running(input, running_mean, running_var, self.weight, self.bias, self._eps)
        if self.training:
            r, d = towards_running(mean, variance, running_mean, running_var, self._eps)
        else:  # nothing updates them, and exporters know no operator of ours
            target = (widened(running_var) + self._eps).sqrt()
            r, d = relative(mean, (variance + self._eps).sqrt(), widened(running_mean), target)
        # A sample of which the mask leaves one value has no variance.
        blend = self.blend * (count > 1).to(x.dtype)
        scale, shift = 1 + (1 - blend) * (r - 1), (1 - blend) * d
        if self.training:
            scale, shift = scale.detach(), shift.detach()
            if not torch.jit.is_scripting() and natively:
                return _frugally(input, self.weight, self.bias, mean, variance, scale, shift, self._eps)
        output = corrected(x, mean, variance, self._eps, scale, shift, self.weight, self.bias)
        return output.to(input.dtype)


class _Normalize(torch.autograd.Function):
    """``corrected`` where scale and shift are constants; for the backward pass the input is kept and no copy of it."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(input, weight, mean, (variance + eps).rsqrt(), scale, shift)
        output = corrected(widened(input), mean, variance, eps, scale, shift, weight, bias)
        return output.to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The kernel of BN, to which every channel of every sample is a channel of one sample."""
        x, weight, mean, invstd, scale, shift = ctx.saved_tensors
        factor = scale if weight is None else scale * weight
        as_one = (1, -1, *x.shape[2:])
        needed = ctx.needs_input_grad
        by_input, by_scale, by_shift = torch.ops.aten.native_batch_norm_backward(
            grad.reshape(as_one), x.reshape(as_one), factor.flatten(), None, None, mean.flatten(), invstd.flatten(),
            True, ctx.eps, [needed[0], needed[1], needed[1] or needed[2]],
        )  # fmt: skip
        by_weight = by_bias = None
        if needed[1]:
            by_weight = (scale * by_scale.view_as(scale) + shift * by_shift.view_as(scale)).sum(0)
        if needed[2]:
            by_bias = by_shift.view_as(scale).sum(0)
        if needed[0]:
            by_input = laid_out_as(x, by_input.view_as(x))
        return by_input, by_weight, by_bias, None, None, None, None, None


_frugally: Callable[..., Tensor] = _Normalize.apply


class InstanceRenorm1d(nn.BatchNorm1d, InstanceRenorm):
    """Instance renorm for (N, C, L), and frozen BN for (N, C); arguments as for ``InstanceRenorm``."""


class InstanceRenorm2d(nn.BatchNorm2d, InstanceRenorm):
    """Instance renorm for (N, C, H, W); arguments as for ``InstanceRenorm``."""


class InstanceRenorm3d(nn.BatchNorm3d, InstanceRenorm):
    """Instance renorm for (N, C, D, H, W); arguments as for ``InstanceRenorm``."""
