"""Frozen BN: always normalizes with its running statistics, in training too."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.nn.blended import normalize_running
from bnprobe.nn.kernels import require_channels


class FrozenBatchNorm(_BatchNorm):
    """Base class of the frozen layers: BN that normalizes with its running statistics in training too.

    The running statistics are never updated; weight and bias train as usual. Any batch size works, even one value per
    channel. The keys of the state_dict are those of ``nn.BatchNorm``. The input has at least 2 dimensions.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root.
        momentum: Unused; kept so that the layer can be turned back into BN.
        affine: Whether there is a weight and a bias per channel.
        device, dtype: Of parameters and buffers.
    """

    normalizes_only: ClassVar[bool] = True
    nothing_to_measure: ClassVar[str] = "frozen batch norm: the same constants in training and at inference"

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
        """Normalize an input of shape (N, C, *space) with the running statistics.

        Raises:
            ValueError: The input has the wrong number of dimensions.
        """
        self._check_input_dim(input)
        return normalize_running(self, input)

    def _check_input_dim(self, input: Tensor) -> None:
        require_channels(input)


class FrozenBatchNorm1d(nn.BatchNorm1d, FrozenBatchNorm):
    """Frozen BN for (N, C) or (N, C, L); arguments as for ``FrozenBatchNorm``."""


class FrozenBatchNorm2d(nn.BatchNorm2d, FrozenBatchNorm):
    """Frozen BN for (N, C, H, W); arguments as for ``FrozenBatchNorm``."""


class FrozenBatchNorm3d(nn.BatchNorm3d, FrozenBatchNorm):
    """Frozen BN for (N, C, D, H, W); arguments as for ``FrozenBatchNorm``."""
