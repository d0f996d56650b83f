"""What a path leads to, as far as the operating system tells, and pipes, whose other end may be missing.

pathlib raises where the operating system refuses to say: without permission, for names that are too long, ...
"""

from __future__ import annotations

import codecs
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bnprobe.errors import BnprobeError

WAIT = 5.0
"""Seconds to wait for the other end of a named pipe."""

_started: list[Path] = []
"""Working directories of the blocks of ``from_here``."""


@contextmanager
def from_here() -> Iterator[None]:
    """Let ``placed`` lead to where paths lead now, whatever the user's code makes the working directory meanwhile.

    Of nested blocks the outermost counts.
    """
    before = list(_started)
    with suppress(OSError):  # it has been deleted, and no path leads from there
        _started.append(_started[0] if _started else Path.cwd())
    try:
        yield
    finally:
        _started[:] = before


def placed(path: Path) -> Path:
    """A path that the user gave, as seen from the directory in which the command was started."""
    try:
        moved = _started and _started[0] != Path.cwd()
    except OSError:
        moved = True
    return _started[0] / path if _started and moved else path


def short_path(path: Path) -> str:
    """A file as seen from the directory in which the command was started, if it is below it."""
    try:
        here = real(placed(Path()))
    except OSError:  # the working directory has been deleted
        return str(path)
    path = real(path)
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def exists(path: Path) -> bool:
    """Whether something has this path, as far as the operating system tells."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Whether this is a file, as far as the operating system tells."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether this is a folder, as far as the operating system tells."""
    return os.path.isdir(path)  # noqa: PTH112


def is_special(path: Path) -> bool:
    """Whether this is a pipe or device, such as /dev/null, which must be written to but never replaced."""
    return exists(path) and not is_file(path)


def real(path: Path) -> Path:
    """The path with symbolic links followed; of links in a circle as far as they lead."""
    return Path(os.path.realpath(path))


def read_bounded(path: Path, most: int, failed: Callable[[str], BnprobeError]) -> bytes:
    """Read a text that a person or bnprobe has written; a pipe too, if something writes to it.

    Args:
        path: The file.
        most: Bytes that it may have.
        failed: Makes the error of what is wrong, e.g. "is larger than 1 MB".

    Raises:
        OSError: It does not exist, or cannot be opened.
        UnicodeDecodeError: It begins with what is no text in UTF-8.
        BnprobeError: It has too many bytes, or is a pipe that nothing writes to.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that nothing writes to would block for ever
    try:
        content = _first_of_pipe(descriptor, failed) if stat.S_ISFIFO(os.fstat(descriptor).st_mode) else b""
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = content or file.read(min(most + 1, 1 << 16))
            codecs.getincrementaldecoder("utf-8")().decode(content)  # so that a device is not read to the limit
            content += file.read(most + 1 - len(content))
    finally:
        os.close(descriptor)
    if len(content) > most:
        raise failed(f"is larger than {most / 1e6:g} MB")
    return content


def _first_of_pipe(descriptor: int, failed: Callable[[str], BnprobeError]) -> bytes:
    """What comes first out of a pipe; empty if something will write to it but has not done so yet."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        try:
            if content := os.read(descriptor, 1 << 16):
                return content
        except BlockingIOError:
            return b""
        time.sleep(0.02)
    raise failed("is a pipe that nothing writes to")


def write_special(path: Path, data: bytes) -> None:
    """Write to a pipe or device; not to a pipe that nothing reads."""
    if not path.is_fifo():
        path.write_bytes(data)
        return
    descriptor = _opened_pipe(path)
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _opened_pipe(path: Path) -> int:
    end = time.monotonic() + WAIT
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # a pipe that nothing reads would block for ever
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > end:
                raise OSError(errno.ENXIO, "Nothing reads this pipe") from None
        time.sleep(0.02)


def followed(path: Path) -> Path:
    """Where symbolic links lead to.

    Raises:
        OSError: They lead in a circle.
    """
    try:
        return path.resolve()
    except RuntimeError:  # before Python 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
