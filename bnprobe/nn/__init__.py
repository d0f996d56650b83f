"""Batch Renorm and its relatives, as layers that deploy as plain BN."""

from __future__ import annotations

from bnprobe.nn import functional
from bnprobe.nn.affine import AffineMap, Statistics
from bnprobe.nn.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, BatchRenormBase, SyncBatchRenorm
from bnprobe.nn.clipping import ClippingWatch, watch_clipping
from bnprobe.nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from bnprobe.nn.gated import GatedBatchNorm1d, GatedBatchNorm2d, GatedBatchNorm3d
from bnprobe.nn.instance_renorm import InstanceRenorm1d, InstanceRenorm2d, InstanceRenorm3d
from bnprobe.nn.schedule import RenormSchedule

__all__ = [
    "AffineMap",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchRenormBase",
    "ClippingWatch",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GatedBatchNorm1d",
    "GatedBatchNorm2d",
    "GatedBatchNorm3d",
    "InstanceRenorm1d",
    "InstanceRenorm2d",
    "InstanceRenorm3d",
    "RenormSchedule",
    "Statistics",
    "SyncBatchRenorm",
    "functional",
    "watch_clipping",
]
