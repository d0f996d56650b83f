"""BN to synchronized BN, on any device."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.nn.batch_renorm import SyncBatchRenorm
from bnprobe.repairs.batch_renorm import process_group_of
from bnprobe.repairs.build import adopt, arguments, no_statistics
from bnprobe.spec import RepairName, RepairSpec


class SyncRepair:
    """Batch statistics of all processes together: Batch Renorm limited to r = 1 and d = 0, which is BN."""

    name: RepairName = "sync"
    deploys = True
    agrees = False

    def obstacle(self, module: _BatchNorm) -> str | None:
        if module.eps <= 0:
            return f"has eps {module.eps:g}, and the synchronized layer needs a positive one"
        return no_statistics(module)

    def note(self, module: _BatchNorm) -> str:
        return "changes something only where several processes train"

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        group = process_group_of(module)
        settings = {**arguments(module), "momentum": module.momentum, "r_max": 1.0, "d_max": 0.0}
        return adopt(SyncBatchRenorm(**settings, process_group=group), module)
