"""BN to instance renorm."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.nn.instance_renorm import InstanceRenorm, InstanceRenorm1d, InstanceRenorm2d, InstanceRenorm3d
from bnprobe.repairs.build import Variants, adopt, arguments, no_statistics, space_dimensions
from bnprobe.spec import RepairName, RepairSpec

_VARIANTS: Variants = {None: InstanceRenorm, 1: InstanceRenorm1d, 2: InstanceRenorm2d, 3: InstanceRenorm3d}


class InstanceRenormRepair:
    """Every image by its own statistics, mapped towards the running ones, with the blend of the spec."""

    name: RepairName = "instance-renorm"
    agrees = True
    deploys = False  # only at blend 0 is inference that of BN; deployable_state looks at the layers themselves

    def obstacle(self, module: _BatchNorm) -> str | None:
        return no_statistics(module)

    def note(self, module: _BatchNorm) -> str:
        return "at inference too, images are normalized in part by their own statistics: fine-tune it"

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        variant = _VARIANTS[space_dimensions(module)]
        return adopt(variant(**arguments(module), momentum=module.momentum, blend=spec.blend), module)
