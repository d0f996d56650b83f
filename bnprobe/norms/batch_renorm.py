"""bnprobe.nn's Batch Renorm layers: batch norm that corrects its batch statistics in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bnprobe.nn.batch_renorm import BatchRenormBase
from bnprobe.nn.functional import batch_renorm, sync_batch_renorm
from bnprobe.norms.batch_norm import BatchNormFamily
from bnprobe.norms.interface import NormCall, NormInfo


class BatchRenormFamily(BatchNormFamily):
    """Every layer derived from one of bnprobe.nn's BatchRenorm1d/2d/3d and SyncBatchRenorm."""

    functionals: tuple[Callable[..., Tensor], ...] = (batch_renorm, sync_batch_renorm)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, BatchRenormBase)

    def describe(self, module: nn.Module) -> NormInfo:
        assert isinstance(module, BatchRenormBase)  # matches() said so
        return replace(super().describe(module), r_max=module.r_max, d_max=module.d_max)

    def parse(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.01,
        eps: float = 1e-5,
        r_max: float | Tensor = 3.0,
        d_max: float | Tensor = 5.0,
        **others: Any,
    ) -> NormCall:
        call = super().parse(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return replace(call, r_max=float(r_max), d_max=float(d_max))
