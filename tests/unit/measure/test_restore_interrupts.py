"""Ctrl-C waits until a step is done, and until everything is put back."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from bnprobe.measure.interrupts import Restoring, deferred_interrupts
from bnprobe.measure.restore import untouched


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


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_what_puts_back_is_never_done_by_half() -> None:
    done: list[str] = []

    def slow() -> None:
        ctrl_c()
        done.append("first")

    with pytest.raises(KeyboardInterrupt), Restoring(lambda: [slow, lambda: done.append("second")]):
        pass
    assert done == ["first", "second"]


def test_a_restore_that_fails_does_not_stop_the_others() -> None:
    done: list[int] = []

    def failing() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Restoring(lambda: [failing, lambda: done.append(1)]):
        pass
    assert done == [1]


@pytest.mark.parametrize("failing", [False, True])
def test_undone_only_if_it_fails(failing: bool) -> None:
    undone: list[int] = []
    with suppress(ZeroDivisionError), Restoring(lambda: [lambda: undone.append(1)], undo=True):
        if failing:
            raise ZeroDivisionError
    assert undone == [1] * failing


def test_an_interrupt_within_an_inner_block_acts_at_its_end() -> None:
    done: list[str] = []

    def work() -> None:
        with Restoring(lambda: [lambda: done.append("outer")]):
            with Restoring(lambda: [ctrl_c, lambda: done.append("inner")]):
                pass
            done.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]


def test_a_mode_of_torch_that_a_block_leaves_on_is_taken_off() -> None:
    class Left(TorchFunctionMode):
        pass

    class LeftToo(TorchDispatchMode):
        pass

    stacks = torch.overrides._get_current_function_mode_stack, _get_current_dispatch_mode_stack
    before = [list(stack()) for stack in stacks]
    with untouched(nn.BatchNorm1d(2)):
        torch.autocast("cpu", torch.bfloat16).__enter__()
        torch.set_grad_enabled(False)
        LeftToo().__enter__()
        Left().__enter__()
    assert [list(stack()) for stack in stacks] == before
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_the_handler_of_a_block_that_sets_another_one_stays() -> None:
    before = signal.getsignal(signal.SIGINT)

    def mine(number: int, frame: object) -> None:
        pass

    try:
        with Restoring(list):
            signal.signal(signal.SIGINT, mine)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
