"""Gated BN: a learned gate per channel mixes batch and running statistics."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from bnprobe.errors import UsageError
from bnprobe.nn.base import BatchNormLike, takes_numbers
from bnprobe.nn.kernels import is_looked_into
from bnprobe.nn.plain import (
    batch_axes,
    corrected,
    folded,
    moments,
    normalize_by_batch,
    towards_running,
    update_from,
    widened,
)

_EDGE = 1e-3
"""Gates start at least this far from 0 and 1, where the sigmoid has almost no gradient."""


class GatedBatchNorm(BatchNormLike):
    """Base class of the gated layers.

    In training, with the running statistics before their update and a gate in (0, 1) per channel:

        z = gate * z_batch + (1 - gate) * z_running

    The gradient is that of this formula: through the batch statistics and into the gate; the running statistics are
    constants. At inference z = z_running, so the mismatch between training and inference shrinks as the gate goes to 0.
    With one value per channel there is no batch variance: then the running statistics normalize, whatever the gate,
    and its gradient is 0. So it is for an empty batch.

    The gate is the sigmoid of the parameter ``gate_logit``, of shape (channels,), which ``nn.BatchNorm`` does not have.
    Inference does not use it: ``bnprobe.deployable_state`` leaves it out, and the rest loads strictly into plain BN.
    Weight decay pulls gates to 1/2: exclude ``gate_logit`` from it. The input has at least 2 dimensions.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root; must be positive in training.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        blend: Initial value of all gates, in [0, 1]; moved to at least 0.001 from the ends, where a gate could not
            learn.
        device, dtype: Of parameters and buffers.
        bias: Whether an affine layer has a bias.

    Raises:
        UsageError: ``blend`` is out of range.
    """

    training_only: ClassVar[tuple[str, ...]] = ("gate_logit",)
    """Tensors of the state_dict that inference does not use."""

    __jit_unused_properties__: ClassVar[list[str]] = [*BatchNormLike.__jit_unused_properties__, "gate"]

    @takes_numbers
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        blend: float = 0.5,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype, bias=bias)
        if not 0 <= blend <= 1:
            raise UsageError(f"blend is {blend}, but must be from 0 (running statistics) to 1 (batch statistics).")
        start = min(max(blend, _EDGE), 1 - _EDGE)
        self._first_logit = math.log(start / (1 - start))
        self.gate_logit = nn.Parameter(torch.full((num_features,), self._first_logit, device=device, dtype=dtype))

    @property
    def gate(self) -> Tensor:
        """Weight of the batch statistics in training, in (0, 1), shape (channels,)."""
        return widened(self.gate_logit).sigmoid()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "gate_logit" in self._parameters:  # not yet where BN's initializer calls this
            nn.init.constant_(self.gate_logit, self._first_logit)

    def _normalize(self, input: Tensor, mask: Tensor | None) -> Tensor:
        return gated_batch_norm(input, self, mask)

    def _scripted(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if not self.training:
            return self._at_inference(input)
        return self._in_training(input, mask, False)

    def _in_training(self, input: Tensor, mask: Tensor | None, natively: bool) -> Tensor:
        rate = self._count_batch()
        running_mean, running_var = self._statistics()
        gate = widened(self.gate_logit).sigmoid()
        if input.numel() == 0:
            return self._at_inference(input) + 0 * gate.sum()  # DDP waits for the gradient of every parameter
        x = widened(input)
        mean, variance, count = moments(x, mask, batch_axes(x.dim()))
        gate = gate * (count > 1)
        r, d = towards_running(mean, variance, running_mean, running_var, self._eps)
        scale, shift = 1 + (1 - gate) * (r - 1), (1 - gate) * d
        if natively:
            scale, shift = folded(scale, shift, self.weight, self.bias)
            output = normalize_by_batch(x, scale, shift, self._eps)
        else:
            output = corrected(x, mean, variance, self._eps, scale, shift, self.weight, self.bias)
        if self.track_running_stats:
            update_from(running_mean, running_var, mean, variance, count, rate, False, 0.0)
        return output.to(input.dtype)


def gated_batch_norm(input: Tensor, layer: GatedBatchNorm, mask: Tensor | None = None) -> Tensor:
    """The forward pass of a gated layer (internal); a ``TorchFunctionMode`` can intercept it like ``F.batch_norm``."""
    if has_torch_function_unary(input):
        given = () if mask is None else (mask,)
        output: Tensor = handle_torch_function(gated_batch_norm, (input,), input, layer, *given)
        return output
    if not layer.training:
        return layer._at_inference(input)
    # BN's own kernel keeps half as much. Not under transforms: a Hessian of it is wrong where its weights vary.
    return layer._in_training(input, mask, mask is None and not is_looked_into(input))


class GatedBatchNorm1d(nn.BatchNorm1d, GatedBatchNorm):
    """Gated BN for (N, C) or (N, C, L); arguments as for ``GatedBatchNorm``."""


class GatedBatchNorm2d(nn.BatchNorm2d, GatedBatchNorm):
    """Gated BN for (N, C, H, W); arguments as for ``GatedBatchNorm``."""


class GatedBatchNorm3d(nn.BatchNorm3d, GatedBatchNorm):
    """Gated BN for (N, C, D, H, W); arguments as for ``GatedBatchNorm``."""
