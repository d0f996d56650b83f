"""The public call: convert layers of a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn

from bnprobe.errors import RepairError, UsageError
from bnprobe.records import Plan, Report
from bnprobe.repairs.layers import batch_norms, refuse_wrapped
from bnprobe.repairs.planning import apply, plan
from bnprobe.repairs.wanted import wanted_by_globs, wanted_from_report
from bnprobe.spec import RepairSpec
from bnprobe.specfile.merge import sentence
from bnprobe.specfile.sources import Source

_OPTIONS = ("groups", "blend", "renorm")
"""Fields of the spec's repair section that concern the layers."""


def convert(
    model: nn.Module,
    layers: Iterable[str] | Report | None = None,
    *,
    to: str = "batch-renorm",
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """Convert BN layers of a model; see ``bnprobe.repairs`` for what stays as it is.

    Args:
        model: Any module; not wrapped in DataParallel, DDP or torch.compile.
        layers: Names or globs of layers; or a report of this model, for those that it flags; None: every BN layer.
        to: "batch-renorm", "frozen", "group-norm", "sync", "instance-renorm" or "gated".
        inplace: Change ``model`` itself; an optimizer that holds its parameters goes on working.
        **options: Fields of ``bnprobe.spec.RepairSpec`` that concern the layers: groups, blend, renorm.

    Returns:
        The converted model, a copy unless ``inplace``. If the model itself is the layer, its replacement either way.

    Raises:
        RepairError: A layer cannot be converted (none is, then), or the report is from another model.
        UsageError: An option is unknown or has a wrong value.
    """
    spec = _spec({"to": to, **options})
    refuse_wrapped(model)
    made = plan(model, _wanted(model, layers), spec.to, "bnprobe.convert")
    _require_all(made)
    return apply(model, made, spec, inplace=inplace)


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


def _require_all(made: Plan) -> None:
    if made.refused:
        reasons = "\n".join(f"{layer.name} ({layer.kind}) {layer.reason}." for layer in made.refused)
        advice = (
            f"\nName the others ({len(made.changes)}) in layers=[...] to convert them alone." if made.changes else ""
        )
        raise RepairError(f"Cannot be converted to {made.to}:\n{reasons}{advice}")


def _spec(options: Mapping[str, Any]) -> RepairSpec:
    """Validated; of the spec's fields those that concern the layers."""
    unknown = sorted(options.keys() - {"to", *_OPTIONS})
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], _OPTIONS, 1, cutoff=0.0)[0]
        raise UsageError(
            f'convert has no option "{unknown[0]}" (known: {", ".join(_OPTIONS)}); the nearest is "{nearest}".'
        )
    if options["to"] == "auto":
        raise UsageError('to="auto" needs training to choose by: name a repair, or run bnprobe convert --finetune.')
    source = Source(dict(options), arguments=True)
    try:
        return RepairSpec.model_validate(source.values)
    except ValidationError as error:
        raise UsageError("\n".join(sentence(item, source, RepairSpec) for item in error.errors())) from None
