"""What processes that work together can tell each other."""

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
        rank: Number of this process, from 0.
        size: How many there are.
        board: Where they put notices up; None for one process, or where the caller connected them.
    """

    rank: int = 0
    size: int = 1
    board: Board | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order; every process must call this.

        Raises:
            ProcessError: One of them is gone, as in all of these methods.
        """
        if self.size == 1:
            return [value]
        values = [value] * self.size  # every place is replaced
        with _peers():
            distributed.all_gather_object(values, value)
        return values

    def share(self, value: T) -> T:
        """Process 0's value, in every process; every process must call this."""
        if self.size == 1:
            return value
        values = [value]
        with _peers():
            distributed.broadcast_object_list(values, 0)
        return values[0]

    def to_main(self, value: T) -> Iterator[T]:
        """In process 0 the values of all, in their order, one at a time: never more than two are in memory.

        Elsewhere the value is sent and nothing is given. Every process must call this, and process 0 read to the end.
        """
        if self.is_main:
            return self._receive(value)
        with _peers():
            distributed.send_object_list([value], 0)
        return iter(())

    def wait(self) -> None:
        """Until every process is here."""
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
    """What torch raises where another process is gone, in words."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"Another process of the launch is gone, or cannot be reached: {first_sentence(error)} Its own message, or"
            " the launcher's, says why."
        ) from error


def first_sentence(error: Exception) -> str:
    """Without the place in PyTorch's source that gloo puts before it, and its advice."""
    line = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().partition("\n")[0])
    return f"{line.partition('. ')[0].rstrip('.') or type(error).__name__}."
