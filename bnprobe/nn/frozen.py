"""Frozen BN: always normalizes with its running statistics, in training too."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from bnprobe.nn.base import BatchNormLike


class FrozenBatchNorm(BatchNormLike):
    """Base class of the frozen layers: BN that normalizes with its running statistics in training too.

    The running statistics are never updated, also not by ``torch.optim.swa_utils.update_bn``; weight and bias train as
    usual. Any batch size works, even one value per channel. The keys of the state_dict are those of ``nn.BatchNorm``.
    The input has at least 2 dimensions.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root.
        momentum: Unused; kept so that the layer can be turned back into BN.
        affine: Whether there is a weight and a bias per channel.
        device, dtype: Of parameters and buffers.
        bias: Whether an affine layer has a bias.
    """

    already: ClassVar[str] = "frozen"
    nothing_to_measure: ClassVar[str] = "frozen batch norm: the same constants in training and at inference"

    def reset_running_stats(self) -> None:
        """Do nothing: nothing would bring the statistics back. (New layers have mean 0 and variance 1.)"""

    def _check_eps(self) -> None:
        if self._eps < 0:
            raise ValueError(f"{type(self).__name__} needs an eps that is at least 0, but has {self._eps}.")

    def _normalize(self, input: Tensor, mask: Tensor | None) -> Tensor:
        return self._at_inference(input)

    def _scripted(self, input: Tensor, mask: Tensor | None) -> Tensor:
        return self._at_inference(input)


class FrozenBatchNorm1d(nn.BatchNorm1d, FrozenBatchNorm):
    """Frozen BN for (N, C) or (N, C, L); arguments as for ``FrozenBatchNorm``."""


class FrozenBatchNorm2d(nn.BatchNorm2d, FrozenBatchNorm):
    """Frozen BN for (N, C, H, W); arguments as for ``FrozenBatchNorm``."""


class FrozenBatchNorm3d(nn.BatchNorm3d, FrozenBatchNorm):
    """Frozen BN for (N, C, D, H, W); arguments as for ``FrozenBatchNorm``."""
