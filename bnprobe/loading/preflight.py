"""What a spec names is looked up before any of the user's code runs, and all that is not there is said at once.

Files are read, not executed: their top level says which names they define, and what their functions need. Where that
cannot be told (names that are made while the code runs, modules that are not files), nothing is said.
"""

from __future__ import annotations

import ast
import symtable
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnprobe.config.spec import Spec, is_file_target, split_target, why_missing
from bnprobe.errors import BnprobeError, CheckpointError, DataError, ModelError
from bnprobe.numbers import count, listed
from bnprobe.paths import is_file, placed
from bnprobe.wording import nearest

_DYNAMIC = frozenset(("globals", "vars", "locals", "exec", "eval", "setattr", "__getattr__"))
"""With one of these names a file may define what its top level does not show."""

_CONTENTS = " It defines"

_LARGEST = 10_000_000
"""Bytes of a file that is read."""


@dataclass(frozen=True)
class _File:
    """A Python file of the user, read and not executed.

    Attributes:
        name: As the user wrote it.
        names: What its top level defines; None: that cannot be told.
        defined: The functions and classes of its top level, by name.
    """

    name: str
    names: frozenset[str] | None
    defined: Mapping[str, ast.FunctionDef | ast.ClassDef]

    def missing(self, symbol: str) -> str | None:
        """That there is no such symbol, and the nearest; None if there may be."""
        if self.names is None or symbol.partition(".")[0] in self.names:
            return None
        found = [
            f"{name} ({'class' if isinstance(node, ast.ClassDef) else 'function'})"
            for name, node in self.defined.items()
            if not name.startswith("_")
        ]
        near = nearest(symbol, sorted(self.names))
        hint = f' Did you mean "{near}"?' if near else ""
        contents = f"{_CONTENTS}: {', '.join(found)}." if found else f"{_CONTENTS} no function, class or model."
        return f'{self.name} has no "{symbol}".{hint}{contents}'


def check(spec: Spec) -> None:
    """Look up what the spec names.

    Raises:
        ModelError: Files, symbols or arguments are not there: a line for each, with the nearest that is.
        CheckpointError: The checkpoint alone is not there.
        DataError: A file of tensors alone is not there.
    """
    files = list(_of_files(spec))
    problems = list(dict.fromkeys([*_problems(spec), *map(str, files)]))
    if len(problems) == 1:
        raise files[0] if files else ModelError(problems[0])
    if problems:
        lines = (f"  {number}. {_short(problem)}" for number, problem in enumerate(problems, start=1))
        raise ModelError("\n".join([f"{count(len(problems), 'thing')} cannot be found; nothing was run:", *lines]))


def _short(problem: str) -> str:
    """Without all that a file defines, where the nearest is named."""
    return problem.partition(_CONTENTS)[0] if "Did you mean" in problem else problem


def _problems(spec: Spec) -> Iterator[str]:
    model, problem = _read(spec.model.target)
    if problem:
        yield problem
    elif model is not None:
        yield from _of_model(spec, model)
    for role, target, args in (
        ("data", spec.data.target, spec.data.args),
        ("eval_data", spec.eval_data.target, spec.eval_data.args),
        ("forward", spec.forward, None),
        ("loss", spec.loss, None),
        ("metric", spec.metric, None),
    ):
        if target is not None:
            yield from _of_target(role, target, args, model)


def _of_files(spec: Spec) -> Iterator[BnprobeError]:
    """Files of weights and of tensors that are not there."""
    for name, words, error in (
        (spec.checkpoint.path, "The checkpoint {}", CheckpointError),
        (spec.data.tensors, "The file {} (data.tensors)", DataError),
        (spec.eval_data.tensors, "The file {} (eval_data.tensors)", DataError),
    ):
        if name is not None and (why := why_missing(placed(Path(name)))) is not None:
            yield error(f"{words.format(Path(name))} {why}")


def _of_model(spec: Spec, file: _File) -> Iterator[str]:
    _, symbol = split_target(spec.model.target)
    if symbol is None:
        symbol = next((name for name in ("load_model", "model") if name in (file.names or ())), None)
    if symbol is None:
        return  # what else may be the model, loading knows
    if missing := file.missing(symbol):
        yield missing
    elif isinstance(function := file.defined.get(symbol), ast.FunctionDef):
        yield from _arguments(f"{file.name}:{symbol}", function, spec.model.args, "model.args")


def _of_target(role: str, target: str, args: Mapping[str, Any] | None, model: _File | None) -> Iterator[str]:
    if target.isidentifier():
        file, symbol = model, target
    else:
        file, problem = _read(target)
        symbol = split_target(target)[1] or ""
        if problem:
            yield problem
    if file is None or not symbol:
        return
    if missing := file.missing(symbol):
        yield f"{role}: {missing}"
    elif args and isinstance(function := file.defined.get(symbol), ast.FunctionDef):
        yield from _unknown(f"{symbol} of {file.name}", function, args, f"{role}.args")


def _arguments(name: str, function: ast.FunctionDef, args: Mapping[str, Any], key: str) -> Iterator[str]:
    """Arguments that a function lacks, and those that it does not know."""
    yield from _unknown(name, function, args, key)
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    required = positional[: len(positional) - len(given.defaults)]
    required += [each for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
    lacking = [each.arg for each in required if each.arg not in args]
    if lacking and not function.decorator_list:
        options = " ".join(f"--model-arg {each}=..." for each in lacking)
        yield f"{name} needs {listed(lacking)}: give {key}, or {options}."


def _unknown(name: str, function: ast.FunctionDef, args: Mapping[str, Any], key: str) -> Iterator[str]:
    given = function.args
    known = [each.arg for each in (*given.args, *given.kwonlyargs)]
    if given.kwarg is not None or function.decorator_list:
        return
    for each in args:
        if each not in known:
            near = nearest(each, known)
            hint = f'; the nearest is "{near}"' if near else f" ({', '.join(known) or 'it has none'})"
            yield f'{name} has no argument "{each}" ({key}){hint}.'


def _read(target: str) -> tuple[_File | None, str | None]:
    """The file that a target names, or why it is not there; neither where that cannot be told without running it."""
    if not is_file_target(target):
        return None, None
    location, _ = split_target(target)
    path = placed(Path(location))
    if (why := why_missing(path)) is not None:
        return None, f"The file {location} {why}"
    if path.suffix != ".py" or not is_file(path):
        return None, None
    try:
        source = path.read_bytes()
        if len(source) > _LARGEST:
            return None, None
        tree = ast.parse(source)
        table = symtable.symtable(source.decode(), str(path), "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return None, None  # loading says what is wrong with it
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names = frozenset(
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
    )
    return _File(location, None if _is_dynamic(tree) else names, defined), None


def _is_dynamic(tree: ast.Module) -> bool:
    """Whether names may be there that the top level does not show."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            return True
        if isinstance(node, ast.Name | ast.FunctionDef | ast.Global):
            used = node.names if isinstance(node, ast.Global) else [getattr(node, "id", getattr(node, "name", ""))]
            if isinstance(node, ast.Global) or _DYNAMIC & set(used):
                return True
    return False
