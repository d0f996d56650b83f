"""The processes of a torchrun launch: who they are, what each measures, and what they tell each other.

Plain torch.distributed (gloo on CPU, nccl on CUDA). ``connected`` joins the launch and yields a ``World``; without a
launch that is ``ALONE``, and every call is a no-op. A ``Share`` says which micro-batches are this process's. A
``Board`` is the key-value store through which one process tells the others that it failed or was interrupted.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from bnprobe.errors import ProcessError, UsageError

__all__ = [
    "ALONE",
    "EVERYTHING",
    "OPENING",
    "Share",
    "World",
    "beat",
    "connected",
    "current_world",
    "launched",
    "packed",
    "waiting",
]


OPENING = 2
"""Micro-batches that every process reads, so that all find the same layers and can run the same self-check."""


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

_POLL_SECONDS = 0.05
_FAREWELL_SECONDS = 5.0
_LIFE_SECONDS = 1.0
_LATER = 2.0
"""Multiple of the timeout after which process 0, which would have noticed it itself, has stopped altogether."""


HANGING = "BNPROBE_TIMEOUT"
"""Environment variable: seconds without a sign of life after which a process of a launch is taken to hang."""

DEFAULT_TIMEOUT = 1800.0
"""Its default: what torch allows a collective on CPUs."""

_life = [0, 0]
"""Signs of life that this process has given, and how deep it is in waiting for others."""


def beat() -> None:
    """Give a sign of life, for the other processes of a launch: the user's code was called, or has returned."""
    _life[0] += 1


def timeout() -> float:
    """Seconds without a sign of life after which a process is taken to hang.

    Raises:
        UsageError: The environment variable is no positive number.
    """
    text = os.environ.get(HANGING, "")
    try:
        seconds = float(text) if text else DEFAULT_TIMEOUT
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise UsageError(f"{HANGING} is {text[:40]!r}, but must be a number of seconds above 0.")
    return seconds


class Board:
    """Messages that a process posts at any time and the others read at any time, without a collective.

    Every process also posts its signs of life here, so that one that hangs is noticed: process 0 watches all, itself
    too, and the others watch process 0 for as long again. A process that waits for others is excused.

    Args:
        store: Key-value store of the launch; the board makes its own connections to it.
        rank: Rank of this process.
        size: Number of processes.
        hosts: Whether this process hosts the store, so that it must exit last.
        seconds: Without a sign of life, after which a process is taken to hang.
    """

    def __init__(self, store: Any, rank: int, size: int, hosts: bool, seconds: float) -> None:
        self._store, self._rank, self._size, self._hosts = store.clone(), rank, size, hosts
        self._timeout = seconds
        self._watched = store.clone()  # a connection serves one thread only
        self._first = False
        self._done = threading.Event()
        self._watcher: threading.Thread | None = None

    def halt(self) -> None:
        """Ask all processes to stop measuring and to continue with the next exchange."""
        self._store.set("halt", "1")

    @property
    def halted(self) -> bool:
        """Whether any process asked to stop. Costs one round trip to the store, about 0.1 ms on one machine."""
        return bool(self._store.check(["halt"]))

    def claim(self) -> int | None:
        """Claim to be the process that says why the launch ends, before it says so. None if this process is the first
        to do so, else the exit code that another process announced.
        """
        self.close()  # this process exits by itself
        self._first = self._store.add("ends", 1) == 1
        if not self._first:
            if _wait_for(lambda: bool(self._store.check(["code"]))):
                return int(self._store.get("code"))
            self._first = True  # the other one died before it could say anything
        return None

    def end(self, code: int) -> None:
        """Announce, after ``claim``, that the launch ends with this exit code: from now on the others leave."""
        if self._first:
            self._store.set("code", str(code))

    def watch(self, leave: Callable[[int], None], hangs: Callable[[str], int]) -> None:
        """In a thread, call ``leave`` with the exit code as soon as another process announces the end of the launch.

        Args:
            leave: Ends this process.
            hangs: Says that a process hangs, in the sentence that it gets, and returns the exit code.
        """
        self._watcher = threading.Thread(target=self._look_out, args=(leave, hangs), daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Stop watching."""
        self._done.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None

    def farewell(self) -> None:
        """After ``end``, wait until the other processes know of it, but only a few seconds, since some may be dead."""
        with suppress(RuntimeError):  # the store is gone with its process
            if self._first:
                _wait_for(lambda: self._store.add("seen", 0) >= self._size - 1)
                self._store.set("farewell", "1")
            else:
                self._has_seen(self._store)

    def _look_out(self, leave: Callable[[int], None], hangs: Callable[[str], int]) -> None:
        watched, patience = (range(self._size), 1.0) if self._rank == 0 else (range(1), _LATER)
        now = time.monotonic()
        seen = dict.fromkeys(watched, ("", now))
        posted, due = "", now
        try:
            while not self._done.wait(_POLL_SECONDS):
                if self._watched.check(["code"]) and not self._done.is_set():
                    code = int(self._watched.get("code"))
                    self._has_seen(self._watched)
                    leave(code)
                    return
                now = time.monotonic()
                if now < due:
                    continue
                due = now + min(_LIFE_SECONDS, self._timeout / 4)
                if (life := f"{_life[0]} {int(_life[1] > 0)}") != posted:
                    posted = life
                    self._watched.set(f"life {self._rank}", life)
                seen = {rank: self._newest(rank, *before, now) for rank, before in seen.items()}
                silent = [rank for rank, (_, since) in seen.items() if now - since > patience * self._timeout]
                if silent and not self._done.is_set() and self._watched.add("ends", 1) == 1:
                    code = hangs(_hanging(silent, self._timeout))
                    self._watched.set("code", str(code))
                    _wait_for(self._is_known)
                    leave(code)
                    return
        except RuntimeError:  # the store is gone with its process; collectives will report it
            return

    def _is_known(self) -> bool:
        """Whether all others know that the launch ends."""
        return int(self._watched.add("seen", 0)) >= self._size - 1

    def _newest(self, rank: int, life: str, since: float, now: float) -> tuple[str, float]:
        """The last sign of life of another process, and when it was new; of one that waits for others, now."""
        key = f"life {rank}"
        found = self._watched.get(key).decode() if self._watched.check([key]) else ""
        return (life, since) if found == life and not found.endswith(" 1") else (found, now)

    def _has_seen(self, store: Any) -> None:
        """Confirm that this process has seen the end; the store may vanish at once, so nothing is sent after this."""
        store.add("seen", 1)
        if self._hosts:
            _wait_for(lambda: bool(store.check(["farewell"])))


def _hanging(ranks: list[int], seconds: float) -> str:
    """That processes hang, sentences."""
    which = f"Process {ranks[0]} has" if len(ranks) == 1 else f"Processes {', '.join(map(str, ranks))} have"
    return (
        f"{which} given no sign of life for {seconds:g} seconds: neither the model nor the data was called there, or a"
        f" call does not return. If it needs so long, set {HANGING} to more seconds (default {DEFAULT_TIMEOUT:g})."
    )


def _wait_for(condition: Callable[[], bool]) -> bool:
    """Wait until the condition holds, but at most a few seconds; whether it does."""
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return holds


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
            distributed.send_object_list([packed(value)], 0)
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
            received = [b""]
            with _peers():
                distributed.recv_object_list(received, rank)
            yield pickle.loads(received[0])


ALONE = World()


class _Pickler(pickle.Pickler):
    """Writes tensors as arrays. torch's own way copies each several times, with all that a view was taken of."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor:
            with suppress(RuntimeError, TypeError):  # no array: with gradients, sparse, of another dtype or device
                return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def packed(value: Any) -> bytes:
    """A value as bytes, for ``pickle.loads``."""
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


@contextmanager
def waiting(waits: bool = True) -> Iterator[None]:
    """Excuse the silence of this process while the block runs, where it waits for others there."""
    _life[1] += waits
    try:
        yield
    finally:
        _life[1] -= waits
        beat()


@contextmanager
def _peers() -> Iterator[None]:
    """Turn torch's error about a lost process into a ProcessError; while the block runs, this process waits."""
    try:
        with waiting():
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


JOINING = timedelta(minutes=5)
"""How long the processes wait for each other at start-up."""

PATIENCE = timedelta(days=1)
"""Timeout of collectives. It is long because process 0 may work alone for hours. A process that fails posts this on
the board, the connections of one that dies are closed, and one that hangs is found by its silence (``HANGING``).
"""

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_connections: list[World] = []
"""The worlds that this module has connected; the last one is current."""


def launched() -> World:
    """The world described by torchrun's environment variables, whether or not its processes are connected yet.

    WORLD_SIZE without a master address is not a launch: some batch systems set it for single processes.

    Raises:
        ProcessError: A variable is no number.
    """
    if not all(name in os.environ for name in _VARIABLES):
        return ALONE
    try:
        return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except ValueError:
        raise ProcessError("RANK and WORLD_SIZE must be whole numbers, as torchrun sets them.") from None


def current_world() -> World:
    """The processes that the caller has connected."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    return World(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def connected() -> Iterator[World]:
    """Connect the processes of a torchrun launch while the block runs.

    The backend is gloo, and nccl for CUDA tensors if every process of the machine has its own GPU; the current CUDA
    device becomes that of LOCAL_RANK. Without torchrun, inside another such block, or if the caller has connected the
    processes already, nothing is set up or torn down.

    Raises:
        ProcessError: The processes could not be connected.
    """
    if _connections:
        yield _connections[-1]
    elif distributed.is_available() and distributed.is_initialized():
        yield current_world()
    elif launched().size == 1:
        yield ALONE
    else:
        world = _connect(launched())
        _connections.append(world)
        try:
            yield world
        finally:
            _connections.remove(world)
            if world.board is not None:
                world.board.close()
            distributed.destroy_process_group()


def _connect(world: World) -> World:
    if not distributed.is_available():
        raise ProcessError("This build of PyTorch does not include torch.distributed: run bnprobe without torchrun.")
    from torch.distributed.distributed_c10d import PrefixStore  # not available in every build
    from torch.distributed.rendezvous import rendezvous

    seconds = timeout()  # first: a process that is refused later may leave while the others still connect to it
    try:
        store, rank, size = next(rendezvous("env://", timeout=JOINING))
        store = PrefixStore("bnprobe", store)
        distributed.init_process_group(_bind_device(), store=store, rank=rank, world_size=size, timeout=PATIENCE)
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return World(rank, size, Board(PrefixStore("board", store), rank, size, hosts, seconds))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ProcessError(
            f"Process {world.rank} of {world.size} could not connect to the others at {where}: {first_sentence(error)}"
            " Check that every process of the launch is running and can reach this address."
        ) from error


def _bind_device() -> str:
    """Select this process's GPU, if there is one, and return the backends to use."""
    if not torch.cuda.is_available():
        return "gloo"
    local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    torch.cuda.set_device(local % devices)
    # nccl refuses two processes on one GPU; gloo accepts CUDA tensors too.
    own = int(os.environ.get("LOCAL_WORLD_SIZE", str(local + 1))) <= devices
    return "cpu:gloo,cuda:nccl" if own and distributed.is_nccl_available() else "gloo"
