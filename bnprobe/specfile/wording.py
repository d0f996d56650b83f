"""How messages show values."""

from __future__ import annotations

from collections.abc import Mapping


def shown(value: object) -> str:
    """A value in words that fit YAML."""
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, Mapping):
        return "a mapping (key: value)"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)[:60] if not isinstance(value, list | tuple) else f"the list {list(value)!r}"[:60]
