"""Charts in characters: histograms of r and d and curves in one line, and stacked bars of the sources of mismatch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text

from bnprobe.numbers import percent
from bnprobe.records import SOURCES, Histogram, Shares, Source
from bnprobe.report.page import BAR, CENTRE, CROSSED, CUT, LEVELS, THIN, Page

# --- Histograms -------------------------------------------------------------------------------------------------------
#
# They have the same axes for every layer. Each half of an axis has the same number of cells, with a mark of the centre
# between the halves. A cell is as high as its share of the row's largest one; the outermost cells also hold what lies
# beyond the axis.

_SMALLEST_SHARE = 0.001
"""A cell with less than this share of all values stays empty: re-binning smears single values."""


@dataclass(frozen=True)
class ChartAxis:
    """Where a value lies between -1 (left end), 0 (centre) and 1 (right end).

    Attributes:
        place: Increasing map from a value to its place, not limited to [-1, 1].
        ticks: Labels of the left end, the centre and the right end.
    """

    place: Callable[[float], float]
    ticks: tuple[str, str, str]


def _place_r(value: float) -> float:
    return math.log(max(value, 1e-30)) / math.log(4)


def _place_d(value: float) -> float:
    return math.asinh(value / 0.5) / math.asinh(5 / 0.5)


R_CHART = ChartAxis(_place_r, ("1/4", "1", "4"))
"""Logarithmic: r = 1/2 and r = 2 are equally far from 1."""

D_CHART = ChartAxis(_place_d, ("-5", "0", "5"))
"""asinh(2 d): linear near 0, logarithmic far out; the ends are the paper's d_max = 5."""


def histogram(found: Histogram, axis: ChartAxis, half: int) -> str:
    """One line of ``2 * half + 1`` characters."""
    cells = _rebin(found, axis, half)
    total, largest = sum(cells), max(cells)
    bars = "".join(_bar(cell, total, largest) for cell in cells)
    return bars[:half] + CENTRE + bars[half:]


def ruler(axis: ChartAxis, half: int) -> str:
    """The labels of the axis, to stand under histograms of the same ``half``."""
    left, centre, right = axis.ticks
    return left + centre.rjust(half + 1 - len(left)) + right.rjust(half)


def _bar(cell: float, total: float, largest: float) -> str:
    if cell <= _SMALLEST_SHARE * total:
        return LEVELS[0]
    return LEVELS[math.ceil((len(LEVELS) - 1) * cell / largest)]


def _rebin(histogram: Histogram, axis: ChartAxis, half: int) -> list[float]:
    """Counts in ``2 * half`` cells of equal width on the axis, each bin spread evenly over its place."""
    size = 2 * half
    cells = [0.0] * size
    places = [half * (axis.place(edge) + 1) for edge in histogram.edges]
    for low, high, count in zip(places[:-1], places[1:], histogram.counts, strict=True):
        first, last = _cell(low, size), _cell(high, size)
        for index in range(first, last + 1):
            cells[index] += count * _share(low, high, index, first, last)
    return cells


def _cell(place: float, size: int) -> int:
    """The cell of a place; the end cells reach to infinity."""
    return min(max(math.floor(place), 0), size - 1)


def _share(low: float, high: float, index: int, first: int, last: int) -> float:
    """The part of [low, high], which reaches from cell ``first`` to ``last``, that falls into ``index``."""
    if first == last:
        return 1.0
    start = low if index == first else index
    end = high if index == last else index + 1
    return (end - start) / (high - low)


# --- Curves -----------------------------------------------------------------------------------------------------------


def sparkline(values: Sequence[float], low: float, high: float, width: int) -> str:
    """Values over time in at most ``width`` characters, from the lowest bar at ``low`` to the full one at ``high``.

    Each character is the mean of as many values as any other, or one more; what is no number is blank.
    """
    size = min(width, len(values))
    cells = []
    for cell in range(size):
        part = values[cell * len(values) // size : (cell + 1) * len(values) // size]
        known = [min(max(value, low), high) for value in part if not math.isnan(value)]
        share = (sum(known) / len(known) - low) / ((high - low) or 1.0) if known else math.nan
        cells.append(LEVELS[0] if math.isnan(share) else LEVELS[1 + round(share * (len(LEVELS) - 2))])
    return "".join(cells)


# --- Stacked bars -----------------------------------------------------------------------------------------------------
#
# Every segment begins with its source's letter, so that a bar reads without colour. What comes on top of D is thin.


_COLOURS = {
    "small_batch": "blue",
    "composition": "magenta",
    "lag": "yellow",
    "dropout": "cyan",
    "propagation": "green",
    "data_shift": "red",
}

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


def largest(shares: Shares | None) -> tuple[Source, float, float] | None:
    """The source of the largest share, that share, and all that adds up to D; None where all of it is 0."""
    held = [] if shares is None else [(source, share) for source, share in drawn(shares) if source.adds_up]
    total = sum(share for _, share in held)
    return (*max(held, key=lambda pair: pair[1]), total) if total else None


def mostly(shares: Shares | None) -> str:
    """The largest share in words, e.g. "small batch 84%"; empty where there is none."""
    found = largest(shares)
    return "" if found is None else f"{found[0].words} {percent(found[1] / found[2])}"


def length(shares: Shares) -> float:
    """D of all segments together."""
    return sum(share for _, share in drawn(shares))


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


def bar(shares: Shares, scale: Scale, limit: float | None, page: Page) -> Text:
    """One bar of ``scale.width`` cells, with a mark at the limit, in D; None: without."""
    cells = [
        (char, _COLOURS[source.field])
        for source, width in segments(shares, scale)
        for char in source.letter + (BAR if source.adds_up else THIN) * (width - 1)
    ]
    if scale.cuts(length(shares)):
        cells.append((CUT, "bold"))
    cells += [(" ", "")] * (scale.width - len(cells))
    if limit is not None and not scale.cuts(length(shares)):
        _mark(cells, min(scale.cells(limit), scale.width - 1))
    runs = groupby(cells, key=lambda cell: cell[1])
    return Text.assemble(*((page.clean("".join(char for char, _ in run)), style) for style, run in runs))


def _mark(cells: list[tuple[str, str]], place: int) -> None:
    """Put the limit's mark into a bar; a letter is never covered: the mark stands behind it, within its segment.

    What comes on top of D does not cross the limit.
    """
    drawn_on = (BAR, THIN)
    if cells[place][0] not in (" ", *drawn_on) and place + 1 < len(cells) and cells[place + 1][0] in drawn_on:
        place += 1
    char, style = cells[place]
    if char in (" ", THIN):
        cells[place] = (CENTRE, "dim")
    elif char == BAR:
        cells[place] = (CROSSED, style)
