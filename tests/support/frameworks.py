"""Import the libraries of the dependency group "frameworks", or skip what needs them where they are not installed."""

from __future__ import annotations

import importlib.util
import warnings
from types import ModuleType

import pytest

from support import torchvision_operators


def framework(name: str) -> ModuleType:
    """A module of a library, which is imported without its warnings; skips the test or file where it is missing."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        reason = f"{name.split('.')[0]} is not installed (pip install --group frameworks)"
        pytest.skip(reason, allow_module_level=True)
    torchvision_operators.provide()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
