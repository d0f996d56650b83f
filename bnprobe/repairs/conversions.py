"""How the layers of each repair target are made from BN layers."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.config.spec import RepairSpec
from bnprobe.config.targets import Target, groups_for
from bnprobe.errors import RepairError
from bnprobe.nn.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SyncBatchRenorm
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
from bnprobe.nn.moving_average import (
    MovingAverageBatchNorm,
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
)
from bnprobe.nn.per_domain import DomainBatchNorm, DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d
from bnprobe.registry import load_code
from bnprobe.repairs.preceding import Preceding, preceding

Variants = dict[int | None, type[nn.Module]]
"""Layer class by the number of spatial dimensions, where (N, C) counts as 1; None: for BN layers that take several."""

_SPACE_BY_DIMENSIONS = {(2, 3): 1, (4,): 2, (5,): 3}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Conversion(Protocol):
    """Makes the layers of one repair target.

    Where a layer depends on what surrounds it, there is also ``within(model)``: it returns the conversion for the
    layers of that model, which is asked for obstacles and makes the layers that are put in place.

    It only replaces the normalization. What a subclass does beyond it, hooks, and the places in the model where the
    layer stands are the business of ``bnprobe.repairs.surgery``. A layer class may say more by these attributes:

    - ``training_only``: names of parameters and buffers that BN does not have and inference does not use. They are left
      out of the deployed weights.
    - ``deployment_obstacle``: on layers that derive from torch's ``_BatchNorm`` but may differ from BN at inference,
      why this layer does, a clause; None if it does not.
    - ``nothing_to_measure``: on layers that derive from ``_BatchNorm`` but give the same output in training and at
      inference, why they do, a clause: a scan skips them for this reason.
    - ``normalizes_only = True``: on the class that defines a forward, that it does nothing besides the normalization,
      so that the layer can be converted again. Other layers with a forward of their own are tried out before.
    """

    def obstacle(self, module: _BatchNorm) -> str | None:
        """Why this layer cannot be converted, a clause; None if it can."""

    def note(self, module: _BatchNorm) -> str:
        """What changes besides the class, a clause; empty if nothing does."""

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        """The new layer, with the Parameter and buffer objects of ``module``, which stays unchanged."""


def conversion_of(target: Target, model: nn.Module | None = None) -> Conversion:
    """Import the conversion of a target, and make it that of the layers of a model if one is given.

    Raises:
        RepairError: It cannot be imported.
    """
    conversion: Any = load_code(target.conversion, f'The conversion of the repair target "{target.name}"', RepairError)
    found: Conversion = conversion
    if model is not None and hasattr(conversion, "within"):
        found = conversion.within(model)
    return found


class ToBatchRenorm:
    """Batch Renorm with the final limits of its schedule; synchronized where the layer was.

    The momentum is that of the spec, or the layer's own where the spec has none.
    """

    def obstacle(self, module: _BatchNorm) -> str | None:
        return no_statistics(module) or _eps_obstacle(module, "Batch Renorm")

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
            return adopt(SyncBatchRenorm(**settings, process_group=_process_group(module)), module)
        # SyncBatchRenorm is the only variant that takes any number of dimensions; in one process it is Batch Renorm.
        variants: Variants = {1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d, None: SyncBatchRenorm}
        return adopt(variants[space_dimensions(module)](**settings), module)


class _OfVariants:
    """Makes layers with BN's arguments and settings of the spec, of one class for each number of spatial dimensions.

    Attributes:
        variants: The classes.
        settings: Names of further arguments, which are fields of the spec.
        changes: What changes besides the class, a clause.
        positive_eps: The name of the layer, if it needs a positive eps.
        of_one: What is that of one process, so that no synchronized layer can be converted; empty: nothing.
    """

    variants: ClassVar[Variants]
    settings: ClassVar[tuple[str, ...]] = ()
    changes: ClassVar[str]
    positive_eps: ClassVar[str] = ""
    of_one: ClassVar[str] = ""

    def obstacle(self, module: _BatchNorm) -> str | None:
        if self.of_one and _is_synchronized(module):
            return f"is synchronized between processes, and {self.of_one} of one: make it plain BN first"
        without = no_statistics(module)
        return _eps_obstacle(module, self.positive_eps) if self.positive_eps and without is None else without

    def note(self, module: _BatchNorm) -> str:
        return self.changes

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        given = {name: getattr(spec, name) for name in self.settings}
        variant = self.variants[space_dimensions(module)]
        return adopt(variant(**arguments(module), momentum=module.momentum, **given), module)


class ToFrozen(_OfVariants):
    """BN that uses its running statistics in training too; they should be right, so recalibrate first."""

    variants: ClassVar = {None: FrozenBatchNorm, 1: FrozenBatchNorm1d, 2: FrozenBatchNorm2d, 3: FrozenBatchNorm3d}
    changes = "running statistics stay as they are, in training too"


class ToGroupNorm:
    """Group norm (Wu and He 2018), without batch and running statistics; weight and bias are kept."""

    def obstacle(self, module: _BatchNorm) -> str | None:
        may_lack_space = space_dimensions(module) in (None, 1)  # (N, C) has one value per channel and sample
        if module.num_features == 1 and may_lack_space:
            return "has one channel and may get one value per sample, where group norm would always give 0"
        return None

    def note(self, module: _BatchNorm) -> str:
        return "running statistics are dropped, and outputs change"

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        given = arguments(module)
        channels = given.pop("num_features")
        return adopt(nn.GroupNorm(groups_for(channels, spec.groups), channels, **given), module, buffers=False)


class ToSync:
    """BN with the statistics of all processes, on any device: Batch Renorm limited to r = 1 and d = 0."""

    def obstacle(self, module: _BatchNorm) -> str | None:
        return _eps_obstacle(module, "the synchronized layer") or no_statistics(module)

    def note(self, module: _BatchNorm) -> str:
        return "an effect in multi-process training only"

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        settings = {**arguments(module), "momentum": module.momentum, "r_max": 1.0, "d_max": 0.0}
        return adopt(SyncBatchRenorm(**settings, process_group=_process_group(module)), module)


class ToInstanceRenorm(_OfVariants):
    """Every sample with its own statistics, corrected towards the running ones, with the blend of the spec."""

    variants: ClassVar = {None: InstanceRenorm, 1: InstanceRenorm1d, 2: InstanceRenorm2d, 3: InstanceRenorm3d}
    settings = ("blend",)
    changes = "at inference too, samples are normalized by their own statistics, to the extent of the blend"


class ToExampleWeighing(_OfVariants):
    """BN whose running statistics take in the sample's own moments at inference, with the blend of the spec."""

    variants: ClassVar = {
        None: ExampleWeighedBatchNorm,
        1: ExampleWeighedBatchNorm1d,
        2: ExampleWeighedBatchNorm2d,
        3: ExampleWeighedBatchNorm3d,
    }
    settings = ("blend",)
    changes = "at inference, samples are normalized by their own statistics, to the extent of the blend"

    def note(self, module: _BatchNorm) -> str:
        alone = "; in training, statistics are no longer synchronized" if _is_synchronized(module) else ""
        return f"{self.changes}{alone}"


class ToGated(_OfVariants):
    """A learned gate per channel between batch and running statistics, which starts at the blend of the spec."""

    variants: ClassVar = {None: GatedBatchNorm, 1: GatedBatchNorm1d, 2: GatedBatchNorm2d, 3: GatedBatchNorm3d}
    settings = ("blend",)
    changes = "a new parameter, gate_logit, which existing optimizers do not know: add it"


class ToGhost(_OfVariants):
    """Parts of a batch, each normalized by itself, of at most the samples that the spec says."""

    variants: ClassVar = {None: GhostBatchNorm, 1: GhostBatchNorm1d, 2: GhostBatchNorm2d, 3: GhostBatchNorm3d}
    settings = ("virtual_batch_size",)
    changes = "running statistics move once for every part of a batch"
    positive_eps = "ghost batch norm"
    of_one = "ghost batches are parts of the batch"


class ToMovingAverage(_OfVariants):
    """Statistics of the last batches, as many as the spec says, in both passes."""

    variants: ClassVar = {
        None: MovingAverageBatchNorm,
        1: MovingAverageBatchNorm1d,
        2: MovingAverageBatchNorm2d,
        3: MovingAverageBatchNorm3d,
    }
    settings = ("window",)
    changes = "its gradient is averaged over batches, and is not the derivative of its output"
    positive_eps = "moving average batch norm"
    of_one = "averages of batches are"


class ToCrossIteration(_OfVariants):
    """Statistics of the last batches at the present weights of the convolution before, as many as the spec says.

    Args:
        before: What precedes each layer, if the model around them is known: then the new layers follow it.
    """

    variants: ClassVar = {
        None: CrossIterationBatchNorm,
        1: CrossIterationBatchNorm1d,
        2: CrossIterationBatchNorm2d,
        3: CrossIterationBatchNorm3d,
    }
    settings = ("window", "burn_in")
    changes = "the convolution or linear module before it gets a forward hook, by which the layer sees its input"
    positive_eps = "cross-iteration batch norm"
    of_one = "the batches of a window are"

    def __init__(self, before: Preceding | None = None) -> None:
        self._before = before

    def within(self, model: nn.Module) -> ToCrossIteration:
        return ToCrossIteration(preceding(model))

    def obstacle(self, module: _BatchNorm) -> str | None:
        found = self._preceding(module)
        return super().obstacle(module) or (found if isinstance(found, str) else None)

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        layer, before = super().replacement(module, spec), self._preceding(module)
        assert isinstance(layer, CrossIterationBatchNorm)  # as all variants are
        return layer.follow(before) if isinstance(before, nn.Module) else layer

    def _preceding(self, module: _BatchNorm) -> nn.Module | str | None:
        return None if self._before is None else self._before[module]


class ToPerDomain(_OfVariants):
    """Statistics for each domain, which all begin as those of the layer; weight and bias stay shared."""

    variants: ClassVar = {None: DomainBatchNorm, 1: DomainBatchNorm1d, 2: DomainBatchNorm2d, 3: DomainBatchNorm3d}
    settings = ("domains",)
    changes = "every domain begins with the statistics of all"
    positive_eps = "the layer with statistics per domain"
    of_one = "statistics per domain are"

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        layer = super().replacement(module, spec)
        assert isinstance(layer, DomainBatchNorm)  # as all variants are
        layer.share()
        return layer


def space_dimensions(module: _BatchNorm) -> int | None:
    """Number of spatial dimensions that the layer's own input check allows: 1, 2 or 3; None if several."""
    return _SPACE_BY_DIMENSIONS.get(tuple(n for n in range(2, 6) if _takes(module, n)))


def arguments(module: _BatchNorm) -> dict[str, Any]:
    """The arguments with which a BN-like replacement is made, except momentum."""
    weight = module.weight if module.weight is not None else module.running_mean
    return {
        "num_features": module.num_features,
        "eps": module.eps,
        "affine": module.weight is not None or module.bias is not None,
        "device": None if weight is None else weight.device,
        "dtype": None if weight is None else weight.dtype,
    }


def adopt(replacement: nn.Module, module: _BatchNorm, buffers: bool = True) -> nn.Module:
    """Give a replacement the Parameter and buffer objects of a layer, so that its optimizer keeps working."""
    replacement.register_parameter("weight", module.weight)
    replacement.register_parameter("bias", module.bias)
    for name in _STATISTICS if buffers else ():
        if getattr(module, name, None) is not None:  # a layer may keep statistics and not count their updates
            setattr(replacement, name, getattr(module, name))
    if isinstance(replacement, _BatchNorm):
        replacement.track_running_stats = module.track_running_stats  # False beside statistics: they stay as they are
    return replacement


def no_statistics(module: _BatchNorm) -> str | None:
    """The obstacle of targets that normalize with running statistics."""
    if module.running_mean is None or module.running_var is None:
        return (
            "keeps no running statistics (track_running_stats=False): make it with track_running_stats=True and"
            " recalibrate first"
        )
    return None


def _takes(module: _BatchNorm, dimensions: int) -> bool:
    try:
        module._check_input_dim(torch.empty((1,) * dimensions, device="meta"))
    except (ValueError, NotImplementedError, RuntimeError):
        return False
    return True


def _eps_obstacle(module: _BatchNorm, who: str) -> str | None:
    return None if module.eps > 0 else f"has eps {module.eps:g}, and {who} needs a positive one"


def _is_synchronized(module: _BatchNorm) -> bool:
    return isinstance(module, nn.SyncBatchNorm | SyncBatchRenorm)


def _process_group(module: _BatchNorm) -> object:
    """The processes that a synchronized layer shares its statistics with; None: all of them."""
    return getattr(module, "process_group", None)
