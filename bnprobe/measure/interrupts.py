"""Ctrl-C at a bad moment: what puts things back is never skipped, and never done by half.

Python runs the handler of a signal between two instructions of the main thread: also between the end of a block and
the first line of what cleans up after it. ``Restoring`` closes that gap. While such a block runs, a handler is
installed that looks at which function it interrupts. Where that is one that puts things back, Ctrl-C waits until it is
done; where it is one of contextlib or of torch's modes, which is about to enter or leave a block, until the next
instruction elsewhere.
"""

from __future__ import annotations

import _thread
import contextlib
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch.overrides
import torch.utils._python_dispatch

Restore = Callable[[], object]
"""Puts something back as it was when this was made."""


class Restoring:
    """A block after which things are put back, whatever ended it; a context manager.

    Every restore runs, also after one that fails; the first failure is raised at the end. Ctrl-C waits meanwhile.

    Args:
        save: Called when the block begins; gives what puts things back, in this order.
        undo: Put back only where the block fails. A Ctrl-C that comes at its very end undoes it too, so that what was
            done stays only if nothing is raised.

    Attributes:
        restores: What puts things back, once the block has begun.
    """

    def __init__(self, save: Callable[[], Iterable[Restore]], undo: bool = False) -> None:
        self._save, self._undo = save, undo
        self.restores: list[Restore] = []
        self._handler: _Handler | None = None
        self._installed = False

    def __enter__(self) -> Restoring:
        self.restores = list(self._save())
        self._handler, self._installed = _installed()
        if self._handler is not None and self._handler.waiting and not _puts_back(sys._getframe(1)):
            self._end()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        handler = self._handler
        failed = kind is not None or (handler is not None and bool(handler.waiting))
        try:
            if failed or not self._undo:
                run_all(self.restores)
        finally:
            if handler is not None and (self._installed or not _puts_back(sys._getframe(1))):
                try:
                    self._end()
                except BaseException:
                    if self._undo and not failed:
                        run_all(self.restores)
                    raise

    def _end(self) -> None:
        """Give back to the handler from before, and let a Ctrl-C that waited act."""
        handler = self._handler
        assert handler is not None  # else there is nothing to end
        current: Any = signal.getsignal(signal.SIGINT)
        if self._installed and current is handler:  # the block may have set another one
            signal.signal(signal.SIGINT, handler.previous)
        if handler.waiting:
            caught, handler.waiting = handler.waiting[0], []
            handler.previous(*caught)


class _Handler:
    """The handler of Ctrl-C while things are to be put back.

    Attributes:
        previous: The handler from before.
        waiting: The Ctrl-C that came while something was put back.
    """

    def __init__(self, previous: Any) -> None:
        self.previous = previous
        self.waiting: list[tuple[int, FrameType | None]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _puts_back(frame):
            self.waiting.append((number, frame))
        elif frame is not None and frame.f_code.co_filename in _BETWEEN_BLOCKS:
            # Raised here, it would leave a block without its end: what that does would run when the traceback goes.
            _AGAIN.sent  # noqa: B018  reading it is what sends
        else:
            self.previous(number, frame)


class _Signal(int):
    """A signal that is sent by reading an attribute: Python looks for signals after a call, which is still too soon."""

    sent = property(_thread.interrupt_main)


_AGAIN = _Signal(signal.SIGINT)


def _installed() -> tuple[_Handler | None, bool]:
    """The handler, and whether it was installed now: blocks within blocks share one.

    None outside the main thread, which alone is interrupted; and where the handler is not one of Python's, which could
    not be put back.
    """
    if threading.current_thread() is not threading.main_thread():
        return None, False
    previous = signal.getsignal(signal.SIGINT)
    if isinstance(previous, _Handler):
        return previous, False
    if not callable(previous):
        return None, False
    handler = _Handler(previous)
    signal.signal(signal.SIGINT, handler)
    return handler, True


_BETWEEN_BLOCKS = frozenset(
    inspect.getfile(each) for each in (contextlib, torch.overrides, torch.utils._python_dispatch)
)
"""Files whose functions begin and end blocks, and do nothing that takes long: a mode of torch that is set aside for a
moment, too."""

_NEVER_INTERRUPTED = frozenset({Restoring.__exit__.__code__, _installed.__code__})


def _puts_back(frame: FrameType | None) -> bool:
    """Whether a function puts things back, or was called by one that does."""
    while frame is not None:
        if frame.f_code in _NEVER_INTERRUPTED:
            return True
        frame = frame.f_back
    return False


def run_all(restores: Iterable[Restore]) -> None:
    """Run every restore, also after one that fails, and raise the first failure at the end."""
    failures: list[Exception] = []
    for restore in restores:
        try:
            restore()
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Defer Ctrl-C until the block is done, so that the block runs completely or not at all.

    Signals reach the main thread only; elsewhere this does nothing, nor where the handler was not set from Python:
    such a one could not be put back.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending and callable(previous):
            previous(*pending[0])
