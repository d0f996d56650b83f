"""``python -O`` leaves asserts out of the code, so none may keep results right or judge what a user gives."""

from __future__ import annotations

import ast
from pathlib import Path

import bnprobe
from bnprobe.docstrings import docstring
from bnprobe.rules import RULES


def _narrows(test: ast.expr) -> bool:
    """Whether a test only tells a type checker what is known: that something is not None, or of a type."""
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot) and isinstance(test.comparators[0], ast.Constant)
    return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance"


def test_asserts_only_tell_types() -> None:
    package = Path(bnprobe.__file__).parent
    trees = {path: ast.parse(path.read_bytes()) for path in package.rglob("*.py")}
    asserts = [
        (path.name, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.Assert)
    ]
    assert asserts
    assert [(name, node.lineno) for name, node in asserts if not _narrows(node.test)] == []


def test_docstrings_that_python_left_out_come_from_the_source() -> None:
    rule = next(iter(RULES))
    whole = docstring(type(rule))
    stripped = type(rule)
    before = stripped.__doc__
    stripped.__doc__ = None
    try:
        assert docstring(stripped) == whole
    finally:
        stripped.__doc__ = before
    assert docstring(type("Made", (), {})) == ""
