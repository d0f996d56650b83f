"""Layers before and after: the table that repairs and ``bnprobe verify`` share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from bnprobe.records import Layer, LayerComparison, Report
from bnprobe.reports import figures, glyphs
from bnprobe.reports.layout import Page
from bnprobe.reports.nametable import Column, Mark, arrows, table
from bnprobe.reports.standing import STYLES, worse_path

MOST_LAYERS = 12
"""So many layers are shown, those that were or are worst, unless all are asked for."""


@dataclass(frozen=True)
class _Row:
    """A layer, and its n_eq where the reports are at hand."""

    layer: LayerComparison
    equivalent: tuple[str, str] = ("", "")

    @property
    def badness(self) -> tuple[bool, bool, float]:
        """Flagged after, flagged before, the larger mismatch."""
        layer = self.layer
        values = [value for value in (layer.before, layer.after) if value is not None]
        return layer.flagged_after, layer.flagged_before, max(values, default=-math.inf)


def from_reports(before: Report, after: Report, page: Page, show_all: bool) -> list[Text]:
    """The layers of two reports, by name, with n_eq and D of their worse paths; nothing if they share none."""
    later = {layer.name: layer for layer in after.layers}
    rows = [_row(layer, later[layer.name]) for layer in before.layers if layer.name in later]
    if not rows:
        return []
    return [*page.heading("Mismatch before and after, worse path"), *_table(rows, page, show_all)]


def comparison(layers: Sequence[LayerComparison], page: Page, show_all: bool) -> list[Text]:
    """The layers of a verification, with D and what has become of their flags; nothing if there are none."""
    return _table([_Row(layer) for layer in layers], page, show_all) if layers else []


def _row(before: Layer, after: Layer) -> _Row:
    paths = [worse_path(layer.train, layer.eval) for layer in (before, after)]
    mismatches = [None if path is None else path.mismatch for path in paths]
    first, last = (figures.path_equivalent(path) for path in paths)
    layer = LayerComparison(before.name, mismatches[0], mismatches[1], before.flagged, after.flagged)
    return _Row(layer, (first, last))


def _table(rows: Sequence[_Row], page: Page, show_all: bool) -> list[Text]:
    worst = sorted(rows, key=lambda row: row.badness, reverse=True)[:MOST_LAYERS]
    kept = {row.layer.name for row in worst}
    shown = rows if show_all else [row for row in rows if row.layer.name in kept]
    columns = [
        Column("n_eq", _aligned([row.equivalent for row in shown], page)),
        Column("D", _aligned([(_mismatch(row.layer.before), _mismatch(row.layer.after)) for row in shown], page)),
        Column("", [_flags(row.layer) for row in shown], left=True),
    ]
    columns = [column for column in columns if any(cell.strip(f" {page.clean(glyphs.ARROW)}") for cell in column.cells)]
    names, marks = [row.layer.name for row in shown], [_mark(row.layer) for row in shown]
    lines = table("layer", names, marks, columns, page, expendable=("", "D") if len(columns) > 2 else ("",))
    return [*lines, *_hidden(rows, shown, page)]


def _aligned(pairs: Sequence[tuple[str, str]], page: Page) -> list[str]:
    before, after = (figures.points_in_line([page.clean(cell) for cell in side]) for side in zip(*pairs, strict=True))
    return arrows(list(zip(before, after, strict=True)), page.clean(glyphs.ARROW))


def _mismatch(value: float | None) -> str:
    return glyphs.UNMEASURED if value is None else figures.mismatch(value)


def _mark(layer: LayerComparison) -> Mark:
    sign = glyphs.FLAGGED if layer.flagged_after else glyphs.UNMEASURED if layer.after is None else glyphs.FINE
    return Mark(sign, STYLES[sign])


def _flags(layer: LayerComparison) -> str:
    if layer.after is None and not layer.flagged_after:
        return "not measured"
    return {
        (True, True): "still flagged",
        (True, False): "no longer flagged",
        (False, True): "newly flagged",
        (False, False): "",
    }[layer.flagged_before, layer.flagged_after]


def _hidden(rows: Sequence[_Row], shown: Sequence[_Row], page: Page) -> list[Text]:
    """What the table leaves out, by what has become of the flags."""
    if len(shown) == len(rows):
        return []
    left_out = [row.layer for row in rows if row not in shown]
    numbers: dict[str, int] = {}
    for layer in left_out:
        words = _flags(layer) or "not flagged"
        numbers[words] = numbers.get(words, 0) + 1
    parts = ", ".join(f"{number} {words}" for words, number in numbers.items())
    text = f"{figures.count(len(left_out), 'more layer')} ({parts}); --all shows every one."
    return page.paragraph(text, "dim", first="   ")
