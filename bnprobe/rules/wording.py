"""Numbers and names as the messages of rules show them: those of ``bnprobe.numbers``, with fewer names."""

from collections.abc import Sequence

from bnprobe import numbers
from bnprobe.numbers import count, number, percent

__all__ = ["count", "listed", "number", "percent"]


def listed(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    return numbers.listed(names, 3)
