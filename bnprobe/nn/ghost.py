"""Ghost batch norm (Hoffer et al. 2017): a batch is normalized in parts, as if these were the batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from bnprobe.errors import UsageError
from bnprobe.nn.base import BatchNormLike, in_parts, takes_numbers
from bnprobe.nn.functional import batch_renorm
from bnprobe.nn.plain import parts_of, renormalize


class GhostBatchNorm(BatchNormLike):
    """Base class of the ghost batch norm layers (Hoffer et al. 2017, arXiv 1705.08741, algorithm 1).

    In training a batch is divided into the fewest equal parts of at most ``virtual_batch_size`` consecutive samples
    (the sizes differ by at most one). Each part is normalized with its own mean and biased variance, and moves the
    running statistics, one part after the other. So a batch of k parts moves these as k batches of BN do. At inference,
    and for batches up to ``virtual_batch_size``, the layer is BN, and the keys of the state_dict are those of
    ``nn.BatchNorm``. The input has at least 2 dimensions.

    Two things are as in ``nn.BatchNorm`` and not as in the paper: the running variance is an average of unbiased
    variances, where the paper averages deviations, and ``momentum`` is the weight of the new part.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root; must be positive in training.
        momentum: Weight of the new part in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        virtual_batch_size: Most samples in a part.
        device, dtype: Of parameters and buffers.
        bias: Whether an affine layer has a bias.

    Raises:
        UsageError: ``virtual_batch_size`` is below 1.
        ValueError: (forward) In training, a part has one value per channel, which has no variance, as in BN.
    """

    __constants__ = [*BatchNormLike.__constants__, "virtual_batch_size"]  # noqa: RUF012 (as torch has it)

    @takes_numbers
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        virtual_batch_size: int = 32,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype, bias=bias)
        if virtual_batch_size < 1:
            raise UsageError(f"virtual_batch_size is {virtual_batch_size}, but must be at least 1.")
        self.virtual_batch_size = virtual_batch_size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"

    def _normalize(self, input: Tensor, mask: Tensor | None) -> Tensor:
        return ghost_batch_norm(input, self, mask)

    def _in_training(self, input: Tensor, mask: Tensor | None) -> Tensor:
        return in_parts(self._normalize_part, input, mask, self._parts(input))

    def _normalize_part(self, input: Tensor, mask: Tensor | None) -> Tensor:
        given: dict[str, Any] = {} if mask is None else {"mask": mask}
        return batch_renorm(
            input, *self._statistics(), self.weight, self.bias,
            training=True, momentum=self._count_batch(), eps=self._eps, r_max=1.0, d_max=0.0,
            track=self.track_running_stats, **given,
        )  # fmt: skip

    def _scripted(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if not self.training:
            return self._at_inference(input)
        mean, variance = self._statistics()
        number = self._parts(input)
        outputs: list[Tensor] = []
        for i, part in enumerate(torch.tensor_split(input, number)):
            chosen = None if mask is None else torch.tensor_split(mask, number)[i]
            rate = self._count_batch()
            if part.numel() == 0:
                return self._at_inference(input)
            outputs.append(
                renormalize(
                    part, self.weight, self.bias, mean, variance, None, None, chosen, None, rate, 0.0,
                    self._eps, 1.0, 1.0, 0.0, False, self.track_running_stats,
                )
            )  # fmt: skip
        return torch.cat(outputs)

    def _parts(self, input: Tensor) -> int:
        """The number of parts of a batch."""
        rows = input.shape[0]
        number = parts_of(rows, self.virtual_batch_size)
        if input.numel() > 0 and input.numel() // (rows * input.shape[1]) * (rows // number) == 1:
            raise ValueError(
                f"expected more than 1 value per channel in each part of a batch in training, got {rows} samples of one"
                f" value in {number} parts (virtual_batch_size {self.virtual_batch_size})"
            )
        return number


def ghost_batch_norm(input: Tensor, layer: GhostBatchNorm, mask: Tensor | None = None) -> Tensor:
    """The forward pass of a ghost layer (internal); a ``TorchFunctionMode`` can intercept it like ``F.batch_norm``."""
    if has_torch_function_unary(input):
        given = () if mask is None else (mask,)
        output: Tensor = handle_torch_function(ghost_batch_norm, (input,), input, layer, *given)
        return output
    return layer._in_training(input, mask) if layer.training else layer._at_inference(input)


class GhostBatchNorm1d(nn.BatchNorm1d, GhostBatchNorm):
    """Ghost batch norm for (N, C) or (N, C, L); arguments as for ``GhostBatchNorm``."""


class GhostBatchNorm2d(nn.BatchNorm2d, GhostBatchNorm):
    """Ghost batch norm for (N, C, H, W); arguments as for ``GhostBatchNorm``."""


class GhostBatchNorm3d(nn.BatchNorm3d, GhostBatchNorm):
    """Ghost batch norm for (N, C, D, H, W); arguments as for ``GhostBatchNorm``."""
