"""The signs of severities, and the sources of mismatch that a stacked bar shows."""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.records import Interval, Severity, ShareIntervals, Shares
from bnprobe.reports import glyphs

SIGNS: dict[Severity, str] = {"error": glyphs.FLAGGED, "warning": glyphs.WARNING, "info": glyphs.INFO}

SEVERITY_STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True)
class Source:
    """A source of mismatch: its letter and colour in a bar, and the field of `records.Shares` that holds it."""

    letter: str
    field: str
    words: str
    style: str

    def of(self, shares: Shares) -> float | None:
        """This source's share, in units of D."""
        value: float | None = getattr(shares, self.field)
        return value

    def interval(self, intervals: ShareIntervals | None) -> Interval | None:
        """The interval of this source's share."""
        found: Interval | None = None if intervals is None else getattr(intervals, self.field)
        return found


SOURCES = (
    Source("s", "small_batch", "small batch", "blue"),
    Source("c", "composition", "composition", "magenta"),
    Source("l", "lag", "lag", "yellow"),
    Source("d", "dropout", "dropout", "cyan"),
    Source("p", "propagation", "propagation", "green"),
    Source("x", "data_shift", "data shift", "red"),
)
"""In the order in which a bar shows them."""
