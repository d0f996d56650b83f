"""Instance renorm: every image by its own statistics, mapped towards the running statistics of the batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.errors import UsageError
from bnprobe.nn.affine import AffineMap, Statistics
from bnprobe.nn.blended import normalize_blended, normalize_running, running_statistics, update_running, widened


class InstanceRenorm(_BatchNorm):
    """What the instance renorm layers share: Batch Renorm's idea (Ioffe 2017, section 3), with images for batches.

    With the mean mu_i and biased variance v_i of image i over its positions, the running m and v, s_i = sqrt(v_i + eps)
    and s = sqrt(v + eps), per channel:

        z_instance = (x - mu_i) / s_i        r_i = s_i / s        d_i = (mu_i - m) / s
        z = blend * z_instance + (1 - blend) * (r_i * z_instance + d_i)

    The bracket is BN with running statistics, (x - m) / s. So ``blend`` 1 is instance norm, 0 is BN at inference, and
    no image depends on the others of its batch: training and inference give the same output, exactly, as long as the
    running statistics are the same. Two things are particular to training. First, the statistics of the whole batch
    move the running ones as in BN, after these were used. Second, r_i and d_i are constants for the gradient, as in
    Batch Renorm: the gradient goes through the image's own statistics, and its sum over the positions of an image is 0
    whatever ``blend`` is. (At inference gradients are those of the function as it is.)

    One position per image has no instance statistics: then the running ones normalize, in training and at inference.

    Keys of the state_dict are those of ``nn.BatchNorm``. ``blend`` is a setting, like eps, and not among them: only
    with ``blend`` at 0 does plain BN with these weights give the same output.

    Args:
        num_features: Channels.
        eps: Added to the variance inside the root.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Have a weight and a bias per channel.
        blend: Weight of the image's own statistics, in [0, 1]; may be set later.
        device, dtype: Of parameters and buffers.

    Raises:
        UsageError: ``blend`` is out of range.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        blend: float = 0.5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)
        self.blend = blend

    @property
    def blend(self) -> float:
        """Weight of the image's own statistics."""
        return self._blend

    @blend.setter
    def blend(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise UsageError(f"blend is {value}, but must be from 0 (running statistics) to 1 (instance norm).")
        self._blend = float(value)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *space); updates the running statistics in training."""
        self._check_input_dim(input)
        if input.numel() == 0:
            return normalize_running(self, input)
        x = widened(input)
        variance, mean = _instance_moments(x)
        output = self._normalize(input, x, Statistics(mean, variance, self.eps))
        if self.training:
            pooled = variance.mean(0) + mean.var(0, correction=0)
            update_running(self, mean.mean(0), pooled, x.numel() // x.shape[1])
        return output

    def extra_repr(self) -> str:
        return f"{_BatchNorm.extra_repr(self)}, blend={self.blend:g}"

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _normalize(self, input: Tensor, x: Tensor, instance: Statistics) -> Tensor:
        if math.prod(x.shape[2:]) == 1:
            return normalize_running(self, input, updated_before_backward=self.training)
        towards_running = AffineMap.between(instance, running_statistics(self)).blend(1 - self.blend)
        if self.training:
            towards_running = towards_running.detach()
        return normalize_blended(x, instance, towards_running, self.weight, self.bias).to(input.dtype)


class InstanceRenorm1d(nn.BatchNorm1d, InstanceRenorm):
    """Instance renorm of (N, C, L), and BN by running statistics of (N, C); arguments as for ``InstanceRenorm``."""


class InstanceRenorm2d(nn.BatchNorm2d, InstanceRenorm):
    """Instance renorm of (N, C, H, W); arguments as for ``InstanceRenorm``."""


class InstanceRenorm3d(nn.BatchNorm3d, InstanceRenorm):
    """Instance renorm of (N, C, D, H, W); arguments as for ``InstanceRenorm``."""


def _instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of each image, of shape (images, channels)."""
    if x.dim() == 2:
        return torch.zeros_like(x), x
    return torch.var_mean(x, tuple(range(2, x.dim())), correction=0)
