"""Where a layer stands: its sign, how bad it is, which layers are worst."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from bnprobe.records import Layer, PathMeasurement
from bnprobe.reports import glyphs

STYLES = {
    glyphs.FLAGGED: "bold red",
    glyphs.UNDECIDED: "yellow",
    glyphs.FINE: "green",
    glyphs.UNMEASURED: "dim",
}

MEANINGS = {
    glyphs.FLAGGED: "flagged",
    glyphs.UNDECIDED: "undecided",
    glyphs.FINE: "fine",
    glyphs.UNMEASURED: "not measured on both paths",
}


def sign(layer: Layer) -> str:
    """The sign of a layer; one that was measured on one path only is not called fine."""
    if layer.flagged:
        return glyphs.FLAGGED
    if layer.undecided:
        return glyphs.UNDECIDED
    return glyphs.UNMEASURED if layer.train is None or layer.eval is None else glyphs.FINE


def with_sign(layers: Iterable[Layer], wanted: str) -> list[Layer]:
    """The layers that carry a sign."""
    return [layer for layer in layers if sign(layer) == wanted]


def worse_path(train: PathMeasurement | None, eval: PathMeasurement | None) -> PathMeasurement | None:
    """The path with the larger mismatch, of those that could be measured."""
    measured = [path for path in (train, eval) if path is not None]
    return max(measured, key=lambda path: path.mismatch, default=None)


def worst_first(layers: Iterable[Layer]) -> list[Layer]:
    """Flagged layers, then undecided, then the others; within each the largest mismatch first."""
    return sorted(layers, key=_badness, reverse=True)


def select(layers: Sequence[Layer], limit: int) -> list[Layer]:
    """The worst ``limit`` layers, in network order."""
    kept = {layer.name for layer in worst_first(layers)[:limit]}
    return [layer for layer in layers if layer.name in kept]


def _badness(layer: Layer) -> tuple[bool, bool, float]:
    path = worse_path(layer.train, layer.eval)
    mismatch = -math.inf if path is None else path.mismatch
    # A flagged layer without a figure overflowed: no figure of another layer is worse.
    overflowed = layer.flagged and layer.running_statistics and None in (layer.train, layer.eval)
    return layer.flagged, layer.undecided, math.inf if overflowed else mismatch
