"""The scans before and after the repairs of ``support.repairs``, and the files that were written."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import fabricated_reports as fabricated

from bnprobe.records import RepairRecord, Report
from bnprobe.report.repair import Files
from support.repairs import LAST

FILES = Files("repaired.record.json", "repaired.before.json", "repaired.after.json")


def with_layers_of(report: Report, other: Report, *names: str) -> Report:
    """A report in which some layers are as in another one."""
    layers = {layer.name: layer for layer in other.layers}
    changed = tuple(layers[layer.name] if layer.name in names else layer for layer in report.layers)
    flagged = sum(layer.flagged for layer in changed)
    return replace(report, layers=changed, summary=replace(report.summary, flagged=flagged))


@cache
def scans(name: str) -> tuple[Report | None, Report | None]:
    """What the model was before and is after the repair of this name."""
    before, after = fabricated.flagged(), fabricated.healthy()
    return {
        "diverged": (before, with_layers_of(after, before, LAST)),
        "recalibrated": (before, with_layers_of(before, after, "layer2.0.downsample.1")),
        "group_norm": (before, None),
        "failed": (before, None),
        "large": (fabricated.many(), fabricated.many(0)),
        "unscored": (None, None),
    }.get(name, (before, after))


def files(record: RepairRecord, after: Report | None) -> Files:
    """What stands beside the weights."""
    return Files() if record.weights is None else FILES if after else replace(FILES, after=None)
