"""One run: a kind of model, an operation, and at most one fault; what came of it."""

from __future__ import annotations

import gc
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bnprobe
from bnprobe.errors import BnprobeError

from .injection import PLACES, Interrupt, Place
from .kinds import KINDS, Subject
from .operations import OPERATIONS
from .snapshot import differences, snapshot


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        error: What was raised; None: it ended well.
        changed: The ways to what is not as it was, though it should be.
    """

    error: BaseException | None
    changed: tuple[str, ...]

    @property
    def end(self) -> str:
        """How it ended, a word."""
        return "finished" if self.error is None else type(self.error).__name__

    def broken(self, expected: type[BaseException] | None = None) -> str | None:
        """What is wrong; None if nothing is."""
        if self.changed:
            return f"{self.end}, and changed: {', '.join(self.changed[:6])}"
        fine = (BnprobeError, KeyboardInterrupt, *([expected] if expected else []))
        if self.error is not None and not isinstance(self.error, fine):
            return f"raised {self.end}: {self.error}"
        return None


def run(
    kind: str,
    operation: str,
    plant: Callable[[Subject], object] = lambda subject: None,
    fault: AbstractContextManager[Any] | None = None,
) -> Outcome:
    """Make a model, do something to it, and compare all that hangs on it, its data and the process with before.

    Compared is twice: while the exception still holds what ran, and once that is gone.

    Args:
        plant: Plants an exception.
        fault: Entered around the operation: an interrupt.
    """
    subject, does = KINDS[kind](), OPERATIONS[operation]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plant(subject)
        roots = [subject.model]
        if kind not in REFILLING:
            data = subject.batches()
            subject.batches = lambda: data
            roots.append(data)
        before, error = snapshot(*roots), None
        try:
            with fault or nullcontext():
                does.run(subject)
        except BaseException as raised:
            sys.settrace(None)
            error = raised if _comes_from_bnprobe(raised) else None
            found = differences(before, snapshot(*roots))
        else:
            found = []
        if error is not None:
            error.__traceback__ = error.__context__ = error.__cause__ = None
        gc.collect()
        found = sorted({*found, *differences(before, snapshot(*roots))})
    if error is None and does.changes == "all":
        found = []
    elif error is None and does.changes == "statistics":
        found = [path for path in found if not any(name in path for name in subject.statistics)]
    return Outcome(error, tuple(found))


def _comes_from_bnprobe(error: BaseException) -> bool:
    """Whether it was raised before the operation returned: a Ctrl-C that comes later is the caller's."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.startswith(_BNPROBE) for frame, _ in frames)


_BNPROBE = str(Path(bnprobe.__file__).parent)

REFILLING = frozenset({"refilled_buffer"})
"""Kinds whose data is to change: a loader fills its buffer."""


def run_planted(kind: str, operation: str, place: str, at: int, error: type[BaseException]) -> tuple[Outcome, bool]:
    """A run with an exception at a place; and whether it was reached."""
    Place.arm(at, error)
    outcome = run(kind, operation, PLACES[place])
    return outcome, Place.passed >= at


def instructions(kind: str, operation: str) -> Interrupt:
    """Count the instructions of a run, the second of its kind: the first one fills caches."""
    run(kind, operation)
    counted = Interrupt()
    run(kind, operation, fault=counted.tracing())
    return counted


def run_interrupted(kind: str, operation: str, at: int) -> tuple[Outcome, str]:
    """A run with Ctrl-C at an instruction; and the line that was running."""
    interrupt = Interrupt(at)
    outcome = run(kind, operation, fault=interrupt.tracing())
    return outcome, interrupt.where
