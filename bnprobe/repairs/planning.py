"""What a repair would change: ``plan`` looks, and changes nothing; ``apply`` changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.errors import RepairError
from bnprobe.records import LayerChange, Plan, Refusal
from bnprobe.repairs.beyond import further_work
from bnprobe.repairs.catalogue import repair_named
from bnprobe.repairs.interface import Repair
from bnprobe.repairs.layers import NamedModule, batch_norms, named_once, refuse_wrapped, unknown_name
from bnprobe.repairs.surgery import obstacle, replace_everywhere, succeed
from bnprobe.spec import RepairSpec


def plan(model: nn.Module, wanted: Mapping[str, str], to: str, source: str) -> Plan:
    """Say what converting some layers would change; the model stays as it is.

    Args:
        model: Not wrapped.
        wanted: Names of layers, any alias will do, and why each is wanted, a clause.
        to: Name of a repair.
        source: What chose the layers, a phrase.

    Raises:
        RepairError: The model is wrapped; there is no such repair or no such layer.
    """
    refuse_wrapped(model)
    repair = repair_named(to)
    reasons = _by_first_name(model, wanted)
    considered = [
        _considered(found, repair, reasons[found.name]) for found in named_once(model) if found.name in reasons
    ]
    return Plan(
        to=repair.name,
        source=source,
        changes=tuple(each for each in considered if isinstance(each, LayerChange)),
        refused=tuple(each for each in considered if isinstance(each, Refusal)),
        untouched=sum(found.name not in reasons for found in batch_norms(model)),
        deploys=repair.deploys,
    )


def apply(model: nn.Module, plan: Plan, spec: RepairSpec, *, inplace: bool = False) -> nn.Module:
    """Convert the layers of a plan.

    Parameters and buffers of the layers stay the same objects (those of the copy, unless ``inplace``), with their
    requires_grad, device and dtype; so do hooks, training flags, and the modules that a subclass applies after
    normalizing. Shared layers stay shared.

    Args:
        model: What the plan was made for, or a copy of it.
        plan: The layers under ``refused`` stay as they are.
        spec: Settings of the new layers.
        inplace: Change ``model`` itself: all of the plan, or nothing if this raises.

    Returns:
        The converted model: a copy, or with ``inplace`` the model itself; but where the model itself is the layer, its
        replacement.

    Raises:
        RepairError: The model is wrapped, cannot be copied, or is not that of the plan.
    """
    refuse_wrapped(model)
    target = model if inplace else _copy(model)
    repair = repair_named(plan.to)
    modules = {found.name: found for found in named_once(target)}
    chosen = [_chosen(modules, change, repair) for change in plan.changes]
    # Nothing of the target changes before every replacement is there.
    made = [(layer, repair.replacement(layer, spec), further_work(layer)[0]) for layer in chosen]
    return replace_everywhere(target, {layer: succeed(new, layer, further) for layer, new, further in made})


def _considered(found: NamedModule, repair: Repair, reason: str) -> LayerChange | Refusal:
    layer = found.module
    refusal = _obstacle(layer, repair)
    if refusal or not isinstance(layer, _BatchNorm):
        return Refusal(found.name, found.kind, refusal or "is no Batch Normalization layer")
    kind = type(repair.replacement(layer, RepairSpec())).__name__
    return LayerChange(found.name, found.aliases, found.kind, kind, reason, repair.note(layer))


def _obstacle(module: nn.Module, repair: Repair) -> str | None:
    """Why a repair cannot convert this module, a clause; None if it can."""
    reason = obstacle(module)
    return repair.obstacle(module) if reason is None and isinstance(module, _BatchNorm) else reason


def _chosen(modules: Mapping[str, NamedModule], change: LayerChange, repair: Repair) -> _BatchNorm:
    """The layer that a change is about.

    Raises:
        RepairError: It is not there, is another kind of layer, or cannot be converted (any more).
    """
    found = modules.get(change.name)
    if found is None:
        raise unknown_name(change.name, modules)
    if found.kind != change.kind:
        raise RepairError(
            f"The plan is of another model: {change.name} is {found.kind} here and {change.kind} there. Make it anew."
        )
    reason = _obstacle(found.module, repair)
    if reason or not isinstance(found.module, _BatchNorm):
        raise RepairError(f"{found.name} ({found.kind}) cannot be converted to {repair.name}: it {reason}.")
    return found.module


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever the user's modules hold
        raise RepairError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Convert it in place:"
            " bnprobe.convert(..., inplace=True)."
        ) from error


def _by_first_name(model: nn.Module, wanted: Mapping[str, str]) -> dict[str, str]:
    """The reasons by the first name of each layer.

    Raises:
        RepairError: A name is that of no module.
    """
    first = {name: found.name for found in named_once(model) for name in found.names}
    for name in wanted:
        if name not in first:
            raise unknown_name(name, first)
    return {first[name]: reason for name, reason in wanted.items()}
