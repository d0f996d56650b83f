"""Stacked bars of shares: every segment begins with its source's letter, so that it reads without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text

from bnprobe.records import Shares
from bnprobe.reports import glyphs
from bnprobe.reports.causes import SOURCES, Source
from bnprobe.reports.layout import Page

_FAR_BEYOND = 5.0
"""A bar so many times longer than the next one is cut; at most a quarter of the bars, and at least one."""

_ROOM_BEYOND_LIMIT = 1.5
"""The scale reaches at least so far beyond the limit: what is fine looks fine."""


@dataclass(frozen=True)
class Scale:
    """What a full bar means.

    Attributes:
        full: D of a bar that fills its cells.
        width: Cells of a bar.
    """

    full: float
    width: int

    def cells(self, mismatch: float) -> int:
        """Cells from the start of a bar to a place on it."""
        return round(self.width * mismatch / self.full)

    def cuts(self, length: float) -> bool:
        """Whether a bar of this length does not fit."""
        return length > self.full * (1 + 1e-9)


def drawn(shares: Shares) -> list[tuple[Source, float]]:
    """The sources that are drawn, with their shares: a share that is not there, or below 0, is 0."""
    return [(source, max(source.of(shares) or 0.0, 0.0)) for source in SOURCES]


def length(shares: Shares) -> float:
    """D of all segments together."""
    return sum(share for _, share in drawn(shares))


def limit(threshold: float) -> float:
    """D of i.i.d. Gaussian batches of ``threshold`` values, 2 (1 - e_n) (DESIGN section 1)."""
    n = max(threshold, 1.0 + 1e-9)
    return 2 - 2 * math.sqrt(2 / n) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))


def full_length(lengths: Sequence[float], limits: Sequence[float]) -> float:
    """What a full bar should mean: the longest bar, or the next where that one would squash the others."""
    floor = _ROOM_BEYOND_LIMIT * max(limits, default=0.0)
    ordered = sorted((max(value, floor) for value in lengths), reverse=True)
    for index in range(min(max(1, len(ordered) // 4), len(ordered) - 1), 0, -1):
        if ordered[index - 1] > _FAR_BEYOND * ordered[index]:
            return ordered[index]
    return max([*ordered[:1], floor]) or 1.0


def segments(shares: Shares, scale: Scale) -> list[tuple[Source, int]]:
    """The sources that fill a cell or more, in order; a bar that does not fit is drawn in proportion.

    As many cells as the whole bar has are dealt out by largest remainder: the largest share is never the one that
    gets none.
    """
    total = length(shares)
    cut = scale.cuts(total)
    cells = scale.width - 1 if cut else scale.cells(total)
    exact = [share * cells / total if total else 0.0 for _, share in drawn(shares)]
    widths = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda index: widths[index] - exact[index])
    for index in order[: cells - sum(widths)]:
        widths[index] += 1
    return [(source, width) for source, width in zip(SOURCES, widths, strict=True) if width]


def bar(shares: Shares, scale: Scale, threshold: float | None, page: Page) -> Text:
    """One bar of ``scale.width`` cells, with a mark at the limit; ``threshold`` None: without."""
    cells = [(char, source.style) for source, width in segments(shares, scale) for char in _segment(source, width)]
    if scale.cuts(length(shares)):
        cells.append((glyphs.CUT, "bold"))
    cells += [(" ", "")] * (scale.width - len(cells))
    if threshold is not None and not scale.cuts(length(shares)):
        _mark(cells, min(scale.cells(limit(threshold)), scale.width - 1))
    runs = groupby(cells, key=lambda cell: cell[1])
    return Text.assemble(*((page.clean("".join(char for char, _ in run)), style) for style, run in runs))


def _segment(source: Source, width: int) -> str:
    return source.letter + glyphs.BAR * (width - 1)


def _mark(cells: list[tuple[str, str]], place: int) -> None:
    """Put the limit's mark into a bar; a letter is never covered."""
    char, style = cells[place]
    if char == " ":
        cells[place] = (glyphs.CENTRE, "dim")
    elif char == glyphs.BAR:
        cells[place] = (glyphs.CROSSED, style)
