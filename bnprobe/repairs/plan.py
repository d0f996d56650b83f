"""Which layers to convert, and why: ``plan`` only looks, ``apply`` changes the model, ``convert`` does both."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.config.load import from_arguments
from bnprobe.config.spec import RepairSpec, matches_any
from bnprobe.config.targets import AUTO, DEFAULT_TARGET, TARGETS, Target, require_used
from bnprobe.errors import DeviceError, RepairError, UsageError, message_of
from bnprobe.loading.arguments import require_model
from bnprobe.loading.model import unwrapped
from bnprobe.measure.layers import NamedModule, named_once
from bnprobe.measure.memory import is_out_of_memory
from bnprobe.measure.origins import owner_of
from bnprobe.measure.reach import what_cannot_be_copied
from bnprobe.measure.restore import preserved_process, undone_if_failed
from bnprobe.nn.base import BatchNormLike
from bnprobe.numbers import listed
from bnprobe.records import ROOT, Layer, LayerChange, Plan, Refusal, Report
from bnprobe.repairs.conversions import Conversion, conversion_of
from bnprobe.repairs.surgery import applies_children, obstacle, replace_everywhere, succeed
from bnprobe.rules import title_of
from bnprobe.wording import from_python, nearest


@from_python
def convert(
    model: nn.Module,
    layers: Iterable[str] | Report | None = None,
    *,
    to: str = DEFAULT_TARGET,
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """Convert BN layers of a model; what stays as it is, ``bnprobe.repairs.apply`` says.

    Args:
        model: Any module; not wrapped in DataParallel, DDP or torch.compile.
        layers: Names or globs of layers; or a report of this model, for the layers that it flags; None: every BN layer.
        to: A repair target, e.g. "frozen": a name of ``bnprobe.config.targets.TARGETS``, as in
            ``bnprobe convert --help``.
        inplace: Change ``model`` itself; an optimizer that holds its parameters keeps working.
        **options: Settings of the layers, where those of ``to`` have them: groups, blend, virtual_batch_size, window,
            burn_in, domains, renorm. ``bnprobe.config.spec.RepairSpec`` says what they are, with the defaults.

    Returns:
        The converted model, a copy unless ``inplace``. If the model itself is the layer, its replacement either way.

    Raises:
        RepairError: A layer cannot be converted (then none is), or the report is from another model.
        UsageError: An option is unknown, has a wrong value, or has no effect on layers of ``to``.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> report = bnprobe.scan(model, loader, batch_size=2)
        >>> repaired = bnprobe.convert(model, report)  # the layers that it flags, to Batch Renorm
        >>> repaired[1]
        BatchRenorm2d(4, eps=1e-05, momentum=0.01, affine=True, r_max=3, d_max=5)
        >>> frozen = bnprobe.convert(model, ["1"], to="frozen")
    """
    require_model(model)
    spec = _spec({"to": to, **options})
    refuse_wrapped(model)
    with undone_if_failed(model) if inplace else preserved_process():
        made = plan(model, _wanted(model, layers), spec.to, "bnprobe.convert")
        _require_all(made)
        return apply(model, made, spec, inplace=inplace)


def plan(model: nn.Module, wanted: Mapping[str, str], to: str, source: str) -> Plan:
    """Say what converting some layers would change; the model stays as it is.

    Args:
        model: Not wrapped.
        wanted: Names of layers, by any of their names, and why each is wanted, a clause.
        to: Name of a repair target.
        source: What chose the layers, a phrase.

    Raises:
        RepairError: The model is wrapped; there is no such target or no such layer.
    """
    refuse_wrapped(model)
    target = TARGETS[to]
    conversion = conversion_of(target, model)
    reasons = _by_first_name(model, wanted)
    considered = [
        _considered(found, target, conversion, reasons[found.name])
        for found in named_once(model)
        if found.name in reasons
    ]
    return Plan(
        to=target.name,
        source=source,
        changes=tuple(each for each in considered if isinstance(each, LayerChange)),
        refused=tuple(each for each in considered if isinstance(each, Refusal)),
        untouched=sum(found.name not in reasons for found in batch_norms(model)),
        deploys=target.deploys,
    )


def apply(model: nn.Module, plan: Plan, spec: RepairSpec, *, inplace: bool = False) -> nn.Module:
    """Convert the layers of a plan.

    Parameters and buffers of the layers stay the same objects (those of the copy, unless ``inplace``), with their
    requires_grad, device and dtype; so do hooks, training flags, and the modules that a subclass applies after
    normalizing. Shared layers stay shared.

    Args:
        model: The model of the plan, or a copy of it.
        plan: The layers under ``refused`` stay as they are.
        spec: Settings of the new layers.
        inplace: Change ``model`` itself: all of the plan, or nothing if this raises.

    Returns:
        The converted model: a copy, or with ``inplace`` the model itself. If the model itself is the layer, its
        replacement.

    Raises:
        RepairError: The model is wrapped, cannot be copied, or is not that of the plan.
        DeviceError: There is not enough memory for the new layers.
    """
    refuse_wrapped(model)
    target = model if inplace else _copy(model)
    conversion = conversion_of(TARGETS[plan.to], target)
    modules = {found.name: found for found in named_once(target)}
    chosen = [_chosen(modules, change, plan.to, conversion) for change in plan.changes]
    # Make every replacement before the model is changed: if one fails, nothing is changed.
    try:
        made = [(layer, conversion.replacement(layer, spec), applies_children(layer)) for layer in chosen]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(f"There is not enough memory for the layers of {plan.to}: {message_of(error)}") from None
    for layer, new, _ in made:
        if isinstance(layer, BatchNormLike) and type(new) is not type(layer):
            layer.leave()
    return replace_everywhere(target, {layer: succeed(new, layer, further) for layer, new, further in made})


def wanted_by_globs(model: nn.Module, globs: Iterable[str]) -> dict[str, str]:
    """The BN layers with a name that a glob matches; the reason is the first such glob.

    The exact name of another module counts too: the plan then says why it cannot be converted.

    Raises:
        RepairError: A glob matches nothing; names the nearest layer.
    """
    layers = batch_norms(model)
    modules = {name: found for found in named_once(model) for name in found.names}
    wanted: dict[str, str] = {}
    for glob in globs:
        matched = [layer for layer in layers if matches_any(glob, layer.names)]
        if not matched and glob in modules:
            matched = [modules[glob]]
        if not matched:
            raise _unknown_name(glob, [name for layer in layers for name in layer.names], "BN layer")
        for layer in matched:
            wanted.setdefault(layer.name, f"matches {glob}" if glob not in layer.names else "named")
    return wanted


def wanted_from_report(report: Report, model: nn.Module) -> dict[str, str]:
    """The layers that a report flags; the reason is the figure and the cause.

    Where it flags none, those of its errors whose remedy is a conversion: what a scan advises, a repair does. The model
    may have layers that the report lacks: a scan can be told to leave some out.

    Raises:
        RepairError: The report is from another model; names the first layers that differ.
    """
    _require_same_model(report, model)
    modules = {name for found in named_once(model) for name in found.names}
    reasons = {layer.name: _reason(layer, report) for layer in report.layers if layer.flagged} or _advised(report)
    return {owner_of(name, modules): reason for name, reason in reasons.items()}


def _advised(report: Report) -> dict[str, str]:
    """The layers of errors whose remedy is a conversion, and the cause; all layers where it is one of the model."""
    every = [layer.name for layer in report.layers]
    found: dict[str, str] = {}
    for diagnosis in report.diagnoses:
        if diagnosis.severity == "error" and "bnprobe convert" in diagnosis.remedy:
            for name in diagnosis.layers or every:
                found.setdefault(name, title_of(diagnosis.rule, diagnosis.cause))
    return found


def batch_norms(model: nn.Module) -> list[NamedModule]:
    """The layers that derive from torch's BN, in network order."""
    return [found for found in named_once(model) if isinstance(found.module, _BatchNorm)]


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that is a wrapper, or has one around BN layers, since a wrapper would not see them change.

    Raises:
        RepairError: Names the wrapper and what to do instead.
    """
    for found in named_once(model):
        advice = _unwrapping_advice(found.module)
        if advice and (found.name == ROOT or _holds_norm(found.module)):
            place = "The model is" if found.name == ROOT else f"{found.name} is"
            raise RepairError(f"{place} wrapped in {found.kind}, which would not see its layers change: {advice}.")


def _wanted(model: nn.Module, layers: Iterable[str] | Report | None) -> Mapping[str, str]:
    if isinstance(layers, Report):
        wanted = wanted_from_report(layers, model)
    elif layers is None:
        wanted = {layer.name: "all layers" for layer in batch_norms(model)}
    else:
        wanted = wanted_by_globs(model, [layers] if isinstance(layers, str) else layers)
    if not wanted:
        what = "The report flags no layer" if isinstance(layers, Report) else "No BN layer was named"
        what = f"{type(model).__name__} has no Batch Normalization layer" if layers is None else what
        raise RepairError(f"{what}: there is nothing to convert.")
    return wanted


def refusals(made: Plan) -> list[str]:
    """Which layers cannot be converted and why, a clause for every reason."""
    return [
        f"{listed(names)} ({kind}){':' if len(names) > 1 else ''} {reason}"
        for (kind, reason), names in made.refused_by_reason().items()
    ]


def _require_all(made: Plan) -> None:
    if made.refused:
        reasons = "\n".join(f"{each}." for each in refusals(made))
        advice = (
            f"\nName the others ({len(made.changes)}) in layers=[...] to convert them alone." if made.changes else ""
        )
        raise RepairError(f"Cannot be converted to {made.to}:\n{reasons}{advice}")


def _spec(options: Mapping[str, Any]) -> RepairSpec:
    """The repair section that the arguments of ``convert`` make.

    Raises:
        UsageError: An argument is unknown or wrong, or the target does not use it.
    """
    known = tuple(dict.fromkeys(name for target in TARGETS for name in target.settings))
    unknown = sorted(options.keys() - {"to", *known})
    if unknown:
        near = nearest(unknown[0], known, cutoff=0.0)
        raise UsageError(f'convert has no option "{unknown[0]}" (known: {", ".join(known)}); the nearest is "{near}".')
    if options["to"] == AUTO:
        raise UsageError(
            'to="auto" trains every target to choose one: name a target, or run bnprobe convert --finetune.'
        )
    spec = from_arguments(RepairSpec, options)
    require_used(spec.to, {name: options[name] for name in known if name in options}, "{}={!r}".format)
    return spec


def _considered(found: NamedModule, target: Target, conversion: Conversion, reason: str) -> LayerChange | Refusal:
    layer = found.module
    refusal = _obstacle(layer, conversion)
    if refusal or not isinstance(layer, _BatchNorm):
        return Refusal(found.name, found.kind, refusal or "is not a Batch Normalization layer")
    # A layer that is made for the model around it may set hooks there, and a plan changes nothing.
    kind = type(conversion_of(target).replacement(layer, RepairSpec())).__name__
    return LayerChange(found.name, found.aliases, found.kind, kind, reason, conversion.note(layer))


def _obstacle(module: nn.Module, conversion: Conversion) -> str | None:
    """Why this module cannot be converted, a clause; None if it can."""
    reason = obstacle(module)
    return conversion.obstacle(module) if reason is None and isinstance(module, _BatchNorm) else reason


def _chosen(modules: Mapping[str, NamedModule], change: LayerChange, to: str, conversion: Conversion) -> _BatchNorm:
    """The layer of a change.

    Raises:
        RepairError: It is not there, is another kind of layer, or cannot be converted any more.
    """
    found = modules.get(change.name)
    if found is None:
        raise _unknown_name(change.name, modules)
    if found.kind != change.kind:
        raise RepairError(
            f"The plan is for another model: {change.name} is {found.kind} here and {change.kind} there. Make a new"
            " plan."
        )
    reason = _obstacle(found.module, conversion)
    if reason or not isinstance(found.module, _BatchNorm):
        raise RepairError(f"{found.name} ({found.kind}) cannot be converted to {to}: it {reason}.")
    return found.module


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever the user's modules hold
        raise RepairError(
            f"{type(model).__name__} cannot be copied{what_cannot_be_copied(model)} ({type(error).__name__}:"
            f" {message_of(error)}). Convert it in place: bnprobe.convert(..., inplace=True)."
        ) from error


def _by_first_name(model: nn.Module, wanted: Mapping[str, str]) -> dict[str, str]:
    """The reasons by the first name of each layer.

    Raises:
        RepairError: No module has that name.
    """
    first = {name: found.name for found in named_once(model) for name in found.names}
    for name in wanted:
        if name not in first:
            raise _unknown_name(name, first)
    return {first[name]: reason for name, reason in wanted.items()}


def _reason(layer: Layer, report: Report) -> str:
    """E.g. "flagged: n_eq 2.8, below 32 (batches too small)"."""
    measured = [path for path in (layer.train, layer.eval) if path is not None]
    worst = max(measured, key=lambda path: path.mismatch, default=None)
    causes = [title_of(found.rule, found.cause) for found in report.diagnoses if layer.name in found.layers]
    cause = f" ({causes[0]})" if causes else ""
    if worst is None or worst.equivalent_batch_size is None:
        return f"flagged: n_eq not measurable (values overflow){cause}"
    return f"flagged: n_eq {worst.equivalent_batch_size:.3g}, below {layer.threshold:g}{cause}"


def _require_same_model(report: Report, model: nn.Module) -> None:
    modules = {name: found for found in named_once(model) for name in found.names}
    differences = list(_differences(report, modules))
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise RepairError(
            f"The report is from another model ({report.scan.model}): {'; '.join(differences[:3])}{more}."
            " Scan this model, or give the one that was scanned."
        )


def _differences(report: Report, modules: dict[str, NamedModule]) -> Iterator[str]:
    for layer in report.layers:
        found = modules.get(owner_of(layer.name, modules))
        if found is None:
            yield f"layer {layer.name} ({layer.kind}) is not in this model"
        elif found.kind != layer.kind:
            yield f"{layer.name} is {layer.kind} there and {found.kind} here"
        elif isinstance(found.module, _BatchNorm) and (channels := found.module.num_features) != layer.channels:
            yield f"{layer.name} has {layer.channels} channels there and {channels} here"


def _unknown_name(name: str, known: Iterable[str], what: str = "layer") -> RepairError:
    near = nearest(name, list(known), cutoff=0.0)
    hint = f'; the nearest name is "{near}"' if near else ""
    return RepairError(f'No {what} is called or matches "{name}"{hint}.')


def _holds_norm(module: nn.Module) -> bool:
    """Whether a BN layer is inside, even a scripted one."""
    kinds = (getattr(inner, "original_name", "") for inner in module.modules())
    return bool(batch_norms(module)) or any("BatchNorm" in str(kind) for kind in kinds)


def _unwrapping_advice(module: nn.Module) -> str | None:
    """What to do instead of converting inside this wrapper; None if it is none."""
    if isinstance(module, torch.jit.ScriptModule):
        return "convert the model before torch.jit.script or torch.jit.trace"
    if unwrapped(module)[0] is not module:
        inside = "module" if hasattr(module, "module") and isinstance(module.module, nn.Module) else "_orig_mod"
        return f"convert the module inside (its attribute {inside}) before wrapping it"
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
        return "convert the model before wrapping it"
    return None
