"""Instance renorm: every sample normalized with its own statistics, corrected towards the running statistics."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from bnprobe.nn.blended import BlendedBatchNorm
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
        return self._scripted(input, mask)

    def _scripted(self, input: Tensor, mask: Tensor | None) -> Tensor:
        rate = self._count_batch() if self.training else 0.0
        if input.numel() == 0:
            return self._at_inference(input)
        x = widened(input)
        mean, variance, count = moments(x, mask, batch_axes(x.dim())[1:])
        output = self._blended(input, x, mean, variance, count)
        if self.training and self.track_running_stats:
            running_mean, running_var = self._statistics()
            mean, variance, count = pooled(mean, variance, count)
            update_from(running_mean, running_var, mean, variance, count, rate, False, 0.0)
        return output

    def _blended(self, input: Tensor, x: Tensor, mean: Tensor, variance: Tensor, count: Tensor) -> Tensor:
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
        output = corrected(x, mean, variance, self._eps, scale, shift, self.weight, self.bias)
        return output.to(input.dtype)


class InstanceRenorm1d(nn.BatchNorm1d, InstanceRenorm):
    """Instance renorm for (N, C, L), and frozen BN for (N, C); arguments as for ``InstanceRenorm``."""


class InstanceRenorm2d(nn.BatchNorm2d, InstanceRenorm):
    """Instance renorm for (N, C, H, W); arguments as for ``InstanceRenorm``."""


class InstanceRenorm3d(nn.BatchNorm3d, InstanceRenorm):
    """Instance renorm for (N, C, D, H, W); arguments as for ``InstanceRenorm``."""
