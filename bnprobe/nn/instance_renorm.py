"""Instance renorm: every sample normalized with its own statistics, corrected towards the running statistics."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.errors import UsageError
from bnprobe.nn.blended import normalize_blended, normalize_running, running_statistics, update_running, widened
from bnprobe.nn.kernels import AffineMap, Statistics, require_channels


class InstanceRenorm(_BatchNorm):
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
        eps: Added to the variance before the square root.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        blend: Weight of the sample's own statistics, in [0, 1]; may be set later.
        device, dtype: Of parameters and buffers.

    Raises:
        UsageError: ``blend`` is out of range.
    """

    normalizes_only: ClassVar[bool] = True
    nothing_to_measure: ClassVar[str] = "instance renorm: the same output in training and at inference"

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
        """Weight of the sample's own statistics."""
        return self._blend

    @blend.setter
    def blend(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise UsageError(f"blend is {value}, but must be from 0 (running statistics) to 1 (instance norm).")
        self._blend = float(value)

    @property
    def deployment_obstacle(self) -> str | None:
        """Why plain BN with the same weights gives another output at inference, a clause; None if it does not."""
        if self.blend == 0:
            return None
        return f"is {type(self).__name__} with blend {self.blend:g}: only at 0 is it BN at inference"

    def forward(self, input: Tensor) -> Tensor:
        """Normalize an input of shape (N, C, *space); in training, also update the running statistics.

        Raises:
            ValueError: The input has the wrong number of dimensions.
        """
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
        require_channels(input)

    def _normalize(self, input: Tensor, x: Tensor, instance: Statistics) -> Tensor:
        if math.prod(x.shape[2:]) == 1:
            return normalize_running(self, input, updated_before_backward=self.training)
        towards_running = AffineMap.between(instance, running_statistics(self)).blend(1 - self.blend)
        if self.training:
            towards_running = towards_running.detach()
        return normalize_blended(x, instance, towards_running, self.weight, self.bias).to(input.dtype)


class InstanceRenorm1d(nn.BatchNorm1d, InstanceRenorm):
    """Instance renorm for (N, C, L), and frozen BN for (N, C); arguments as for ``InstanceRenorm``."""


class InstanceRenorm2d(nn.BatchNorm2d, InstanceRenorm):
    """Instance renorm for (N, C, H, W); arguments as for ``InstanceRenorm``."""


class InstanceRenorm3d(nn.BatchNorm3d, InstanceRenorm):
    """Instance renorm for (N, C, D, H, W); arguments as for ``InstanceRenorm``."""


def _instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of each sample, each of shape (samples, channels)."""
    if x.dim() == 2:
        return torch.zeros_like(x), x
    return torch.var_mean(x, tuple(range(2, x.dim())), correction=0)
