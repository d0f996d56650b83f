"""What a test imports of a user's is its own: ``model`` of one test's folder is not ``model`` of another's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).parents[2]
_MAIN = "__main__", "__mp_main__"
_SAMPLES = str(_REPOSITORY / "sample_configs")
_NOT_USERS = tuple(map(str, (sys.prefix, sys.base_prefix, _REPOSITORY)))


@contextmanager
def as_in_a_new_process() -> Iterator[None]:
    """While the block runs, no module of a user's is imported; afterwards those are, and ``sys.path`` is, as before."""
    path, others = list(sys.path), _take_out_users_modules()
    try:
        yield
    finally:
        sys.path[:] = path
        _take_out_users_modules()
        sys.modules.update(others)
        importlib.invalidate_caches()  # files of a folder may change within the resolution of their time stamps


def _take_out_users_modules() -> dict[str, Any]:
    """Forget the modules that are no part of Python, of a package or of this repository; those forgotten."""
    unknown = {name: module for name, module in sys.modules.items() if _not_users.get(name) is not module}
    found = {name: module for name, module in unknown.items() if name not in _MAIN and _is_users(module)}
    _not_users.update((name, module) for name, module in unknown.items() if name not in found)
    for name in found:
        del sys.modules[name]
    return found


_not_users: dict[str, Any] = {}
"""Modules that were looked at before: there are thousands."""


def _is_users(module: Any) -> bool:
    """Whether a module was imported from a user's folder (or has no file, as a namespace package of it)."""
    known = getattr(module, "__dict__", {})  # some modules of torch make up the attributes that they lack
    path = known.get("__path__", ())
    path = getattr(path, "_path", path)  # of a namespace package: to iterate over it would look for the package anew
    places = [place for place in (known.get("__file__"), *path) if isinstance(place, str)]
    return any(not place.startswith(_NOT_USERS) or place.startswith(_SAMPLES) for place in places)
