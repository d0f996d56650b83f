"""Load the nn.Module that a model target names, and unwrap it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bnprobe.errors import ModelError
from bnprobe.loading.inspection import kind_of
from bnprobe.loading.modules import UserModule, describe_contents, resolve
from bnprobe.spec import ModelSpec
from bnprobe.usercode import user_code

WRAPPED = "The model was wrapped in"
"""How the note on an unwrapped model begins."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and its origin.

    Attributes:
        model: The user's model, without wrappers.
        name: Its name in messages, e.g. "model.py:load_model" or "timm:resnet18".
        module: Where data, forward, loss and metric are looked up; None for a model library.
        notes: What the reader should know, one sentence each.
    """

    model: nn.Module
    name: str
    module: UserModule | None
    notes: tuple[str, ...] = ()


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load the model that a target names.

    The first of these that exists: the named symbol; ``load_model()``; ``model``. A symbol is an nn.Module, or a
    function or class that is called with the spec's ``args`` and returns one.

    Raises:
        ModelError: The target does not lead to an nn.Module.
        UserCodeError: The user's code raised.
    """
    library, _, name = spec.target.partition(":")
    if library in _LIBRARIES and name:
        return _loaded(_LIBRARIES[library](name, spec.args), spec.target, None)
    module, symbol = resolve(spec.target)
    symbol = symbol or _default_symbol(module)
    name = f"{module.name}:{symbol}"
    return _loaded(_build(module.get(symbol), name, spec.args), name, module)


def _default_symbol(module: UserModule) -> str:
    for symbol in ("load_model", "model"):
        if module.find(symbol) is not None:
            return symbol
    raise ModelError(
        f"{module.name} has neither load_model() nor model. {describe_contents(module)} "
        f"Name one of them as {module.name}:NAME, or add load_model()."
    )


def _build(value: object, name: str, args: dict[str, Any]) -> nn.Module:
    if isinstance(value, nn.Module):
        if args:
            raise ModelError(f"{name} is already a model, so model.args ({', '.join(args)}) cannot be used.")
        return value
    if not callable(value):
        raise ModelError(f"{name} is {kind_of(value)}, not an nn.Module or a function or class that returns one.")
    with user_code(f"calling {name}({', '.join(args)})"):
        made = value(**args)
    if not isinstance(made, nn.Module):
        raise ModelError(f"{name} returned {kind_of(made)}, not an nn.Module. Return only the model.")
    return made


def _from_timm(name: str, args: dict[str, Any]) -> nn.Module:
    timm = _library("timm")
    return _from_library("timm", name, timm.list_models(), lambda: timm.create_model(name, **args))


def _from_torchvision(name: str, args: dict[str, Any]) -> nn.Module:
    models = _library("torchvision.models")
    return _from_library("torchvision", name, models.list_models(), lambda: models.get_model(name, **args))


_LIBRARIES: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
}


def _library(module: str) -> Any:
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{package} is not installed. Run: pip install {package}.")
    with user_code(f"importing {module}"):
        return importlib.import_module(module)


def _from_library(library: str, name: str, known: list[str], make: Callable[[], object]) -> nn.Module:
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


def unwrapped(model: nn.Module) -> tuple[nn.Module, str | None]:
    """Remove the wrappers of DataParallel, DistributedDataParallel and torch.compile; also a sentence that says so."""
    wrappers = []
    while (inner := _inner(model)) is not None:
        wrappers.append(type(model).__name__)
        model = inner
    if not wrappers:
        return model, None
    return model, f"{WRAPPED} {' in '.join(reversed(wrappers))}; the module inside it is used."


def _loaded(model: nn.Module, name: str, module: UserModule | None) -> LoadedModel:
    inner, note = unwrapped(model)
    return LoadedModel(inner, name, module, (note,) if note else ())


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _as_module(model.module)
    if "torch._dynamo" in sys.modules and isinstance(model, torch._dynamo.OptimizedModule):
        return _as_module(model._orig_mod)
    return None


def _as_module(value: object) -> nn.Module | None:
    return value if isinstance(value, nn.Module) else None
