"""Communication between processes that work together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from torch import distributed

from bnprobe.distributed.board import Board
from bnprobe.errors import ProcessError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that work together.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of processes.
        board: Their message board; None for one process, or if the caller connected the processes.
    """

    rank: int = 0
    size: int = 1
    board: Board | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes reports and files (rank 0)."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; every process must call this.

        Raises:
            ProcessError: A process is gone; all of these methods can raise this.
        """
        if self.size == 1:
            return [value]
        values = [value] * self.size  # every entry is replaced
        with _peers():
            distributed.all_gather_object(values, value)
        return values

    def share(self, value: T) -> T:
        """The value of process 0, in every process; every process must call this."""
        if self.size == 1:
            return value
        values = [value]
        with _peers():
            distributed.broadcast_object_list(values, 0)
        return values[0]

    def to_main(self, value: T) -> Iterator[T]:
        """In process 0, the values of all processes by rank, one at a time; at most two are in memory.

        Other processes send their value and yield nothing. Every process must call this, and process 0 must read to the
        end.
        """
        if self.is_main:
            return self._receive(value)
        with _peers():
            distributed.send_object_list([value], 0)
        return iter(())

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            with _peers():
                distributed.barrier()

    def halt(self) -> None:
        """Ask all processes to stop measuring; see ``Board``."""
        if self.board is not None:
            self.board.halt()

    @property
    def halted(self) -> bool:
        """Whether one of the processes asked all to stop measuring."""
        return self.board is not None and self.board.halted

    def _receive(self, value: T) -> Iterator[T]:
        yield value
        for rank in range(1, self.size):
            received = [value]
            with _peers():
                distributed.recv_object_list(received, rank)
            yield received[0]


ALONE = World()


@contextmanager
def _peers() -> Iterator[None]:
    """Turn torch's error about a lost process into a ProcessError."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"Another process of the launch has ended or cannot be reached: {first_sentence(error)} See the error"
            " message of that process or of the launcher."
        ) from error


def first_sentence(error: Exception) -> str:
    """The first sentence of an error, without gloo's source location in front and its advice at the end."""
    line = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().partition("\n")[0])
    return f"{line.partition('. ')[0].rstrip('.') or type(error).__name__}."
