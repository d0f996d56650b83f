"""The standard streams of a command: stdout holds its report and nothing else, and messages on stderr are clean."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

from bnprobe.errors import OutputError
from bnprobe.printable import PROSE_WIDTH, message

_STDOUT, _STDERR = 1, 2

_MOST_DIGITS = 4
"""Digits of the size of a terminal."""


@dataclass(frozen=True)
class Start:
    """How a command was started, whatever the user's code does to the process afterwards.

    Attributes:
        stdout: Where the report goes; None: stdout is closed.
        words: The words of the command line.
    """

    stdout: TextIO | None = field(default_factory=lambda: sys.stdout)
    words: Sequence[str] = field(default_factory=lambda: list(sys.argv[1:]))

    @property
    def typed(self) -> str:
        """The command line as typed."""
        return shlex.join(["bnprobe", *self.words])


_running: list[Start] = []


def start() -> Start:
    """How the running command was started."""
    return _running[-1] if _running else Start()


@contextmanager
def own_stdout(shared: bool = False) -> Iterator[None]:
    """While the block runs, only ``write_out`` writes to stdout. All else that is written there goes to stderr.

    That holds for the user's code and for libraries, also for those outside Python, and in a process of its own it
    holds until the process ends: libraries write what they have buffered at the end.

    Args:
        shared: Leave stdout as it is: in a launch of several processes, that of all but the first is discarded.
    """
    before = sys.stdout
    if shared:
        yield
        return
    own = _set_apart(before)
    _running.append(Start(own))
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        _running.pop()
        sys.stdout = before
        if own is not before and own is not None:
            own.close()


def _set_apart(stdout: TextIO | None) -> TextIO | None:
    """A stream of bnprobe's own to where stdout leads; the descriptor of stdout leads to stderr from now on."""
    if _descriptor(stdout) != _STDOUT or _descriptor(sys.stderr) != _STDERR or stdout is None:
        return stdout  # redirected within Python, as by a test
    stdout.flush()
    own = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    return os.fdopen(own, "w", encoding=stdout.encoding, errors="backslashreplace")


def _descriptor(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None


def occupy_closed_streams() -> None:
    """Let a standard stream that was closed lead to nowhere, or the next file that is opened would take its place."""
    for number in (0, _STDOUT, _STDERR):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = os.fdopen(_STDERR, "w", closefd=False)


def forget_odd_sizes() -> None:
    """Forget the size of a terminal in the environment that is none, or enormous: rich and typer would obey it."""
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        size = os.environ.get(name, "1")
        if not size.isdecimal() or len(size) > _MOST_DIGITS or int(size) == 0:
            del os.environ[name]


def write_out(text: str) -> None:
    """Write to stdout. A reader that closes the pipe early (``| head``) is not an error.

    Raises:
        OutputError: The text could not be written, e.g. to a full disk.
    """
    with writing_to(start().stdout) as stream:
        stream.write(text)
        stream.flush()


@contextmanager
def writing_to(stream: TextIO | None) -> Iterator[TextIO]:
    """Turn a stdout that cannot be written to into an error, unless its reader has left.

    Raises:
        OutputError: It could not be written to, or is closed (None).
    """
    if stream is None:
        raise OutputError("stdout could not be written to: it is closed.")
    try:
        yield stream
    except OSError as error:
        _discard(stream)
        if error.errno != errno.EPIPE:
            raise OutputError(f"stdout could not be written to: {error.strerror}.") from None


def say(text: str) -> None:
    """Write a message to stderr, clean: see ``bnprobe.printable``. A stderr that cannot be written to is no error.

    Sentences are wrapped at words where stderr is a terminal; paths and lines of code stay whole.
    """
    width = _message_width()
    lines = message(text).split("\n")
    line = "\n".join(each if not width or each[:1].isspace() else _wrapped(each, width) for each in lines) + "\n"
    stream = sys.stderr
    try:
        stream.write(line)
        stream.flush()
    except OSError:
        _discard(stream)
    except (AttributeError, ValueError):  # the user's code has closed or replaced it
        with suppress(OSError):
            os.write(_STDERR, line.encode(errors="backslashreplace"))


def _message_width() -> int | None:
    """Columns of a sentence where stderr is a terminal; None elsewhere: what reads messages there goes by lines."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
        return min(columns, PROSE_WIDTH) or None
    except (AttributeError, OSError, ValueError):  # no terminal, or closed or replaced by the user's code
        return None


def _wrapped(line: str, width: int) -> str:
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False, expand_tabs=False)


def _discard(stream: TextIO) -> None:
    """Let a stream lead to nowhere: what it has buffered must not fail again when Python closes it."""
    number = _descriptor(stream)
    if number is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
