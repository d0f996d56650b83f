"""A static look at a user's file before it is executed: would it train for hours, or parse arguments, when imported?
And at those beside it: which classes do they define?

Only what runs on import counts: not the bodies of functions, nor what stands under ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bnprobe.errors import is_library_file
from bnprobe.paths import short_path

_TRAINER = re.compile(r"trainer|learn", re.IGNORECASE)
"""Names of objects whose fit() or train() is a training run: a scaler has a fit() too."""

_FITS = frozenset(("fit", "train", "fit_one_cycle", "fine_tune"))
_OPTIMIZER = re.compile(r"opt(im(izer)?)?s?(_\w+)?$", re.IGNORECASE)
_EPOCH = re.compile(r"(train|fit)(_\w+)?$")
"""Names of imported functions that, called in a loop, train."""

_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


@dataclass(frozen=True)
class Import:
    """What a file does when it is imported.

    Attributes:
        trains: How it trains, a clause: "the loop in line 41 calls backward()"; None if it does not.
        parses: The line that parses arguments; None if none does.
    """

    trains: str | None
    parses: int | None


def look_at(source: bytes) -> Import:
    """What importing a file does, as far as its text shows.

    Raises:
        SyntaxError, ValueError: It is no Python.
    """
    body = ast.parse(source).body
    functions = {each.name: each for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
    top = [each for each in body if not isinstance(each, _DEFINITIONS)]
    return Import(_Training(functions).at(top), next(_parsing(top), None))


_FILES = 200
"""Files that are looked through for a class."""


def classes_near(file: Path, base: str) -> Iterator[str]:
    """The classes in the files of a file's folder, and of the folders in it, with a base of such a name.

    Args:
        file: A file of the user's.
        base: A pattern for the last part of the base's name.

    Returns:
        Targets, e.g. "data.py:Digits".
    """
    files = [] if is_library_file(str(file)) else sorted([*file.parent.glob("*.py"), *file.parent.glob("*/*.py")])
    for path in files[:_FILES]:
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and any(re.fullmatch(base, _name(each)) for each in node.bases):
                yield f"{short_path(path)}:{node.name}"


def _parsing(body: list[ast.stmt]) -> Iterator[int]:
    for node, _ in _running(body):
        if isinstance(node, ast.Call) and _name(node.func) in ("parse_args", "parse_args_into_dataclasses"):
            given = node.args or any(each.arg == "args" for each in node.keywords)
            if not given:
                yield node.lineno


class _Training:
    """Finds the statement that trains: in a loop, by a Trainer, or by a function of the file that does either."""

    def __init__(self, functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef]) -> None:
        self._functions = functions
        self._known: dict[str, str | None] = {}

    def at(self, body: list[ast.stmt]) -> str | None:
        """How statements train, a clause with the line; None if they do not."""
        for node, loop in _running(body):
            if isinstance(node, ast.Call) and (what := self._call(node, loop)) is not None:
                return what
        return None

    def _call(self, call: ast.Call, loop: ast.stmt | None) -> str | None:
        name, line = _name(call.func), call.lineno
        if isinstance(call.func, ast.Attribute):
            owner = _name(call.func.value)
            if name in _FITS and _TRAINER.search(owner):
                return f"line {line} calls {owner}.{name}()"
            steps = name == "backward" or (name == "step" and _OPTIMIZER.search(owner))
            return f"the loop in line {loop.lineno} calls {name}()" if steps and loop else None
        if name in self._functions:
            inside = self._in_function(name)
            if inside is None and loop and self._steps(name):
                return f"the loop in line {loop.lineno} calls {name}(), which calls backward()"
            return None if inside is None else f"line {line} calls {name}(), and in it {inside}"
        return f"the loop in line {loop.lineno} calls {name}()" if loop and _EPOCH.match(name) else None

    def _in_function(self, name: str) -> str | None:
        if name not in self._known:
            self._known[name] = None  # one that calls itself
            self._known[name] = self.at(self._functions[name].body)
        return self._known[name]

    def _steps(self, name: str) -> bool:
        calls = (node for node, _ in _running(self._functions[name].body) if isinstance(node, ast.Call))
        return any(isinstance(each.func, ast.Attribute) and _name(each.func) == "backward" for each in calls)


def _running(body: list[ast.stmt], loop: ast.stmt | None = None) -> Iterator[tuple[ast.AST, ast.stmt | None]]:
    """The nodes that run when statements do, each with the outermost loop around it."""
    for statement in body:
        yield from _within(statement, loop)


def _within(node: ast.AST, loop: ast.stmt | None) -> Iterator[tuple[ast.AST, ast.stmt | None]]:
    if isinstance(node, _DEFINITIONS):
        return
    yield node, loop
    children: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and _is_main_guard(node.test):
        children = list(node.orelse)
    if isinstance(node, _LOOPS):
        loop = loop or node
    for child in children:
        yield from _within(child, loop)


def _is_main_guard(test: ast.expr) -> bool:
    """Whether a condition is ``__name__ == "__main__"``, alone or with others."""
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    return "__name__" in names


def _name(node: ast.expr) -> str:
    """The last name of an expression: of ``a.b`` and ``a.b(...)`` "b"."""
    if isinstance(node, ast.Call):
        return _name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
