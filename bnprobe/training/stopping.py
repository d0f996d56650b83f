"""Stop training on SIGTERM or Ctrl-C, after the current step."""

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
        name: Name of the signal, e.g. "SIGTERM"; empty if there was none.
    """

    def __init__(self) -> None:
        self.name = ""


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Record SIGTERM and Ctrl-C while the block runs. A second signal acts at once, as it would outside this block.

    Python handles signals only in the main thread. In other threads this does nothing, nor where a handler was not set
    from Python and so could not be restored.
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
    """Handler in a loader process, which inherits it: ignore the Ctrl-C that it also receives, so the step can end."""
    if number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
