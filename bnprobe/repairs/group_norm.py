"""BN to group norm."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.repairs.build import adopt, arguments, space_dimensions
from bnprobe.spec import RepairName, RepairSpec


class GroupNormRepair:
    """Group norm (Wu and He 2018): no batch statistics, and therefore no running ones. Weight and bias are kept."""

    name: RepairName = "group-norm"
    deploys = False
    agrees = True

    def obstacle(self, module: _BatchNorm) -> str | None:
        if module.num_features == 1 and _may_lack_space(module):
            return "has one channel, whose only value per image group norm would make 0"
        return None

    def note(self, module: _BatchNorm) -> str:
        return "running statistics are dropped, and outputs change: fine-tune it"

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        given = arguments(module)
        channels = given.pop("num_features")
        return adopt(nn.GroupNorm(groups_for(channels, spec.groups), channels, **given), module, buffers=False)


def groups_for(channels: int, most: int) -> int:
    """The largest divisor of the channels that is at most ``most`` and leaves two channels in a group.

    A group of one channel is instance norm, another thing; without space it would make everything 0.
    """
    least = min(2, channels)
    return max(groups for groups in range(1, most + 1) if channels % groups == 0 and channels >= groups * least)


def _may_lack_space(module: _BatchNorm) -> bool:
    """(N, C) has one value per channel and image: a group of one channel would be normalized to 0."""
    return space_dimensions(module) in (None, 1)
