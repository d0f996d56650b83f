"""Batch Renorm and related layers, which train where BN struggles and deploy as plain BN.

The names in ``__all__`` are public, as are the functions of ``bnprobe.nn.functional``. Everything else in these modules
is internal and may change.
"""

from __future__ import annotations

from bnprobe.nn import functional
from bnprobe.nn.batch_renorm import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    BatchRenormBase,
    ClippingWatch,
    LazyBatchRenorm1d,
    LazyBatchRenorm2d,
    LazyBatchRenorm3d,
    SyncBatchRenorm,
    watch_clipping,
)
from bnprobe.nn.cross_iteration import (
    CrossIterationBatchNorm,
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
)
from bnprobe.nn.example_weighing import (
    ExampleWeighedBatchNorm,
    ExampleWeighedBatchNorm1d,
    ExampleWeighedBatchNorm2d,
    ExampleWeighedBatchNorm3d,
)
from bnprobe.nn.frozen import FrozenBatchNorm, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from bnprobe.nn.gated import GatedBatchNorm, GatedBatchNorm1d, GatedBatchNorm2d, GatedBatchNorm3d
from bnprobe.nn.ghost import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from bnprobe.nn.instance_renorm import InstanceRenorm, InstanceRenorm1d, InstanceRenorm2d, InstanceRenorm3d
from bnprobe.nn.kernels import AffineMap, Statistics
from bnprobe.nn.limits import RenormSchedule
from bnprobe.nn.moving_average import (
    MovingAverageBatchNorm,
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
)
from bnprobe.nn.per_domain import DomainBatchNorm, DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d, domain

__all__ = [
    "AffineMap",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchRenormBase",
    "ClippingWatch",
    "CrossIterationBatchNorm",
    "CrossIterationBatchNorm1d",
    "CrossIterationBatchNorm2d",
    "CrossIterationBatchNorm3d",
    "DomainBatchNorm",
    "DomainBatchNorm1d",
    "DomainBatchNorm2d",
    "DomainBatchNorm3d",
    "ExampleWeighedBatchNorm",
    "ExampleWeighedBatchNorm1d",
    "ExampleWeighedBatchNorm2d",
    "ExampleWeighedBatchNorm3d",
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GatedBatchNorm",
    "GatedBatchNorm1d",
    "GatedBatchNorm2d",
    "GatedBatchNorm3d",
    "GhostBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "InstanceRenorm",
    "InstanceRenorm1d",
    "InstanceRenorm2d",
    "InstanceRenorm3d",
    "LazyBatchRenorm1d",
    "LazyBatchRenorm2d",
    "LazyBatchRenorm3d",
    "MovingAverageBatchNorm",
    "MovingAverageBatchNorm1d",
    "MovingAverageBatchNorm2d",
    "MovingAverageBatchNorm3d",
    "RenormSchedule",
    "Statistics",
    "SyncBatchRenorm",
    "domain",
    "functional",
    "watch_clipping",
]
