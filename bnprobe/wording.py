"""The words in which messages ask for something: options and files on the command line, arguments in Python; the
nearest of several names.

A public function is wrapped in `from_python`; while it runs, `option` and `either` give the words of Python.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_in_python: ContextVar[bool] = ContextVar("a function was called, and no command", default=False)

_ARGUMENTS = {"--batches": "num_batches", "--threshold": "thresholds", "--output": "path", "-o": "path"}
"""Arguments that are not called as the options are."""


def from_python(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """A function whose messages speak of arguments."""

    @wraps(function)
    def called(*given: _Given.args, **named: _Given.kwargs) -> _Result:
        before = _in_python.set(True)
        try:
            return function(*given, **named)
        finally:
            _in_python.reset(before)

    return called


def either(command_line: str, python: str) -> str:
    """The first for the reader of a command, the second for the caller of a function."""
    return python if _in_python.get() else command_line


def option(name: str, value: object = None) -> str:
    """An option, or the argument that says the same.

    Args:
        name: E.g. "--batch-size".
        value: Given with it, e.g. 2: "--batch-size 2", or "batch_size=2". True: a flag. None: no value.
    """
    argument = argument_of(name)
    if value is None:
        return either(name, argument)
    if value is True:
        return either(name, f"{argument}=True")
    shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return either(f"{name} {shown}", f"{argument}={value!r}")


def argument_of(option: str) -> str:
    """The argument of functions that says the same as an option."""
    return _ARGUMENTS.get(option, option.removeprefix("--").replace("-", "_"))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known name that is spelled most like another; empty where none is alike enough.

    Args:
        name: What the user wrote.
        known: What there is.
        cutoff: The least likeness, from 0 (whatever is nearest) to 1.
    """
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), "")


_command: ContextVar[str] = ContextVar("the command that runs", default="scan")


def named_command(name: str) -> None:
    """From now on, messages that show a command line for the same work show it of this command."""
    _command.set(name)


def command_for(target: str) -> str:
    """The command that runs, for another target."""
    name = _command.get()
    return f"bnprobe {name} {'--from ' if name == 'init' else ''}{target}"


_GIVEN = {
    "loss": (
        "loss(model, batch) in the model file, or a loss that the spec names",
        "loss=..., a function of (model, batch)",
    ),
    "scores": (
        "loss(model, batch) or metric(model, batch), in the model file or the spec",
        "loss=... or metric=..., functions of (model, batch)",
    ),
    "held-out data": (
        "load_eval_data(batch_size) in the model file, or eval_data in the spec",
        "evaluation=..., a loader or data set",
    ),
    "forward": ("forward(model, batch) in the model file", "forward=..., a function of (model, batch)"),
    "data": ("load_data(batch_size) in the model file, or data in the spec", "batches"),
}


def given(what: str) -> str:
    """What the user may give, and where: one of the words that messages have for "loss", "held-out data", ..."""
    return either(*_GIVEN[what])
