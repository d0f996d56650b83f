"""The causes in words, and the sources of mismatch that a stacked bar shows."""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.records import Cause, Interval, Severity, ShareIntervals, Shares
from bnprobe.reports import glyphs

WORDS: dict[Cause, str] = {
    "small_batch": "batches too small",
    "composition": "batches not drawn at random",
    "lag": "lagging running statistics",
    "dropout": "dropout shifts the statistics",
    "propagation": "mismatch passed on by earlier layers",
    "data_shift": "held-out data are different",
    "shared_domains": "one layer serves several domains",
    "double_update": "statistics updated more than once per step",
    "rank_divergence": "processes disagree",
    "backward_noise": "noisy statistics of the backward pass",
    "momentum_convention": "momentum looks like 1 - momentum",
    "never_trained": "statistics never trained",
    "non_finite": "statistics that are not finite",
    "no_running_stats": "no running statistics",
    "frozen_mismatch": "statistics and weights not frozen alike",
    "single_value": "one value per channel",
    "single_image": "one image per batch",
    "last_batch": "a last batch of one image",
    "dead_channels": "dead channels",
    "dropout_before_norm": "dropout feeds BatchNorm",
}
"""A heading for each cause, to stand before its rule's code."""

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
