"""BN that always normalizes with its running statistics, in training too."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.nn.blended import normalize_running


class FrozenBatchNorm(_BatchNorm):
    """What the frozen layers share: BN as at inference, in training and at inference alike.

    The running statistics are constants that nothing updates; weight and bias train as usual. No batch is ever looked
    at, so any batch size does, one value per channel included. Keys of the state_dict are those of ``nn.BatchNorm``.

    Args:
        num_features: Channels.
        eps: Added to the variance inside the root.
        momentum: Has no effect; kept for whoever turns the layer back into BN.
        affine: Have a weight and a bias per channel.
        device, dtype: Of parameters and buffers.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *space) with the running statistics."""
        self._check_input_dim(input)
        return normalize_running(self, input)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class FrozenBatchNorm1d(nn.BatchNorm1d, FrozenBatchNorm):
    """Frozen BN of (N, C) or (N, C, L); arguments as for ``FrozenBatchNorm``."""


class FrozenBatchNorm2d(nn.BatchNorm2d, FrozenBatchNorm):
    """Frozen BN of (N, C, H, W); arguments as for ``FrozenBatchNorm``."""


class FrozenBatchNorm3d(nn.BatchNorm3d, FrozenBatchNorm):
    """Frozen BN of (N, C, D, H, W); arguments as for ``FrozenBatchNorm``."""
