"""Comma-separated values: a row for each layer and mode, and of a sweep for each batch size too.

Figures are written whole, with a point, and a figure that does not exist is an empty cell. Text that a spreadsheet
would take for a formula begins with an apostrophe.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from io import StringIO

from bnprobe.printable import escaped
from bnprobe.records import SOURCES, Comparison, Layer, LayerPoint, PathMeasurement, Report, SweepReport, Verification
from bnprobe.report.page import RenderOptions

Cell = str | int | float | bool | None

_FORMULA = ("=", "+", "-", "@")
"""With one of these a cell begins that a spreadsheet calculates."""


def render_scan(report: Report, options: RenderOptions) -> str:
    """Every layer in training and at inference."""
    return _table(row for layer in report.layers for row in _scanned(layer, report))


def render_sweep(report: SweepReport, options: RenderOptions) -> str:
    """Every layer at every batch size, in both modes."""
    return _table(
        {
            "layer": layer.name,
            "mode": mode,
            "batch_size": point.batch_size,
            "batches": point.batches,
            "mismatch": point.mismatch,
            "mismatch_low": point.interval[0],
            "mismatch_high": point.interval[1],
            "equivalent_batch_size": point.equivalent_batch_size,
            "theory": point.theory,
            "limit": point.limit,
            "standing": point.standing,
        }
        for layer in report.layers
        for mode, points in (("train", layer.train), ("eval", layer.eval))
        for point in points
    )


def render_verify(found: Verification, options: RenderOptions) -> str:
    """Every layer before and after."""
    return _table(
        {
            "layer": layer.name,
            "mismatch_before": layer.before,
            "mismatch_after": layer.after,
            "flagged_before": layer.flagged_before,
            "flagged_after": layer.flagged_after,
            "undecided_after": layer.undecided_after,
            "lost": layer.lost,
        }
        for layer in found.layers
    )


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


def _point(point: LayerPoint | None) -> dict[str, Cell]:
    names = (*_MEASURED[:4], "flagged", "undecided")
    if point is None:
        return dict.fromkeys(names)
    measured = (point.mismatch, *point.interval, point.equivalent_batch_size, point.flagged, point.undecided)
    return dict(zip(names, measured, strict=True))


def _scanned(layer: Layer, report: Report) -> Iterator[dict[str, Cell]]:
    failed = [verdict for verdict in report.verdicts if verdict.layer == layer.name and verdict.outcome == "failed"]
    for mode, path in (("train", layer.train), ("eval", layer.eval)):
        shares = layer.shares if mode == (layer.only_in or "eval") else None
        yield {
            "layer": layer.name,
            "mode": mode,
            "kind": layer.kind,
            "channels": layer.channels,
            "batch_size": report.scan.batch_size,
            "flagged": layer.flagged,
            "undecided": layer.undecided,
            "threshold": layer.threshold,
            **_measured(path),
            **{f"share_{source.field}": None if shares is None else source.of(shares) for source in SOURCES},
            "causes": " ".join(verdict.cause for verdict in failed),
            "location": layer.location,
            "note": layer.note,
        }


def _measured(path: PathMeasurement | None) -> dict[str, Cell]:
    if path is None:
        return dict.fromkeys(_MEASURED)
    values = (
        *(path.mismatch, *path.interval),
        *(path.equivalent_batch_size, *path.equivalent_batch_size_interval),
        *(getattr(factor, field) for factor in (path.r, path.d) for field in _MOMENTS),
    )
    return dict(zip(_MEASURED, values, strict=True))


_MOMENTS = ("mean", "std", "min", "max")
_MEASURED = (
    *("mismatch", "mismatch_low", "mismatch_high"),
    *("equivalent_batch_size", "equivalent_batch_size_low", "equivalent_batch_size_high"),
    *(f"{factor}_{field}" for factor in ("r", "d") for field in _MOMENTS),
)


def _table(rows: Iterable[dict[str, Cell]]) -> str:
    out, writer = StringIO(), None
    for row in rows:
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
