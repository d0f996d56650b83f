"""Models of a library by their names, for the readers of the libraries."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from bnprobe.errors import ModelError
from bnprobe.loading.model import kind_of, user_code


def library(module: str, extra: str = "") -> Any:
    """A module of a package that need not be installed.

    Args:
        module: Its name.
        extra: The extra of bnprobe that installs it; "": the package has that name.

    Raises:
        ModelError: The package is not installed; says how to install it.
    """
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ModelError(f'{package} is not installed. Run: pip install "bnprobe[{extra or package}]".')
    with user_code(f"importing {module}"):
        return importlib.import_module(module)


def model_of(name: str, known: Sequence[str], make: Callable[[], object], library: str) -> nn.Module:
    """A model of a library by its name.

    Raises:
        ModelError: The library has no model of that name.
    """
    # timm names may have a weights tag (resnet50.a1_in1k) or a hub address; neither is listed
    if ":" not in name and name.lower().split(".")[0] not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"The nearest names are {', '.join(close)}." if close else "See its list of models."
        raise ModelError(f'{library} has no model "{name}". {hint}')
    with user_code(f"making {library}:{name}"):
        made = make()
    if not isinstance(made, nn.Module):
        raise ModelError(f"{library}:{name} is {kind_of(made)}, not an nn.Module.")
    return made
