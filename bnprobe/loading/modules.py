"""Resolve targets to Python modules and symbols in them: ``model.py:Net``, ``package.module:Net``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bnprobe.errors import ModelError
from bnprobe.targets import is_file_target, nearest_file, split_target
from bnprobe.usercode import user_code


@dataclass(frozen=True)
class UserModule:
    """A Python module of the user, and the user's name for it.

    Attributes:
        module: The executed module.
        name: E.g. "dir/model.py" or "package.module".
    """

    module: types.ModuleType
    name: str

    @property
    def digest(self) -> str | None:
        """SHA-256 of the file, to tell whether the code has changed; None without a file."""
        path = Path(self.module.__file__ or "")
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

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
        _refuse_other_files(Path(location))
    return _import(location, symbol)


def locate(target: str, near: UserModule | None) -> tuple[UserModule, str | None]:
    """Like ``resolve``, where a plain name is a symbol of the module ``near``."""
    if near is not None and target.isidentifier():
        return near, target
    return resolve(target, near)


def _load_file(location: str, near: UserModule | None) -> UserModule:
    path = Path(location)
    if path.is_dir():
        raise ModelError(f"{location} is a folder. Name a Python file in it, e.g. {path / 'model.py'}.")
    if not path.is_file():
        raise ModelError(f"The file {location} does not exist. {nearest_file(path)}")
    _refuse_other_files(path)
    path = path.resolve()
    if near is not None and getattr(near.module, "__file__", None) == str(path):
        return near
    _put_first_on_path(path.parent)
    return UserModule(_execute(path, location), location)


def _refuse_other_files(path: Path) -> None:
    if path.suffix == ".py" or not path.exists():
        return
    if path.is_dir() and (path / "__init__.py").exists():
        return  # a package of the working directory
    kind = "a folder" if path.is_dir() else "not a Python file"
    raise ModelError(f"{path} is {kind}. Name a Python file (model.py:symbol) or a module (package.module).")


def _put_first_on_path(folder: Path) -> None:
    """As ``python model.py`` does: files beside it can be imported, now and later by its functions."""
    entry = str(folder)
    if entry in sys.path:
        sys.path.remove(entry)
    sys.path.insert(0, entry)


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
        _restore(name, before)
        raise
    return module


def _run(path: Path, module: types.ModuleType) -> None:
    # compiled from the source: a cached .pyc may be from another edit within the same second
    try:
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
    except SyntaxError as error:
        if error.filename and Path(error.filename).is_file():
            raise ModelError(_syntax_message(error)) from None
        raise


def _syntax_message(error: SyntaxError) -> str:
    line = f": {error.text.strip()}" if error.text else "."
    where = f"{_short(error.filename)}, line {error.lineno}" if error.lineno else _short(error.filename)
    return f"Syntax error in {where} ({error.msg}){line}"


def _short(filename: str | None) -> str:
    path = Path(filename or "")
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _restore(name: str, before: types.ModuleType | None) -> None:
    if before is None:
        sys.modules.pop(name, None)
    else:
        sys.modules[name] = before


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
    return f"bnprobe_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _import(location: str, symbol: str | None) -> tuple[UserModule, str | None]:
    """Import ``package.module``, or ``package`` with the last part as the symbol (as in class_path)."""
    _put_cwd_on_path()
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


def _put_cwd_on_path() -> None:
    entry = str(Path.cwd())
    if entry not in sys.path and "" not in sys.path:
        sys.path.insert(0, entry)


def _kind(value: object) -> str:
    if isinstance(value, type):
        return "class"
    return "model" if isinstance(value, nn.Module) else "function"
