"""Where the user's code builds each module: the file and line are recorded while the model is loaded."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from bnprobe.errors import is_library_file

_Place = tuple[Path, int]

_BUILT: dict[int, tuple[weakref.ref[nn.Module], _Place]] = {}
"""By the id of a module, for as long as it lives. A class of the user's need not be hashable while it is built."""


@contextmanager
def recorded_places() -> Iterator[None]:
    """Record for every module that is built in the block where the user's code calls its class."""
    original, recording = nn.Module.__init__, True

    @functools.wraps(original)
    def record(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        place = _caller(self, sys._getframe(1)) if recording else None
        if place is not None:
            key = id(self)
            _BUILT[key] = weakref.ref(self, lambda _: _BUILT.pop(key, None)), place

    nn.Module.__init__ = record  # type: ignore[method-assign]
    try:
        yield
    finally:
        recording = False  # for classes that took the function over
        if nn.Module.__init__ is record:  # else the user's code has put its own in its place, which stays
            nn.Module.__init__ = original  # type: ignore[method-assign]


def built_at(module: nn.Module) -> tuple[Path, int] | None:
    """The file and line where a module was built; None where that was not recorded, as of a copy or a pickle."""
    found = _BUILT.get(id(module))
    return found[1] if found is not None and found[0]() is module else None


def _caller(module: nn.Module, frame: FrameType | None) -> _Place | None:
    """The innermost line of the user's that is not part of the module's own constructors."""
    while frame is not None:
        code = frame.f_code
        # Looked at in constructors only: it would keep what other functions have let go of.
        own = code.co_name == "__init__" and code.co_argcount > 0 and frame.f_locals.get(code.co_varnames[0]) is module
        if not own and not is_library_file(code.co_filename):
            return Path(code.co_filename), frame.f_lineno
        frame = frame.f_back
    return None
