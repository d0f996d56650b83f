"""Which micro-batches a process measures."""

from __future__ import annotations

from dataclasses import dataclass

OPENING = 2
"""Micro-batches that every process reads whose ever they are: all make the same self-check, and see the same errors."""


@dataclass(frozen=True)
class Share:
    """Which micro-batches are this process's: runs of consecutive ones are dealt out in turn, without padding.

    Positions count all micro-batches, numbers this process's own, both from 0.

    Attributes:
        rank, size: As in ``World``.
        run: Micro-batches that stay together.
    """

    rank: int = 0
    size: int = 1
    run: int = 1

    def owns(self, position: int) -> bool:
        """Whether this process measures the micro-batch at a position."""
        return position // self.run % self.size == self.rank

    def reads(self, position: int) -> bool:
        """Whether this process reads it: its own, and the first few."""
        return position < OPENING or self.owns(position)

    def position(self, number: int) -> int:
        """Position of one of this process's own micro-batches."""
        turn, within = divmod(number, self.run)
        return (turn * self.size + self.rank) * self.run + within

    def count(self, total: int) -> int:
        """How many of the first ``total`` micro-batches are this process's."""
        turns, rest = divmod(total, self.run * self.size)
        return turns * self.run + min(max(rest - self.rank * self.run, 0), self.run)


EVERYTHING = Share()
