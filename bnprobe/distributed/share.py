"""Which micro-batches each process measures."""

from __future__ import annotations

from dataclasses import dataclass

OPENING = 2
"""Micro-batches that every process reads, so that all run the same self-check and see the same errors."""


@dataclass(frozen=True)
class Share:
    """The micro-batches of this process: runs of consecutive ones go to the processes in turn, without padding.

    A position counts all micro-batches; a number counts only those of this process. Both start at 0.

    Attributes:
        rank, size: Rank of this process and number of processes.
        run: Micro-batches that stay together.
    """

    rank: int = 0
    size: int = 1
    run: int = 1

    def owns(self, position: int) -> bool:
        """Whether this process measures the micro-batch at a position."""
        return position // self.run % self.size == self.rank

    def reads(self, position: int) -> bool:
        """Whether this process reads the micro-batch at a position: its own, and the first few of all."""
        return position < OPENING or self.owns(position)

    def position(self, number: int) -> int:
        """Position of this process's micro-batch of a given number."""
        turn, within = divmod(number, self.run)
        return (turn * self.size + self.rank) * self.run + within

    def count(self, total: int) -> int:
        """How many of the first ``total`` micro-batches belong to this process."""
        turns, rest = divmod(total, self.run * self.size)
        return turns * self.run + min(max(rest - self.rank * self.run, 0), self.run)


EVERYTHING = Share()
