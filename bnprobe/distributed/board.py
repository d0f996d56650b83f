"""Messages between processes without collectives: how a launch ends if one process fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_POLL_SECONDS = 0.05
_FAREWELL_SECONDS = 5.0


class Board:
    """Messages that a process posts at any time and the others read at any time, without a collective.

    Args:
        store: Key-value store of the launch; the board makes its own connections to it.
        size: Number of processes.
        hosts: Whether this process hosts the store, so that it must exit last.
    """

    def __init__(self, store: Any, size: int, hosts: bool) -> None:
        self._store, self._size, self._hosts = store.clone(), size, hosts
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

    def end(self, code: int) -> int | None:
        """Announce that the launch ends with this exit code. None if this process is the first to do so, else the exit
        code that another process announced.
        """
        self.close()  # this process exits by itself
        self._first = self._store.add("ends", 1) == 1
        if not self._first:
            return int(self._store.get("code"))
        self._store.set("code", str(code))
        return None

    def watch(self, leave: Callable[[int], None]) -> None:
        """In a thread, call ``leave`` with the exit code as soon as another process announces the end of the launch."""
        self._watcher = threading.Thread(target=self._look_out, args=(leave,), daemon=True)
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

    def _look_out(self, leave: Callable[[int], None]) -> None:
        try:
            while not self._done.wait(_POLL_SECONDS):
                if self._watched.check(["code"]) and not self._done.is_set():
                    code = int(self._watched.get("code"))
                    self._has_seen(self._watched)
                    leave(code)
                    return
        except RuntimeError:  # the store is gone with its process; collectives will report it
            return

    def _has_seen(self, store: Any) -> None:
        """Confirm that this process has seen the end; the store may vanish at once, so nothing is sent after this."""
        store.add("seen", 1)
        if self._hosts:
            _wait_for(lambda: bool(store.check(["farewell"])))


def _wait_for(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, but at most a few seconds."""
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
