"""Checks, what they are asked of, and what came out."""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from benchmarks.peers.layers import Subject

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"

Asked = Callable[[Subject], None]
"""Raises if the layer does not do what is asked of it."""

LAZY_SOURCES = ("torch test_modules", "torch lazy modules")
"""Suites that lazy layers are asked."""

COMPILERS = ("torch dynamo", "torch export")
"""Suites that only 2d layers are asked: they take seconds, and the others differ in the number of dimensions alone."""

_LONGEST = 200
"""Characters of a reason in a table."""


class NotApplicableError(Exception):
    """The check makes no sense for this layer, or not on this machine; the message says why."""


@dataclass(frozen=True)
class Check:
    """Something that is asked of a layer.

    Attributes:
        name: That of the function.
        source: Whose tests ask it.
        families: The families of layers that it is asked of; empty: all.
        ask: The function.
    """

    name: str
    source: str
    families: tuple[str, ...]
    ask: Asked

    @property
    def words(self) -> str:
        """First line of the function's docstring."""
        return (self.ask.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class Outcome:
    """What came out when a check was asked of a layer.

    Attributes:
        check, layer: Names.
        source: Of the check.
        state: ``PASSED``, ``FAILED`` or ``NOT_APPLICABLE``.
        reason: Why it failed or does not apply; "" if it passed.
        seconds: Duration.
    """

    check: str
    layer: str
    source: str
    state: str
    reason: str
    seconds: float


def asks(source: str, *families: str) -> Callable[[Asked], Check]:
    """Make a function a check; ``checks_of`` finds it in its module."""
    return lambda ask: Check(ask.__name__, source, families, ask)


def checks_of(module: ModuleType) -> list[Check]:
    """The checks that a module defines, in the order in which they are written."""
    return [value for value in vars(module).values() if isinstance(value, Check)]


def run(check: Check, subject: Subject) -> Outcome:
    """Ask a layer; an exception of any kind is a failure."""
    started = time.perf_counter()
    state, reason = PASSED, ""
    try:
        with _quiet():
            torch.manual_seed(0)
            check.ask(subject)
    except NotApplicableError as error:
        state, reason = NOT_APPLICABLE, str(error)
    except Exception as error:
        state, reason = FAILED, in_one_line(error)
        if "does not know whose output it normalizes" in reason:
            state, reason = NOT_APPLICABLE, "the layer stands alone there, without a convolution to follow"
    finally:
        torch.compiler.reset()
    return Outcome(check.name, subject.name, check.source, state, reason, time.perf_counter() - started)


def is_asked(check: Check, subject: Subject) -> bool:
    """Whether a check is meant for a layer's family. (Lazy layers are the others after their first input.)"""
    if subject.is_lazy and check.source not in LAZY_SOURCES:
        return False
    if subject.dimensions != 2 and check.source in COMPILERS:
        return False
    return not check.families or subject.family in check.families


def in_one_line(error: BaseException) -> str:
    """An exception's kind and message, short enough for a table."""
    text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").replace("|", "/").strip(": ")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def needs_open_training(subject: Subject) -> None:
    """Leave out a check of training that looks into the layer, where nothing can."""
    if True not in subject.modes:
        raise NotApplicableError("by design nothing looks into its training, which keeps averages of its backward pass")


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings or logs, and PyTorch's global settings as they were."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.use_deterministic_algorithms(deterministic)
