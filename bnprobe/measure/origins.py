"""Where in the user's code a layer is built: as recorded, or by reading that code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from torch import nn

from bnprobe.errors import is_library_file
from bnprobe.loading.places import built_at
from bnprobe.paths import short_path
from bnprobe.records import ROOT

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by all their names."""
    return dict(model.named_modules(remove_duplicate=False))


def origin(names: Mapping[str, nn.Module], name: str) -> str | None:
    """File and line where the module of this name was built, e.g. "model.py:28"; None if Python cannot tell.

    Where that was not recorded, it is the line where it is assigned, by the source of the class that holds it.

    Args:
        names: The model's modules, see ``by_name``.
        name: Qualified name; ``ROOT`` is assigned nowhere.
    """
    name = "" if name == ROOT else owner_of(name, names)
    built = built_at(names[name]) if name in names else None
    if built is not None:
        return f"{short_path(built[0])}:{built[1]}"
    parts = name.split(".") if name in names and name else []  # those that plain containers hold have no assignment
    for depth in range(len(parts) - 1, -1, -1):
        parent, child = (names[".".join(parts[:end])] for end in (depth, depth + 1))
        found = _assignment(type(parent), parts[depth], type(child).__name__)
        if found is not None:
            path, value = found
            return f"{short_path(path)}:{_entry(value, parts[depth + 1 :]).lineno}"
    return None


def owner_of(name: str, modules: Collection[str]) -> str:
    """The module of a layer: of a layer ``norm[1]``, one row of the statistics of a module, that is ``norm``."""
    owner = name.rpartition("[")[0]
    return owner if name not in modules and owner in modules else name


def _assignment(owner: type, attribute: str, kind: str) -> tuple[Path, ast.expr] | None:
    """The value that ``self.attribute`` is given in a class of the user's, and the file."""
    for base in owner.__mro__:
        path = _source(base)
        if path is None:
            continue
        given = _assignments(path, path.stat().st_mtime_ns, base.__qualname__)
        values = [value for name, value in given if name == attribute]
        if values:
            fitting = [value for value in values if isinstance(value, ast.Call) and _called(value) == kind]
            return path, (fitting or values)[0]
    return None


def _source(kind: type) -> Path | None:
    """The user's file that defines a class."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None or is_library_file(file) or not Path(file).is_file():
        return None
    return Path(file)


@lru_cache(maxsize=256)
def _assignments(path: Path, modified_ns: int, qualname: str) -> tuple[tuple[str, ast.expr], ...]:
    """Attribute and value of every assignment to ``self`` in a class; a new ``modified_ns`` reads it again."""
    tree = _parsed(path, modified_ns)
    definition = None if tree is None else _find(tree, [part for part in qualname.split(".") if part != "<locals>"])
    return () if definition is None else tuple(_self_assignments(definition))


@lru_cache(maxsize=64)
def _parsed(path: Path, modified_ns: int) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # edited since it was loaded


def _find(tree: ast.AST, names: Sequence[str]) -> ast.AST | None:
    """The definition of a dotted name, in whatever blocks it stands."""
    if not names:
        return tree
    for node in ast.walk(tree):
        if node is not tree and isinstance(node, _Definition) and node.name == names[0]:
            found = _find(node, names[1:])
            if found is not None:
                return found
    return None


def _self_assignments(definition: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(definition):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from _targets(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield from _targets(node.target, node.value)
        elif isinstance(node, ast.Call) and _called(node) in ("add_module", "register_module"):
            yield from _added(node)


def _targets(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
        yield target.attr, value
    elif isinstance(target, ast.Tuple | ast.List):
        values = value.elts if isinstance(value, ast.Tuple | ast.List) else [value] * len(target.elts)
        for one, its_value in zip(target.elts, values, strict=False):
            yield from _targets(one, its_value)


def _added(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """``self.add_module("name", module)``."""
    if len(call.args) == 2 and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str):
        yield call.args[0].value, call.args[1]


def _entry(value: ast.expr, path: Sequence[str]) -> ast.expr:
    """The entry of a container that is written out in ``value``; the container where it is not."""
    for part in path:
        inner = _item(value, part)
        if inner is None:
            return value
        value = inner
    return value


def _item(value: ast.expr, name: str) -> ast.expr | None:
    """Item ``name`` of ``nn.Sequential(a, b)``, ``nn.ModuleList([a, b])``, or a dictionary of modules."""
    if not isinstance(value, ast.Call) or not value.args:
        return None
    first = value.args[0]
    if isinstance(first, ast.Dict):
        named = zip(first.keys, first.values, strict=True)
        return next((item for key, item in named if isinstance(key, ast.Constant) and key.value == name), None)
    items = first.elts if isinstance(first, ast.List | ast.Tuple) else value.args
    if _called(value) not in ("Sequential", "ModuleList") or not name.isdecimal():
        return None
    before = items[: int(name) + 1]
    return before[-1] if len(before) > int(name) and not any(isinstance(one, ast.Starred) for one in before) else None


def _called(call: ast.Call) -> str | None:
    """The last name of what is called: "Sequential" for ``nn.Sequential(...)``."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else None
