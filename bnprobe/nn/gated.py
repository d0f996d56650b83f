"""Gated BN: a gate per channel learns how far to trust the statistics of the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function_unary

from bnprobe.errors import UsageError
from bnprobe.nn.affine import AffineMap, Statistics
from bnprobe.nn.blended import normalize_blended, normalize_running, running_statistics, update_running, widened

_EDGE = 1e-3
"""Nearest that a gate may start to 0 or 1: at the ends themselves a sigmoid has no gradient left."""


class GatedBatchNorm(_BatchNorm):
    """What the gated layers share.

    In training, with the running statistics before their update, and a gate in (0, 1) for every channel:

        z = gate * z_batch + (1 - gate) * z_running

    Gradients are those of this formula: through the batch statistics and into the gate; the running statistics are
    constants. At inference, z = z_running: what gates near 1 leave as mismatch between training and inference, gates
    near 0 have not. One value per channel has no batch statistics to trust, so the running ones normalize, whatever the
    gate (whose gradient is then 0).

    The gate is the sigmoid of a parameter, ``gate_logit``, of shape (channels,): one key more in the state_dict than
    ``nn.BatchNorm`` has. Inference has no use for it; ``plain_state`` leaves it out, and the rest loads strictly into
    plain BN. Weight decay draws gates to 1/2: keep it off ``gate_logit``.

    Args:
        num_features: Channels.
        eps: Added to the variance inside the root.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Have a weight and a bias per channel.
        blend: All gates at the start, in [0, 1]; kept 0.001 away from the ends, where a gate could not learn.
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
        if not 0 <= blend <= 1:
            raise UsageError(f"blend is {blend}, but must be from 0 (running statistics) to 1 (batch statistics).")
        start = min(max(blend, _EDGE), 1 - _EDGE)
        logit = math.log(start / (1 - start))
        self.gate_logit = nn.Parameter(torch.full((num_features,), logit, device=device, dtype=dtype))

    @property
    def gate(self) -> Tensor:
        """How far each channel trusts the batch, in (0, 1), shape (channels,)."""
        return widened(self.gate_logit).sigmoid()

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *space); updates the running statistics in training."""
        self._check_input_dim(input)
        return gated_batch_norm(input, self)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


def gated_batch_norm(input: Tensor, layer: GatedBatchNorm) -> Tensor:
    """What a gated layer computes; a ``TorchFunctionMode`` can stand in for it, as for ``F.batch_norm``."""
    if has_torch_function_unary(input):
        output: Tensor = handle_torch_function(gated_batch_norm, (input,), input, layer)
        return output
    if not layer.training or input.numel() == 0:
        return normalize_running(layer, input)
    x = widened(input)
    variance, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
    count = x.numel() // x.shape[1]
    batch, running = Statistics(mean, variance, layer.eps), running_statistics(layer)
    # The gate stays in the graph: DDP waits for the gradient of every parameter.
    gate = layer.gate * (count > 1)
    towards_running = AffineMap.between(batch, running).blend(1 - gate)
    output = normalize_blended(x, batch, towards_running, layer.weight, layer.bias)
    update_running(layer, mean, variance, count)
    return output.to(input.dtype)


class GatedBatchNorm1d(nn.BatchNorm1d, GatedBatchNorm):
    """Gated BN of (N, C) or (N, C, L); arguments as for ``GatedBatchNorm``."""


class GatedBatchNorm2d(nn.BatchNorm2d, GatedBatchNorm):
    """Gated BN of (N, C, H, W); arguments as for ``GatedBatchNorm``."""


class GatedBatchNorm3d(nn.BatchNorm3d, GatedBatchNorm):
    """Gated BN of (N, C, D, H, W); arguments as for ``GatedBatchNorm``."""


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a model without what gated layers add to it: that of the same model with plain BN."""
    state = model.state_dict()
    for key in _gate_keys(model):
        state.pop(key, None)
    return dict(state)


def _gate_keys(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, GatedBatchNorm):
            yield f"{name}.gate_logit".removeprefix(".")
