"""Figures and names as the messages of rules show them."""

from __future__ import annotations

from collections.abc import Sequence

_NAMED = 3
"""So many names are spelt out; more would bury the sentence."""


def number(value: float) -> str:
    """Two or three digits, e.g. "0.31", "12.4", "1,200"."""
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def percent(part: float) -> str:
    """A part of one, e.g. "74%", "0.3%", "<0.1%"."""
    if 0 < part < 0.001:
        return "<0.1%"
    return f"{part:.0%}" if part >= 0.1 or part == 0 else f"{100 * part:.2g}%"


def count(amount: int, noun: str) -> str:
    """A number of things, e.g. "1 layer", "3 layers"."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def listed(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
