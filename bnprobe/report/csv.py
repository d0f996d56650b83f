"""Comma-separated values: a row for each layer and mode, and of a sweep for each batch size too.

Figures are written whole, with a point, and a figure that does not exist is an empty cell. Text that a spreadsheet
would take for a formula begins with an apostrophe.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from io import StringIO

from bnprobe.printable import escaped
from bnprobe.records import Comparison, LayerPoint, Report, SweepReport, TableReport, Verification
from bnprobe.report import batch_effects
from bnprobe.report.page import RenderOptions
from bnprobe.report.rows import Cell, rows

_FORMULA = ("=", "+", "-", "@")
"""With one of these a cell begins that a spreadsheet calculates."""


def render_layers(document: Report | SweepReport | Verification, options: RenderOptions) -> str:
    """Every layer in training and at inference: of a scan, at every batch size of a sweep, or before and after."""
    return _table(rows(document))


def render_compare(found: Comparison, options: RenderOptions) -> str:
    """Every layer in every scan."""
    return _table(
        {
            "scan": scan.name,
            "layer": layer.name,
            **_point(point),
        }
        for layer in found.layers
        for scan, point in zip(found.scans, layer.points, strict=True)
    )


def render_table(found: TableReport, options: RenderOptions) -> str:
    """Every batch in every feature."""
    return _table(batch_effects.cells(found))


def _point(point: LayerPoint | None) -> dict[str, Cell]:
    names = ("mismatch", "mismatch_low", "mismatch_high", "equivalent_batch_size", "flagged", "undecided")
    if point is None:
        return dict.fromkeys(names)
    measured = (point.mismatch, *point.interval, point.equivalent_batch_size, point.flagged, point.undecided)
    return dict(zip(names, measured, strict=True))


def _table(found: Iterable[dict[str, Cell]]) -> str:
    out, writer = StringIO(), None
    for row in found:
        if writer is None:
            writer = csv.DictWriter(out, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return out.getvalue() or "layer\n"


def _cell(value: Cell) -> str | int | float:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    text = escaped(" ".join(value.split()))  # first: spreadsheets skip a tab before a formula
    return f"'{text}" if text.startswith(_FORMULA) else text
