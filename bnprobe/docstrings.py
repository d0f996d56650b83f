"""Docstrings that users read: manuals of rules, help of commands. ``python -OO`` leaves them out of the code."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def docstring(what: type | Callable[..., Any]) -> str:
    """The docstring of a class or function, without its indentation; from the source where Python has left it out.

    Empty where there is none.
    """
    return inspect.cleandoc(what.__doc__ or _from_source(what))


def _from_source(what: type | Callable[..., Any]) -> str:
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(what))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):  # no source at hand
        return ""
    if not isinstance(definition, ast.ClassDef | ast.FunctionDef):
        return ""
    return ast.get_docstring(definition) or ""
