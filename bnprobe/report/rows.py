"""The figures of documents as rows: one for each layer and path, and of a sweep for each batch size too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from bnprobe.records import SOURCES, Impact, Layer, PathMeasurement, Report, SweepReport, Verification
from bnprobe.registry import require
from bnprobe.rules.shares import flagging_limit, flagging_size
from bnprobe.wording import nearest

Cell = str | int | float | bool | None
Row = dict[str, Cell]


def rows(document: Report | SweepReport | Verification) -> list[Row]:
    """All rows, with the same columns; a figure that does not exist is None."""
    if isinstance(document, Report):
        return [row for layer in document.layers for row in _scanned(layer, document)]
    return list(_swept(document) if isinstance(document, SweepReport) else _compared(document))


def _scanned(layer: Layer, report: Report) -> Iterator[Row]:
    failed = [verdict for verdict in report.verdicts if verdict.layer == layer.name and verdict.outcome == "failed"]
    for mode, path in (("train", layer.train), ("eval", layer.eval)):
        shares, impact = (layer.shares, layer.impact) if mode == (layer.only_in or "eval") else (None, None)
        yield {
            "layer": layer.name,
            "mode": mode,
            "kind": layer.kind,
            "channels": layer.channels,
            "batch_size": report.scan.batch_size,
            "flagged": layer.flagged,
            "undecided": layer.undecided,
            "limit": flagging_limit(layer),
            "limit_equivalent_batch_size": flagging_size(layer),
            **_measured(path),
            **{f"share_{source.field}": None if shares is None else source.of(shares) for source in SOURCES},
            **{f"impact_{field.name}": getattr(impact, field.name, None) for field in fields(Impact)},
            "causes": " ".join(verdict.cause for verdict in failed),
            "location": layer.location,
            "note": layer.note,
        }


def _measured(path: PathMeasurement | None) -> Row:
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


def _swept(report: SweepReport) -> Iterator[Row]:
    for layer in report.layers:
        for mode, points in (("train", layer.train), ("eval", layer.eval)):
            for point in points:
                yield {
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


def _compared(found: Verification) -> Iterator[Row]:
    for layer in found.layers:
        yield {
            "layer": layer.name,
            "mismatch_before": layer.before,
            "mismatch_after": layer.after,
            "flagged_before": layer.flagged_before,
            "flagged_after": layer.flagged_after,
            "undecided_after": layer.undecided_after,
            "lost": layer.lost,
        }


def frame(document: Report | SweepReport | Verification) -> Any:
    """The rows as a ``pandas.DataFrame``.

    Raises:
        UsageError: pandas is not installed.
    """
    require("pandas", "pandas", "to_frame()")
    import pandas as pd

    return pd.DataFrame(rows(document))


def layer_named(document: Any, name: str) -> Any:
    """The layer of a document with this name, or of a scan with this alias.

    Raises:
        KeyError: There is none; names the nearest.
    """
    named = {layer.name: layer for layer in document.layers}
    named = {alias: layer for layer in document.layers for alias in getattr(layer, "aliases", ())} | named
    if name not in named:
        near = nearest(str(name), named, cutoff=0.0)
        raise KeyError(f"there is no layer {name!r}" + (f"; the nearest is {near!r}" if near else ""))
    return named[name]
