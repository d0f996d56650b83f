"""Faults: exceptions of the user's code at a given call, and Ctrl-C at a given instruction."""

from __future__ import annotations

import _thread
import contextlib
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import bnprobe

from .kinds import Subject


class PlantedError(Exception):
    """Raised where a fault was planted."""


class Place:
    """Where a fault is planted: how often it was passed, and when it goes off. Its class keeps what no model does."""

    passed = 0
    at = -1
    error: type[BaseException] = PlantedError

    @classmethod
    def arm(cls, at: int, error: type[BaseException]) -> None:
        cls.passed, cls.at, cls.error = 0, at, error

    @classmethod
    def go_by(cls) -> None:
        cls.passed += 1
        if cls.passed == cls.at:
            raise cls.error("planted")


def in_the_model(subject: Subject) -> None:
    """Every call of the model's second norm layer, or of what comes last in it, passes by the place."""
    part = getattr(subject.model, "bn2", subject.model)
    part.register_forward_pre_hook(lambda module, inputs: Place.go_by())


def in_the_data(subject: Subject) -> None:
    """Every batch passes by the place."""
    batches = subject.batches

    def passing() -> Iterator[Any]:
        for batch in batches():
            Place.go_by()
            yield batch

    subject.batches = passing


def in_train(subject: Subject) -> None:
    """Every call of ``train()`` and ``eval()`` passes by the place, halfway through the modules."""
    kind = type(subject.model)

    def train(self: Any, mode: bool = True) -> Any:
        self.training = mode
        for position, child in enumerate(self.children()):
            if position == 1:
                Place.go_by()
            child.train(mode)
        return self

    if not isinstance(subject.model, torch.jit.ScriptModule):
        made = type(kind.__name__, (kind,), {"train": train, "__module__": kind.__module__})
        object.__setattr__(subject.model, "__class__", made)


PLACES: dict[str, Callable[[Subject], None]] = {
    "model": in_the_model,
    "data": in_the_data,
    "train()": in_train,
}


_ROOT = str(Path(bnprobe.__file__).parent)
_MODES = {torch.overrides.__file__, torch.autograd.grad_mode.__file__, torch.amp.autocast_mode.__file__}
_ENDS = {f"{_ROOT}/measure/{name}.py" for name in ("interrupts", "hooks", "session")}
_BORDERS = {contextlib.__file__, *_MODES, *_ENDS}
"""Files with the beginnings and ends of blocks, where an interrupt does most harm."""


class _Signal(int):
    """A signal that is sent by reading an attribute.

    A call would do as well, but Python looks for signals after every call: the handler would run in the tracer, and not
    where the traced function is.
    """

    sent = property(_thread.interrupt_main)


_CTRL_C = _Signal(signal.SIGINT)


class Interrupt:
    """Sends Ctrl-C at one instruction of bnprobe, of contextlib or of torch's modes. Python handles it as it would any.

    Args:
        at: Number of the instruction, from 1; 0: count them only.

    Attributes:
        passed: Instructions so far.
        borders: Those at the beginnings and ends of blocks.
        where: The line that was running.
    """

    def __init__(self, at: int = 0) -> None:
        self.at, self.passed, self.where = at, 0, ""
        self.borders: list[int] = []

    @contextmanager
    def tracing(self) -> Iterator[None]:
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in _BORDERS and not name.startswith(_ROOT):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            self.passed += 1
            if not self.at and frame.f_code.co_filename in _BORDERS:
                self.borders.append(self.passed)
            if self.passed == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)  # else the next event of the tracer would come first
                _CTRL_C.sent  # noqa: B018  reading it is what sends
                return None
        return self._step


@contextmanager
def timed_interrupt(seconds: float) -> Iterator[None]:
    """Send Ctrl-C after a while, wherever the process is then.

    The function that it comes in is that one, not the handler of the alarm, in which a call would be followed by it.
    """
    before = signal.signal(signal.SIGALRM, lambda number, frame: _CTRL_C.sent)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def positions(run: Interrupt, count: int, seed: int) -> list[int]:
    """Instructions at random: a third anywhere in a run, a third at borders, a third near the end, where things are put
    back.
    """
    chance = random.Random(seed)
    late = max(1, run.passed - run.passed // 10)
    each = -(-count // 3)
    found = [chance.randint(1, run.passed) for _ in range(each)]
    found += [chance.choice(run.borders) for _ in range(each)]
    found += [chance.randint(late, run.passed) for _ in range(each)]
    return sorted(found[:count])
