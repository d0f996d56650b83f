"""bnprobe.nn's gated BN: batch norm that goes a learned part of the way to its running statistics in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bnprobe.nn.gated import GatedBatchNorm, gated_batch_norm
from bnprobe.norms.batch_norm import BatchNormFamily
from bnprobe.norms.interface import NormCall, NormInfo


class GatedFamily(BatchNormFamily):
    """GatedBatchNorm and what derives from it: a correction without limits, of which the gate leaves a part."""

    functionals: tuple[Callable[..., Tensor], ...] = (gated_batch_norm,)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, GatedBatchNorm)

    def describe(self, module: nn.Module) -> NormInfo:
        assert isinstance(module, GatedBatchNorm)  # matches() said so
        return replace(super().describe(module), r_max=math.inf, d_max=math.inf, gate=module.gate.detach())

    def parse(self, *args: Any, **kwargs: Any) -> NormCall:
        x, layer = args
        own = (layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training, layer.eps)
        return NormCall(x, *own, r_max=math.inf, d_max=math.inf, gate=layer.gate.detach())
