"""Numbers and names as sentences show them: few digits, and words where a digit would mislead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

IN_MODE = {"train": "in training", "eval": "at inference"}
"""The two modes as adverbials."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def number(value: float) -> str:
    """Two or three digits, e.g. "0.31", "12.4", "1,200"."""
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def mismatch(value: float) -> str:
    """D, as tables write it too, e.g. "0.871", "12.4", "2e+06", "<0.001"."""
    if value == 0:
        return "0"
    if value < 0.001:
        return "<0.001"
    if value >= 1000:
        return f"{value:.0e}"
    return f"{value:.3f}" if value < 1 else f"{value:#.3g}".rstrip(".")


def score(value: float) -> str:
    """A loss or metric, as tables write it too, e.g. "1.92", "0.0077"."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


def percent(fraction: float) -> str:
    """A fraction, e.g. "0%", "<0.1%", "3.4%", "36%"."""
    if 0 < fraction < 0.001:
        return "<0.1%"
    if 0.1 > fraction > 0:
        return f"{fraction:.1%}"
    return f"{fraction:.0%}"


def count(amount: int, noun: str) -> str:
    """A number of things, e.g. "1 layer", "3 layers", "2 micro-batches"."""
    return f"{amount:,} {noun if amount == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Several of a thing, e.g. "layers", "micro-batches"."""
    if noun.endswith("y") and noun[-2:-1] not in "aeou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names in a sentence, e.g. "bn1, bn2", and how many more there are beyond the first ``most``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def joined(names: Sequence[str]) -> str:
    """All of one or more names in a sentence, e.g. "bn1, bn2 and bn3"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def grouped(pairs: Iterable[tuple[_Key, _Value]]) -> dict[_Key, list[_Value]]:
    """The second of each pair by the first, both in the order of the pairs: what is said of several, once."""
    groups: dict[_Key, list[_Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def finite_or_none(value: Any) -> Any:
    """Plain values as JSON has them: what is not finite is None."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
