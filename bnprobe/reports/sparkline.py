"""Histograms of r and d in one line of characters, on axes that are the same for every layer.

Each half of the axis has the same number of cells, with a mark of the centre between the halves. A cell is as
high as its share of the row's largest one; the outermost cells also hold what lies beyond the axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from bnprobe.records import Histogram
from bnprobe.reports.glyphs import CENTRE, LEVELS

_SMALLEST_SHARE = 0.001
"""A cell with less than this share of all values stays empty: re-binning smears single values."""


@dataclass(frozen=True)
class Axis:
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


R_AXIS = Axis(_place_r, ("1/4", "1", "4"))
"""Logarithmic: r = 1/2 and r = 2 are equally far from 1."""

D_AXIS = Axis(_place_d, ("-5", "0", "5"))
"""asinh(2 d): linear near 0, logarithmic far out; the ends are the paper's d_max = 5."""


def draw(histogram: Histogram, axis: Axis, half: int) -> str:
    """One line of ``2 * half + 1`` characters."""
    cells = _rebin(histogram, axis, half)
    total, largest = sum(cells), max(cells)
    bars = "".join(_bar(cell, total, largest) for cell in cells)
    return bars[:half] + CENTRE + bars[half:]


def ruler(axis: Axis, half: int) -> str:
    """The labels of the axis, to stand under histograms of the same ``half``."""
    left, centre, right = axis.ticks
    return left + centre.rjust(half + 1 - len(left)) + right.rjust(half)


def _bar(cell: float, total: float, largest: float) -> str:
    if cell <= _SMALLEST_SHARE * total:
        return LEVELS[0]
    return LEVELS[math.ceil((len(LEVELS) - 1) * cell / largest)]


def _rebin(histogram: Histogram, axis: Axis, half: int) -> list[float]:
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
