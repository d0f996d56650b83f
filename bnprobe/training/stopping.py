"""SIGTERM and Ctrl-C end training after the step in progress."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Whether training was told to stop.

    Attributes:
        name: Of the signal, e.g. "SIGTERM"; empty if there was none.
    """

    def __init__(self) -> None:
        self.name = ""


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Note SIGTERM and Ctrl-C while the block runs; the second one acts at once, as it would have without this.

    Signals reach the main thread only; elsewhere, and where a handler was not set from Python and so could not be put
    back, this does nothing.
    """
    flag = StopFlag()
    previous: dict[signal.Signals, Any] = {}

    owner = os.getpid()

    def note(number: int, frame: object) -> None:
        if os.getpid() != owner:
            _in_worker(number)
        else:
            flag.name = signal.Signals(number).name
            put_back()

    def put_back() -> None:
        for each in list(previous):
            signal.signal(each, previous.pop(each))

    if threading.current_thread() is threading.main_thread():
        for each in _SIGNALS:
            if signal.getsignal(each) is not None:
                previous[each] = signal.getsignal(each)
                signal.signal(each, note)
    try:
        yield flag
    finally:
        put_back()


def _in_worker(number: int) -> None:
    """A loader's process inherits the handlers. It outlives the Ctrl-C that reaches it too: the step is to end."""
    if number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
