"""torch.nn's BatchNorm1d/2d/3d, SyncBatchNorm and LazyBatchNorm, and their subclasses."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnprobe.nn.frozen import FrozenBatchNorm
from bnprobe.nn.instance_renorm import InstanceRenorm
from bnprobe.norms.interface import NormCall, NormInfo

_NOT_PROBED: tuple[tuple[type[nn.Module], str], ...] = (
    (FrozenBatchNorm, "frozen batch norm: the same constants in training and at inference"),
    (InstanceRenorm, "instance renorm: the same output in training and at inference"),
)
"""Layers of bnprobe.nn that are BN in name and weights, but not in what they normalize with."""


class BatchNormFamily:
    """Every layer derived from torch's common base of BatchNorm1d/2d/3d and SyncBatchNorm."""

    functionals: tuple[Callable[..., Tensor], ...] = (F.batch_norm,)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, _BatchNorm)

    def obstacle(self, module: nn.Module) -> str | None:
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(is_lazy(tensor) for tensor in tensors):
            return "lazy layer that has not seen a batch yet: run the model once before scanning it"
        return next((reason for kind, reason in _NOT_PROBED if isinstance(module, kind)), None)

    def describe(self, module: nn.Module) -> NormInfo:
        assert isinstance(module, _BatchNorm)  # matches() said so
        tracked = module.num_batches_tracked
        return NormInfo(
            channels=module.num_features,
            eps=module.eps,
            momentum=module.momentum,
            batches_tracked=None if tracked is None else int(tracked),
            running_mean=module.running_mean,
            running_variance=module.running_var,
        )

    def parse(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> NormCall:
        return NormCall(input, running_mean, running_var, weight, bias, training, eps)

    def evaluate(self, call: NormCall) -> Tensor:
        return F.batch_norm(
            call.input,
            call.running_mean,
            call.running_variance,
            call.weight,
            call.bias,
            training=False,
            eps=call.eps,
        )
