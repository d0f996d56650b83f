"""Example weighing: BN in training; at inference every sample's own moments enter the running ones with a weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.errors import UsageError


class ExampleWeighedBatchNorm(_BatchNorm):
    """Base class of the example-weighed layers (Summers & Dinneen 2020, arXiv 1906.03548, section 3.1).

    In training it is BN. There every sample is a part of the statistics that normalize it, 1/n of a batch of n; at
    inference with running statistics it is none. So at inference the moments of the sample enter with a weight: per
    channel, with the mean m_i and the biased variance v_i of sample i over its positions, and the running mean m and
    variance v,

        mean_i = blend * m_i + (1 - blend) * m
        E[x^2]_i = blend * E_i[x^2] + (1 - blend) * E[x^2]
        var_i = E[x^2]_i - mean_i^2 = blend * v_i + (1 - blend) * v + blend * (1 - blend) * (m_i - m)^2

    The last form is computed, since nothing cancels in it. ``blend`` 0 is BN, and 1 is instance norm at inference. It
    needs no training: one ``blend`` for all layers is chosen on held-out data (alpha in the paper).

    A sample with one position has no variance of its own: then the running statistics normalize alone.

    The keys of the state_dict are those of ``nn.BatchNorm``. ``blend`` is a setting, like eps, and not among them:
    plain BN with the same weights gives the same output only for ``blend`` 0. The input has at least 2 dimensions.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        blend: Weight of the sample's own moments at inference, in [0, 1]; may be set later.
        device, dtype: Of parameters and buffers.

    Raises:
        UsageError: ``blend`` is out of range.
    """

    normalizes_only: ClassVar[bool] = True
    nothing_to_measure: ClassVar[str] = (
        "example weighing: at inference every sample's own statistics enter, so running statistics are not all it uses"
    )

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
        """Weight of the sample's own moments at inference."""
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
            ValueError: The input has the wrong number of dimensions, or in training one value per channel.
        """
        self._check_input_dim(input)
        assert self.running_mean is not None  # these layers always track
        assert self.running_var is not None
        if not self.training:
            statistics = self.running_mean, self.running_var
            return normalize_example_weighed(input, *statistics, self.weight, self.bias, self._blend, self.eps)
        return self._normalize_batch(input)

    def extra_repr(self) -> str:
        return f"{_BatchNorm.extra_repr(self)}, blend={self.blend:g}"

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _normalize_batch(self, input: Tensor) -> Tensor:
        """BN in training."""
        if input.numel() == input.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        tensors = self.weight, self.bias, self.running_mean, self.running_var
        # Not F.batch_norm: a scan intercepts that to measure BN.
        return torch.batch_norm(input, *tensors, True, rate, self.eps, torch.backends.cudnn.enabled)


def normalize_example_weighed(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    blend: float,
    eps: float,
) -> Tensor:
    """What an example-weighed layer computes at inference; TorchScript can compile it.

    Args:
        input: Shape (N, C, *space).
        running_mean, running_var: Shape (C,).
        weight, bias: Shape (C,); None stands for 1 and 0.
        blend: Weight of the sample's own moments.
        eps: Added to the variance before the square root.
    """
    positions = 1
    for size in input.shape[2:]:
        positions *= size
    if positions <= 1 or blend == 0.0 or input.numel() == 0:
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(input, weight, bias, running_mean, running_var, False, 0.0, eps, cudnn)
    x = input.float() if input.dtype == torch.half or input.dtype == torch.bfloat16 else input
    m, v = running_mean.to(x.dtype), running_var.to(x.dtype)
    own_variance, own_mean = torch.var_mean(x, list(range(2, x.dim())), correction=0)
    difference = own_mean - m
    mean = m + blend * difference
    variance = blend * own_variance + (1.0 - blend) * v + blend * (1.0 - blend) * difference * difference
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(x.dtype)
    shape = [x.size(0), x.size(1)]
    shape.extend([1] * (x.dim() - 2))
    # Centred first: folding the mean into the shift would lose digits where it is large against the deviation.
    output = (x - mean.reshape(shape)) * scale.reshape(shape)
    if bias is not None:
        shape[0] = 1
        output = output + bias.to(x.dtype).reshape(shape)
    return output.to(input.dtype)


class ExampleWeighedBatchNorm1d(nn.BatchNorm1d, ExampleWeighedBatchNorm):
    """Example weighing for (N, C, L), and BN for (N, C); arguments as for ``ExampleWeighedBatchNorm``."""


class ExampleWeighedBatchNorm2d(nn.BatchNorm2d, ExampleWeighedBatchNorm):
    """Example weighing for (N, C, H, W); arguments as for ``ExampleWeighedBatchNorm``."""


class ExampleWeighedBatchNorm3d(nn.BatchNorm3d, ExampleWeighedBatchNorm):
    """Example weighing for (N, C, D, H, W); arguments as for ``ExampleWeighedBatchNorm``."""
