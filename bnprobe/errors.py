"""All exceptions that bnprobe raises on purpose.

    BnprobeError                exit 2 unless said otherwise
    |- UsageError               an option or argument that cannot work
    |- SpecError                the spec file: unknown key, wrong type, bad YAML
    |- ModelError               the model file, module or symbol
    |- CheckpointError          the weights file
    |- DataError                the loader, the data set or a batch
    |- UserCodeError            an exception in the user's own code
    |- NonFiniteError           NaN or Inf in inputs, buffers or activations
    |- DeviceError              a device that does not exist, or out of memory at one micro-batch
    |- OutputError              a report that could not be written
    |- RepairError              a layer or model that cannot be converted, recalibrated or exported
    |- StateError               a state to resume from that belongs to another run, or is damaged
    |- ProcessError             another process of a torchrun launch failed or cannot be reached
    |- StoppedError             training that was told to stop, and saved its state: exit 3
    `- NothingToProbeError      no BN layer, or none was called: exit 3

A message is one or more complete sentences for the user: what was found, where (file, line, layer, key)
and what to do.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnprobe.records import Report

EXIT_CLEAN = 0
EXIT_FINDINGS = 1
EXIT_ERROR = 2
EXIT_NOTHING = 3

_PACKAGE_FOLDERS = frozenset({"site-packages", "dist-packages"})
"""Where packages are installed, also those of the user's home and of other environments on the path."""


class BnprobeError(Exception):
    """Base of all errors that bnprobe raises on purpose.

    Attributes:
        report: What a scan had measured before the error, marked partial; None if nothing.
    """

    exit_code = EXIT_ERROR
    report: Report | None = None


class UsageError(BnprobeError):
    """An option or argument that is wrong."""


class SpecError(BnprobeError):
    """The spec file is wrong: an unknown key, a wrong type, a bad YAML line."""


class ModelError(BnprobeError):
    """The model file, module or symbol does not give a model."""


class CheckpointError(BnprobeError):
    """The weights file could not be read, or does not fit the model."""


class DataError(BnprobeError):
    """The loader, the data set or a batch cannot be used."""


class UserCodeError(BnprobeError):
    """An exception in the user's own code.

    Args:
        call: What bnprobe was doing, e.g. ``"calling load_model() of model.py"``.
        error: The exception that the user's code raised.
        hint: What may help, sentences.
    """

    def __init__(self, call: str, error: BaseException, hint: str = "") -> None:
        self.call = call
        self.error = error
        said = f"{type(error).__name__} while {call}: {message_of(error)}".rstrip(": ")
        super().__init__(f"{said}\n{hint}" if hint else said)

    @property
    def frames(self) -> str:
        """The user's own frames of the traceback, without those of Python, torch and bnprobe."""
        return "".join(traceback.format_list(_user_frames(self.error)))


class NonFiniteError(BnprobeError):
    """NaN or Inf in inputs, buffers or activations."""


class DeviceError(BnprobeError):
    """A device that does not exist, or that has too little memory for one micro-batch."""


class OutputError(BnprobeError):
    """A report that could not be written."""


class RepairError(BnprobeError):
    """A layer or model that cannot be converted, recalibrated or exported; the message says which one and why."""


class StateError(BnprobeError):
    """A saved state of training that belongs to another run, or is damaged."""


class ProcessError(BnprobeError):
    """Another process of a torchrun launch failed, or cannot be reached.

    Args:
        message: The message of that process, or what is known about the failure.
        exit_code: Exit code of the launch: that of the process that failed.
        frames: The user's frames of the traceback in that process.
    """

    def __init__(self, message: str, exit_code: int = EXIT_ERROR, frames: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.frames = frames


class StoppedError(BnprobeError):
    """Training was stopped by Ctrl-C or SIGTERM and saved its state; there is no result yet."""

    exit_code = EXIT_NOTHING


class NothingToProbeError(BnprobeError):
    """The model has no BN layer, or none was called."""

    exit_code = EXIT_NOTHING


class EndOfPass(BaseException):
    """Ends a forward pass of the user's model early. It is not an Exception, so that the model does not catch it."""


def message_of(error: BaseException) -> str:
    """What an exception says of itself; an exception of the user's may fail even in that, and then says nothing."""
    try:
        return str(error)
    except KeyboardInterrupt:
        raise
    except BaseException:  # its own __str__, which may even call exit()
        return ""


def first_line_of(error: BaseException) -> str:
    """The first line of what an exception says; of one that says nothing the name of its class."""
    return next((line.strip() for line in message_of(error).splitlines() if line.strip()), type(error).__name__)


def reason_of(error: OSError | ValueError) -> str:
    """Why the operating system refused something, in its own words, e.g. "Permission denied"."""
    return getattr(error, "strerror", None) or message_of(error) or type(error).__name__


def _user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not is_library_file(frame.filename)]


def place_in_user_code(error: BaseException) -> str:
    """The innermost line of the user's code that an exception came from, e.g. "lit.py:31"; "" if there is none."""
    frames = _user_frames(error)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


@functools.lru_cache(maxsize=4096)
def is_library_file(filename: str) -> bool:
    """Whether a file belongs to Python, an installed package or bnprobe, rather than to the user."""
    if filename.startswith("<"):
        return True
    try:
        path = Path(os.path.realpath(filename))
    except (OSError, ValueError):  # code that was compiled under a name that no file can have
        return False
    return not _PACKAGE_FOLDERS.isdisjoint(path.parts) or any(path.is_relative_to(root) for root in _library_roots())


@functools.cache
def _library_roots() -> tuple[str, ...]:
    """The folders of Python, of packages and of bnprobe."""
    import sysconfig  # reads all that Python was built with: not for a command that meets no code of the user's

    paths = {
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        sysconfig.get_path("scripts"),  # commands of packages, such as bnprobe and pytest, from which all is called
        sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user")),
        str(Path(__file__).parent),
    }
    return tuple(str(Path(path).resolve()) for path in paths)


def warn_user(message: str) -> None:
    """Warn, with the line of the user's code that is running: below it are torch, a framework and bnprobe."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and is_library_file(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
