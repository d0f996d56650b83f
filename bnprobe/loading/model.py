"""The user's model: import what a target names, call it, and unwrap what comes out.

``user_code`` marks the border to the user's own code: an exception there becomes an error that shows the user's frames.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnprobe.config.frameworks import framework_named_in
from bnprobe.config.spec import Spec, is_file_target, split_target, why_missing
from bnprobe.distributed import beat
from bnprobe.errors import BnprobeError, EndOfPass, ModelError, UserCodeError, reason_of
from bnprobe.loading import frameworks
from bnprobe.loading.frameworks import Project
from bnprobe.loading.places import recorded_places
from bnprobe.numbers import count, listed
from bnprobe.paths import exists, is_file, is_folder, placed, short_path

BatchFunction = Callable[[nn.Module, Any], Any]
"""A function of the user, called as f(model, batch)."""


@contextmanager
def user_code(
    call: str, passes: Callable[[BaseException], bool] = lambda error: False, hint: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Turn an exception of the user's code into a UserCodeError. bnprobe's own errors and Ctrl-C pass unchanged.

    Args:
        call: What is being called, e.g. ``"calling load_model() of model.py"``.
        passes: Which further exceptions pass unchanged.
        hint: What may help where something is raised, sentences; asked only then.
    """
    beat()
    try:
        yield
    except (BnprobeError, EndOfPass, KeyboardInterrupt):
        raise
    except BaseException as error:  # exit() in a model file must not end bnprobe silently
        if passes(error):
            raise
        raise UserCodeError(call, error, hint()) from error
    finally:
        beat()


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function can be called with a keyword argument of this name."""
    parameters = signature_of(function)
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def signature_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function; empty if Python cannot read its signature."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def kind_of(value: object) -> str:
    """A value's type in words: "None", "a tuple of Net and dict", "the class Net"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, tuple | list) and 0 < len(value) <= 4:
        return f"a {type(value).__name__} of {' and '.join(type(part).__name__ for part in value)}"
    name = type(value).__name__ or "object"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


_ABSENT = object()


def attribute(value: object, name: str, default: Any = None) -> Any:
    """An attribute of an object of the user's; the default where there is none, or where its property raises."""
    try:
        return getattr(value, name, default)
    except Exception:  # whatever a property or a __getattr__ of the user's raises
        return default


def has_attribute(value: object, name: str) -> bool:
    """Whether an object of the user's has an attribute that can be read."""
    return attribute(value, name, _ABSENT) is not _ABSENT


@dataclass(frozen=True)
class UserModule:
    """A Python module of the user, and the user's name for it.

    Attributes:
        module: The executed module.
        name: E.g. "dir/model.py" or "package.module".
        project: What a framework gave for the model in it; None: nothing.
    """

    module: types.ModuleType
    name: str
    project: Project | None = None

    @property
    def digest(self) -> str | None:
        """SHA-256 of the file, to tell whether the code has changed; None without a file."""
        path = Path(self.module.__file__ or "")
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def lines_giving(self, keyword: str) -> list[str]:
        """The lines of the file that give an argument of this name, e.g. ["model.py:17"]."""
        path = Path(self.module.__file__ or "")
        tree = ast.parse(path.read_bytes()) if path.suffix == ".py" and path.is_file() else ast.Module([], [])
        given = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == keyword]
        return [f"{self.name}:{number}" for number in sorted({node.value.lineno for node in given})]

    def get(self, symbol: str) -> Any:
        """Look up a symbol; dotted names reach into classes and objects.

        Raises:
            ModelError: It does not exist; the message lists the functions, classes and models that do.
        """
        value: Any = self.module
        for part in symbol.split("."):
            with user_code(f"looking up {symbol} in {self.name}"):
                found = hasattr(value, part)
            if not found:
                raise ModelError(self._miss(symbol))
            value = getattr(value, part)
        return value

    def find(self, symbol: str) -> Any | None:
        """Look up a symbol; None if it does not exist or is a submodule."""
        with user_code(f"looking up {symbol} in {self.name}"):
            value = getattr(self.module, symbol, None)
        return None if isinstance(value, types.ModuleType) else value

    def contents(self) -> list[str]:
        """The callables and nn.Modules that this module defines, in words."""
        return [
            f"{name} ({_kind(value)})"
            for name, value in vars(self.module).items()
            if not name.startswith("_") and self._is_own(value)
        ]

    def _is_own(self, value: object) -> bool:
        if isinstance(value, nn.Module):
            return True
        home = str(getattr(value, "__module__", ""))
        return callable(value) and f"{home}.".startswith(f"{self.module.__name__}.")

    def _miss(self, symbol: str) -> str:
        contents = self.contents()
        close = difflib.get_close_matches(symbol, [entry.split(" ")[0] for entry in contents], 1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        return f'{self.name} has no "{symbol}".{hint} {describe_contents(self)}'


def describe_contents(module: UserModule) -> str:
    """One sentence on the callables and nn.Modules found in a module."""
    contents = module.contents()
    return f"It defines: {', '.join(contents)}." if contents else "It defines no function, class or model."


def resolve(target: str, near: UserModule | None = None) -> tuple[UserModule, str | None]:
    """Execute the module that a target names; return it and the symbol, if one is named.

    Args:
        target: ``file.py[:symbol]``, ``package.module[:symbol]`` or ``package.module.symbol``.
        near: A module that is already loaded; its file is not executed again.

    Raises:
        ModelError: The file or module does not exist, or has a syntax error.
        UserCodeError: The module raised while it was loaded.
    """
    location, symbol = split_target(target)
    if is_file_target(target):
        return _load_file(location, near), symbol
    if location:
        _refuse_other_files(placed(Path(location)))
    return _import(location, symbol)


def locate(target: str, near: UserModule | None) -> tuple[UserModule, str | None]:
    """Like ``resolve``, where a plain name is a symbol of the module ``near``."""
    if near is not None and target.isidentifier():
        return near, target
    return resolve(target, near)


def _load_file(location: str, near: UserModule | None) -> UserModule:
    path = placed(Path(location))
    if is_folder(path):
        raise ModelError(f"{location} is a folder. Name a Python file in it, e.g. {path / 'model.py'}.")
    if (missing := why_missing(path)) is not None:
        raise ModelError(f"The file {location} {missing}")
    if not is_file(path):
        raise ModelError(f"{location} is a pipe or a device. Name a Python file.")
    _refuse_other_files(path)
    path = Path(os.path.realpath(path))
    if near is not None and getattr(near.module, "__file__", None) == str(path):
        return near
    # As `python model.py` does: files beside it can be imported, now and later by its functions.
    folder = str(path.parent)
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    return UserModule(_execute(path, location), location)


def _refuse_other_files(path: Path) -> None:
    if path.suffix == ".py" or not exists(path):
        return
    if exists(path / "__init__.py"):
        return  # a package of the working directory
    kind = "a folder" if is_folder(path) else "not a Python file"
    raise ModelError(f"{path} is {kind}. Name a Python file (model.py:symbol) or a module (package.module).")


def _execute(path: Path, shown: str) -> types.ModuleType:
    """Execute a file as a registered module, so that its classes can be pickled."""
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ModelError(f"{shown} cannot be loaded as a Python module.")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        with user_code(f"loading {shown}"):
            _run(path, module)
    except BaseException:
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before
        raise
    return module


def _run(path: Path, module: types.ModuleType) -> None:
    # compiled from the source: a cached .pyc may be from another edit within the same second
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ModelError(f"The file {path} could not be read: {reason_of(error)}.") from None
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except SyntaxError as error:
        if error.filename and Path(error.filename).is_file():
            raise ModelError(_syntax_message(error)) from None
        raise


def _syntax_message(error: SyntaxError) -> str:
    line = f": {error.text.strip()}" if error.text else "."
    file = short_path(Path(error.filename or ""))
    where = f"{file}, line {error.lineno}" if error.lineno else file
    return f"Syntax error in {where} ({error.msg}){line}"


def _module_name(path: Path) -> str:
    """The file's stem if ``import stem`` would load this very file, else a unique name.

    Under the stem, spawned loader processes can import the classes, and another file that imports this one gets the
    same module. A module that already has this name must not be overwritten.
    """
    importlib.invalidate_caches()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return path.stem
    if known is None and path.stem.isidentifier():
        found = importlib.util.find_spec(path.stem)
        if found is not None and found.origin == str(path):
            return path.stem
    return f"bnprobe_user_{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def _import(location: str, symbol: str | None) -> tuple[UserModule, str | None]:
    """Import ``package.module``, or ``package`` with the last part as the symbol (as in class_path)."""
    folder = str(placed(Path()).absolute())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    try:
        return UserModule(_import_module(location), location), symbol
    except _MissingModuleError as error:
        parent, _, last = location.rpartition(".")
        if symbol is not None or not parent or error.missing == parent.split(".")[0]:
            raise
        return UserModule(_import_module(parent), parent), last


class _MissingModuleError(ModelError):
    def __init__(self, location: str, missing: str) -> None:
        self.missing = missing
        super().__init__(
            f'There is no module "{missing}" (looked for "{location}" in the working directory and among the '
            "installed packages). Name a file as model.py:symbol, or a module as package.module:symbol."
        )


def _import_module(location: str) -> types.ModuleType:
    if not all(part.isidentifier() for part in location.split(".")):
        raise ModelError(f'"{location}" is not the name of a Python file or module.')
    importlib.invalidate_caches()
    with user_code(f"importing {location}"):
        return _imported(location)


def _imported(location: str) -> types.ModuleType:
    try:
        return importlib.import_module(location)
    except ModuleNotFoundError as error:
        if error.name and (location == error.name or location.startswith(f"{error.name}.")):
            raise _MissingModuleError(location, error.name) from None
        raise  # the module exists; something that it imports does not
    except SyntaxError as error:
        if error.filename and Path(error.filename).is_file():
            raise ModelError(_syntax_message(error)) from None
        raise


def _kind(value: object) -> str:
    if isinstance(value, type):
        return "class"
    return "model" if isinstance(value, nn.Module) else "function"


@dataclass(frozen=True)
class LoadedModel:
    """A model and its origin.

    Attributes:
        model: The user's model, without wrappers.
        name: Its name in messages, e.g. "model.py:load_model" or "timm:resnet18".
        module: Where data, forward, loss and metric are looked up; None for a model library.
        notes: What the reader should know, one sentence each.
        wrapped: The user's code returns it in a wrapper, so that its weights have other keys there.
        parameters_alone: Layers lack their running statistics in its checkpoint.
        averaged: Why its weights are taken to be an average, and that averaged weights are in the same file but were
            not used, clauses; None where nothing says so.
        undone: By name of a layer that is plain BN, what its checkpoint shows it to be converted to.
        taken: What a framework's project gave, by role: ``{"loss": "training_step of lit.py:LitNet"}``.
    """

    model: nn.Module
    name: str
    module: UserModule | None
    notes: tuple[str, ...] = ()
    wrapped: bool = False
    parameters_alone: bool = False
    averaged: tuple[str | None, str | None] = (None, None)
    undone: Mapping[str, str] = field(default_factory=dict)
    taken: Mapping[str, str] = field(default_factory=dict)


def load_model(spec: Spec) -> LoadedModel:
    """Load the model that a target names.

    A target with the prefix of a framework names a project of it. Else the first of these that exists: the named
    symbol; ``load_model()``; ``model``. A symbol is an nn.Module, a function or class that is called with the spec's
    ``args`` and returns one, or a project of a framework.

    Raises:
        ModelError: The target does not lead to an nn.Module.
        UserCodeError: The user's code raised.
    """
    with recorded_places():
        return _load_model(spec)


def _load_model(spec: Spec) -> LoadedModel:
    target, args = spec.model.target, spec.model.args
    framework = framework_named_in(target)
    if framework is not None:
        named = frameworks.reader_of(framework).named(target.partition(":")[2], spec)
        return _of_project(named, target, None)
    module, symbol = resolve(target)
    symbol = symbol or _default_symbol(module)
    name, value = f"{module.name}:{symbol}", module.get(symbol)
    reader = frameworks.claiming(value)
    if reader is not None and not isinstance(value, nn.Module):
        return _of_project(reader.project(value, name, spec), name, module)
    loaded = _loaded(_build(value, name, args), name, module)
    reader = frameworks.claiming(loaded.model)
    if reader is None:
        return loaded
    made = _of_project(reader.project(loaded.model, name, spec), name, module)
    return replace(made, notes=(*loaded.notes, *made.notes), wrapped=loaded.wrapped)


def _of_project(project: Project, name: str, module: UserModule | None) -> LoadedModel:
    """The model of a framework's project, and a module that has its functions beside those of the user's module."""
    loaded = _loaded(project.model, name, module)
    if project.functions:
        merged = frameworks.beside(project.functions, module.module if module else None, name)
        loaded = replace(loaded, module=UserModule(merged, module.name if module else name, project))
    return replace(loaded, notes=(*loaded.notes, *project.notes), taken=project.taken)


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


def require_values(model: nn.Module) -> None:
    """Refuse a model of which parameters or buffers have no values (device meta): it cannot be run.

    Raises:
        ModelError: Names the first of them.
        UserCodeError: They cannot be listed, e.g. for a module of a class without a hash.
    """
    with user_code("listing the parameters and buffers of the model"):
        named = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in named if tensor.is_meta]
    if empty:
        raise ModelError(
            f"{count(len(empty), 'tensor')} of the model without values (device meta): {listed(empty)}. Build it on a"
            " real device, or call model.to_empty(device=...) and load its weights in load_model()."
        )


def require_state(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be saved, before they are made.

    Raises:
        UserCodeError: Its state_dict() raises.
    """
    with user_code("calling state_dict() of the model"):
        model.state_dict()


def unwrapped(model: nn.Module) -> tuple[nn.Module, str | None]:
    """Remove the wrappers of DataParallel, DistributedDataParallel and torch.compile; also a sentence that says so."""
    wrappers = []
    while (inner := _inner(model)) is not None:
        wrappers.append(type(model).__name__)
        model = inner
    if not wrappers:
        return model, None
    return model, f"The model was wrapped in {' in '.join(reversed(wrappers))}; the module inside it is used."


def _loaded(model: nn.Module, name: str, module: UserModule | None) -> LoadedModel:
    inner, note = unwrapped(model)
    return LoadedModel(inner, name, module, (note,) if note else (), wrapped=note is not None)


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _as_module(model.module)
    if "torch._dynamo" in sys.modules and isinstance(model, torch._dynamo.OptimizedModule):
        return _as_module(model._orig_mod)
    return None


def _as_module(value: object) -> nn.Module | None:
    return value if isinstance(value, nn.Module) else None
