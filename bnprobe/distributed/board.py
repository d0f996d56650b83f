"""Notices for the other processes, which need no collective: how a launch ends when one of them fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_POLL_SECONDS = 0.05
_FAREWELL_SECONDS = 5.0


class Board:
    """Notices that a process puts up at any time and the others read when they like: no collective.

    Args:
        store: The launch's key-value store; this object makes connections of its own.
        size: Number of processes.
        hosts: Whether the store goes with this process, which then leaves last.
    """

    def __init__(self, store: Any, size: int, hosts: bool) -> None:
        self._store, self._size, self._hosts = store.clone(), size, hosts
        self._watched = store.clone()  # a connection is for one thread
        self._first = False
        self._done = threading.Event()
        self._watcher: threading.Thread | None = None

    def halt(self) -> None:
        """Ask all processes to stop measuring and to come to the next exchange."""
        self._store.set("halt", "1")

    @property
    def halted(self) -> bool:
        """Whether one of them asked for it. Costs a round trip to the store, about 0.1 ms on one machine."""
        return bool(self._store.check(["halt"]))

    def end(self, code: int) -> int | None:
        """Say that the launch ends with this exit code; None if this process is the first to say so, else the code
        that it ends with.
        """
        self.close()  # this process leaves by itself
        self._first = self._store.add("ends", 1) == 1
        if not self._first:
            return int(self._store.get("code"))
        self._store.set("code", str(code))
        return None

    def watch(self, leave: Callable[[int], None]) -> None:
        """Call ``leave`` with the exit code, in a thread, as soon as another process ends the launch."""
        self._watcher = threading.Thread(target=self._look_out, args=(leave,), daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Watch no longer."""
        self._done.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None

    def farewell(self) -> None:
        """After ``end``: wait until the other processes know it too, at most a few seconds, since some may be dead."""
        with suppress(RuntimeError):  # the store has gone with its process
            if self._first:
                _wait_for(lambda: self._store.add("seen", 0) >= self._size - 1)
                self._store.set("farewell", "1")
            else:
                self._has_seen(self._store)

    def _look_out(self, leave: Callable[[int], None]) -> None:
        try:
            while not self._done.wait(_POLL_SECONDS):
                if self._watched.check(["code"]) and not self._done.is_set():
                    code = int(self._watched.get("code"))
                    self._has_seen(self._watched)
                    leave(code)
                    return
        except RuntimeError:  # the store has gone with its process: collectives will say so
            return

    def _has_seen(self, store: Any) -> None:
        """Say so; the store may be gone at once, so that this is the last word to it."""
        store.add("seen", 1)
        if self._hosts:
            _wait_for(lambda: bool(store.check(["farewell"])))


def _wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds, at most a few seconds."""
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
