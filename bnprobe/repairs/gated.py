"""BN to gated BN."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.nn.gated import GatedBatchNorm, GatedBatchNorm1d, GatedBatchNorm2d, GatedBatchNorm3d
from bnprobe.repairs.build import Variants, adopt, arguments, no_statistics, space_dimensions
from bnprobe.spec import RepairName, RepairSpec

_VARIANTS: Variants = {None: GatedBatchNorm, 1: GatedBatchNorm1d, 2: GatedBatchNorm2d, 3: GatedBatchNorm3d}


class GatedRepair:
    """A learned gate per channel between batch and running statistics, which starts at the blend of the spec."""

    name: RepairName = "gated"
    deploys = True
    agrees = False

    def obstacle(self, module: _BatchNorm) -> str | None:
        return no_statistics(module)

    def note(self, module: _BatchNorm) -> str:
        return "has a new parameter, gate_logit, which an optimizer made before does not hold"

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        variant = _VARIANTS[space_dimensions(module)]
        return adopt(variant(**arguments(module), momentum=module.momentum, blend=spec.blend), module)
