"""BN to Batch Renorm."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.nn.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SyncBatchRenorm
from bnprobe.repairs.build import adopt, arguments, no_statistics, space_dimensions
from bnprobe.spec import RepairName, RepairSpec

_VARIANTS: dict[int | None, type[nn.Module]] = {1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d}


class BatchRenormRepair:
    """Batch Renorm with the limits at the end of its schedule; synchronized where the layer was.

    With the ``momentum`` of the spec, or that of the layer where the spec has none.
    """

    name: RepairName = "batch-renorm"
    deploys = True
    agrees = False

    def obstacle(self, module: _BatchNorm) -> str | None:
        return no_statistics(module) or _eps_obstacle(module)

    def note(self, module: _BatchNorm) -> str:
        return "statistics stay synchronized between processes" if _is_synchronized(module) else ""

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        limits = spec.renorm
        settings = {
            **arguments(module),
            "momentum": module.momentum if limits.momentum is None else limits.momentum,
            "r_max": limits.r_max,
            "d_max": limits.d_max,
        }
        if _is_synchronized(module):
            return adopt(SyncBatchRenorm(**settings, process_group=process_group_of(module)), module)
        # Without a bound on the dimensions there is no other variant; alone, it is the same.
        return adopt(_VARIANTS.get(space_dimensions(module), SyncBatchRenorm)(**settings), module)


def process_group_of(module: _BatchNorm) -> object:
    """The processes that a synchronized layer shares its statistics with; None: all of them."""
    return getattr(module, "process_group", None)


def _eps_obstacle(module: _BatchNorm) -> str | None:
    return None if module.eps > 0 else f"has eps {module.eps:g}, and Batch Renorm needs a positive one"


def _is_synchronized(module: _BatchNorm) -> bool:
    return isinstance(module, nn.SyncBatchNorm | SyncBatchRenorm)
