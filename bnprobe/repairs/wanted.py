"""Which layers to convert, and why: by name, or by a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from bnprobe.errors import RepairError
from bnprobe.records import Layer, PathMeasurement, Report
from bnprobe.repairs.layers import NamedModule, batch_norms, named_once, unknown_name
from bnprobe.spec import matches_any


def wanted_by_globs(model: nn.Module, globs: Iterable[str]) -> dict[str, str]:
    """The BN layers that a glob matches under any of their names, with the first such glob as the reason.

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
            raise unknown_name(glob, [name for layer in layers for name in layer.names], "BN layer")
        for layer in matched:
            wanted.setdefault(layer.name, f"matches {glob}" if glob not in layer.names else "named")
    return wanted


def wanted_from_report(report: Report, model: nn.Module) -> dict[str, str]:
    """The layers that a report flags, with the figure and the cause as the reason.

    The model may have layers that the report leaves out: a scan can be told to.

    Raises:
        RepairError: The report is from another model; names the first layers that differ.
    """
    _require_same_model(report, model)
    return {layer.name: _reason(layer, report) for layer in report.layers if layer.flagged}


def _reason(layer: Layer, report: Report) -> str:
    """E.g. "flagged: n_eq 2.8, below 32 (small batch)"."""
    measured = [path for path in (layer.train, layer.eval) if path is not None]
    worst = max(measured, key=lambda path: path.mismatch, default=None)
    causes = [diagnosis.cause for diagnosis in report.diagnoses if layer.name in diagnosis.layers]
    cause = f" ({causes[0].replace('_', ' ')})" if causes else ""
    return f"flagged: {_figure(worst)}, below {layer.threshold:g}{cause}"


def _figure(path: PathMeasurement | None) -> str:
    if path is None or path.equivalent_batch_size is None:
        return "n_eq beyond measure"
    return f"n_eq {path.equivalent_batch_size:.3g}"


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
        found = modules.get(layer.name)
        if found is None:
            yield f"it has {layer.name} ({layer.kind}), and this model has not"
        elif found.kind != layer.kind:
            yield f"{layer.name} is {layer.kind} there and {found.kind} here"
        elif (channels := getattr(found.module, "num_features", None)) != layer.channels:
            yield f"{layer.name} has {layer.channels} channels there and {channels} here"
