"""Means and their intervals, with no more digits than the interval allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len

from bnprobe.records import Estimate
from bnprobe.reports import figures
from bnprobe.reports.glyphs import UNMEASURED
from bnprobe.reports.layout import Page, pad

_PLUS_MINUS = "±"
_MOST_DECIMALS = 5
_LARGE = 1e5


def estimate(value: Estimate, signed: bool = False) -> str:
    """A mean and half its 95% interval, e.g. "0.971 ± 0.004"; without an interval the mean alone."""
    return " ".join(part for part in _parts(value, signed) if part)


def column(values: Sequence[Estimate | None], page: Page) -> list[str]:
    """Estimates one below the other: decimal points in line, then the intervals; None: not measured."""
    parts = [(UNMEASURED, "") if value is None else _parts(value, signed=False) for value in values]
    means = figures.points_in_line([page.clean(mean) for mean, _ in parts])
    halves = [page.clean(half) for _, half in parts]
    width, after = max(map(cell_len, means)), max(map(cell_len, halves))
    return [
        f"{pad(mean, width, right=True)} {pad(half, after)}" if after else pad(mean, width, right=True)
        for mean, half in zip(means, halves, strict=True)
    ]


def _parts(value: Estimate, signed: bool) -> tuple[str, str]:
    """The mean, and half the interval after its sign."""
    half = _half(value)
    if half is None:
        return _score(value.mean, signed), ""
    decimals = _decimals(half)
    if decimals is None or abs(value.mean) >= _LARGE:
        return _score(value.mean, signed), f"{_PLUS_MINUS} {figures.score(half)}"
    mean = f"{value.mean:{'+' if signed else ''}.{decimals}f}"
    return _without_sign_of_zero(mean), f"{_PLUS_MINUS} {half:.{decimals}f}"


def _half(value: Estimate) -> float | None:
    low, high = value.interval or (0.0, None)
    return None if high is None else (high - low) / 2


def _decimals(half: float) -> int | None:
    """Decimals that an uncertainty leaves: two of its digits up to 35, one above; None where that is no help."""
    if half <= 0:
        return None
    exponent = math.floor(math.log10(half))
    leading = half / 10**exponent
    decimals = -exponent + (1 if leading < 3.55 else 0)
    return max(decimals, 0) if decimals <= _MOST_DECIMALS else None


def _score(value: float, signed: bool) -> str:
    return figures.signed(value) if signed else figures.score(value)


def _without_sign_of_zero(text: str) -> str:
    return text.lstrip("+-") if float(text) == 0 else text
