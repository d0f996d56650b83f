"""BN to BN whose statistics are frozen."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.nn.frozen import FrozenBatchNorm, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from bnprobe.repairs.build import Variants, adopt, arguments, no_statistics, space_dimensions
from bnprobe.spec import RepairName, RepairSpec

_VARIANTS: Variants = {None: FrozenBatchNorm, 1: FrozenBatchNorm1d, 2: FrozenBatchNorm2d, 3: FrozenBatchNorm3d}


class FrozenRepair:
    """Running statistics in training as at inference; they should be right, so recalibrate first."""

    name: RepairName = "frozen"
    deploys = True
    agrees = True

    def obstacle(self, module: _BatchNorm) -> str | None:
        return no_statistics(module)

    def note(self, module: _BatchNorm) -> str:
        return "its running statistics no longer change"

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        variant = _VARIANTS[space_dimensions(module)]
        return adopt(variant(**arguments(module), momentum=module.momentum), module)
