"""What the user's functions give back: taken where it is what was asked for, else an error that names the function.

Every value that a function of the model file returns passes here, so that the commonest mistakes (a missing return
statement, a loss that is not reduced) read alike in all commands.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnprobe.errors import DataError, UsageError
from bnprobe.loading.model import BatchFunction, kind_of
from bnprobe.loading.samples import why_unreadable
from bnprobe.paths import short_path


def written_at(function: object) -> str:
    """File and line of a function in parentheses, as it follows its name: " (model.py:12)"; empty where unknown."""
    for each in (function, getattr(function, "func", None), vars(type(function)).get("__call__")):
        try:
            code = getattr(inspect.unwrap(each), "__code__", None)  # type: ignore[arg-type]
        except ValueError:  # a wrapper around itself
            continue
        if inspect.iscode(code):
            return f" ({short_path(Path(code.co_filename))}:{code.co_firstlineno})"
    return ""


def described(value: object) -> str:
    """What was returned, in words: "None", "a tensor of shape (4, 3) and dtype torch.int64", "the text 'abc'"."""
    if isinstance(value, Tensor):
        problem = why_unreadable(value)
        return problem or f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return kind_of(value)


def one_number(name: str, function: BatchFunction, value: Any) -> Tensor:
    """The value of a loss or metric as a float64 scalar.

    Raises:
        DataError: It is not one number; names the function and its line.
    """
    number = None if isinstance(value, str) else _as_number(value)
    if number is None or number.numel() != 1:
        raise DataError(_wrong(name, function, value, "one number (a float, or a tensor with one element)"))
    return number.reshape(()) if number.dim() else number


def _as_number(value: Any) -> Tensor | None:
    """As a float64 tensor; None if it is no real numbers."""
    if isinstance(value, Tensor) and (why_unreadable(value) or value.is_complex()):
        return None
    try:
        return torch.as_tensor(value, dtype=torch.float64).detach()
    except Exception:  # whatever the conversions of the user's classes raise
        return None


def trainable_loss(function: BatchFunction, value: Any) -> Tensor:
    """The value of a loss as a tensor without axes, with its graph.

    Raises:
        UsageError: It is no tensor of one real number, or it depends on no parameter.
    """
    one = value if isinstance(value, Tensor) and not why_unreadable(value) and value.numel() == 1 else None
    if one is None or one.is_complex():
        raise UsageError(_wrong("loss", function, value, "the training loss as a tensor of one number"))
    if not one.requires_grad:
        raise UsageError(
            f"loss(model, batch){written_at(function)} returned {described(value)}, which has no gradient to train"
            " with. It must return the loss itself, without .item(), .detach(), .long() or torch.no_grad(), and the"
            " model must have trainable parameters."
        )
    return one.reshape(())


def _wrong(name: str, function: BatchFunction, value: Any, wanted: str) -> str:
    hint = ""
    if value is None:
        hint = " Is there a return statement?"
    elif isinstance(value, Tensor) and not why_unreadable(value) and value.numel() > 1:
        hint = " Reduce it, e.g. with .mean()."
    return f"{name}(model, batch){written_at(function)} returned {described(value)}, but it must return {wanted}.{hint}"
