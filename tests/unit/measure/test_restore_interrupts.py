"""Ctrl-C waits until a step is done."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from bnprobe.measure.interrupts import deferred_interrupts


def test_the_block_is_finished_first() -> None:
    done = []

    def work() -> None:
        with deferred_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]


def test_the_handler_comes_back() -> None:
    before, inside = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with deferred_interrupts():
            inside.append(signal.getsignal(signal.SIGINT))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert inside != [before]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_python_does_not_know_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a one is set by a C program that embeds Python; what Python says of it is None."""
    before, seen = signal.getsignal(signal.SIGINT), []
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: None)
        with deferred_interrupts():
            patch.undo()
            seen.append(signal.getsignal(signal.SIGINT))
    assert seen == [before]


def test_outside_the_main_thread_nothing_happens() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with deferred_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
