"""Numbers and names as messages and reports show them."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: float) -> str:
    """Two or three digits, e.g. "0.31", "12.4", "1,200"."""
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def percent(part: float) -> str:
    """A part of one, e.g. "0%", "<0.1%", "3.4%", "36%"."""
    if 0 < part < 0.001:
        return "<0.1%"
    return f"{part:.1%}" if 0 < part < 0.1 else f"{part:.0%}"


def count(amount: int, noun: str) -> str:
    """A number of things, e.g. "1 layer", "3 layers", "2 micro-batches"."""
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}{ending}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are, e.g. "bn1, bn2, bn3 and 7 more"."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
