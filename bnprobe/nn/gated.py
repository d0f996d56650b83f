"""Gated BN: a learned gate per channel mixes batch and running statistics."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function_unary

from bnprobe.errors import UsageError
from bnprobe.nn.blended import normalize_blended, normalize_running, running_statistics, update_running, widened
from bnprobe.nn.kernels import AffineMap, Statistics, require_channels

_EDGE = 1e-3
"""Gates start at least this far from 0 and 1, where the sigmoid has almost no gradient."""


class GatedBatchNorm(_BatchNorm):
    """Base class of the gated layers.

    In training, with the running statistics before their update and a gate in (0, 1) per channel:

        z = gate * z_batch + (1 - gate) * z_running

    The gradient is that of this formula: through the batch statistics and into the gate; the running statistics are
    constants. At inference z = z_running, so the mismatch between training and inference shrinks as the gate goes to 0.
    With one value per channel there is no batch variance: then the running statistics normalize, whatever the gate,
    and its gradient is 0.

    The gate is the sigmoid of the parameter ``gate_logit``, of shape (channels,), which ``nn.BatchNorm`` does not have.
    Inference does not use it: ``bnprobe.deployable_state`` leaves it out, and the rest loads strictly into plain BN.
    Weight decay pulls gates to 1/2: exclude ``gate_logit`` from it. The input has at least 2 dimensions.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        blend: Initial value of all gates, in [0, 1]; moved to at least 0.001 from the ends, where a gate could not
            learn.
        device, dtype: Of parameters and buffers.

    Raises:
        UsageError: ``blend`` is out of range.
    """

    normalizes_only: ClassVar[bool] = True
    training_only: ClassVar[tuple[str, ...]] = ("gate_logit",)
    """Tensors of the state_dict that inference does not use."""

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
        if not 0 <= blend <= 1:
            raise UsageError(f"blend is {blend}, but must be from 0 (running statistics) to 1 (batch statistics).")
        start = min(max(blend, _EDGE), 1 - _EDGE)
        logit = math.log(start / (1 - start))
        self.gate_logit = nn.Parameter(torch.full((num_features,), logit, device=device, dtype=dtype))

    @property
    def gate(self) -> Tensor:
        """Weight of the batch statistics in training, in (0, 1), shape (channels,)."""
        return widened(self.gate_logit).sigmoid()

    def forward(self, input: Tensor) -> Tensor:
        """Normalize an input of shape (N, C, *space); in training, also update the running statistics.

        Raises:
            ValueError: The input has the wrong number of dimensions.
        """
        self._check_input_dim(input)
        return gated_batch_norm(input, self)

    def _check_input_dim(self, input: Tensor) -> None:
        require_channels(input)


def gated_batch_norm(input: Tensor, layer: GatedBatchNorm) -> Tensor:
    """The forward pass of a gated layer (internal); a ``TorchFunctionMode`` can intercept it like ``F.batch_norm``."""
    if has_torch_function_unary(input):
        output: Tensor = handle_torch_function(gated_batch_norm, (input,), input, layer)
        return output
    if not layer.training or input.numel() == 0:
        return normalize_running(layer, input)
    x = widened(input)
    variance, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
    count = x.numel() // x.shape[1]
    batch, running = Statistics(mean, variance, layer.eps), running_statistics(layer)
    # Multiplied, so that the gate stays in the graph: DDP waits for the gradient of every parameter.
    gate = layer.gate * (count > 1)
    towards_running = AffineMap.between(batch, running).blend(1 - gate)
    output = normalize_blended(x, batch, towards_running, layer.weight, layer.bias)
    update_running(layer, mean, variance, count)
    return output.to(input.dtype)


class GatedBatchNorm1d(nn.BatchNorm1d, GatedBatchNorm):
    """Gated BN for (N, C) or (N, C, L); arguments as for ``GatedBatchNorm``."""


class GatedBatchNorm2d(nn.BatchNorm2d, GatedBatchNorm):
    """Gated BN for (N, C, H, W); arguments as for ``GatedBatchNorm``."""


class GatedBatchNorm3d(nn.BatchNorm3d, GatedBatchNorm):
    """Gated BN for (N, C, D, H, W); arguments as for ``GatedBatchNorm``."""
