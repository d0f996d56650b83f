"""Inspect the user's functions and values before they are used, and name them in messages."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from bnprobe.usercode import user_code


class GuardedBatches:
    """The user's batches. An exception while drawing one becomes a UserCodeError.

    Attributes:
        wrapped: The user's own iterable.
        origin: Name of the iterable in messages.
        indices: Maps the number of a drawn batch, from 1, to the indices of its samples in the data set; None: unknown.
    """

    def __init__(
        self, wrapped: Iterable[Any], origin: str, indices: Callable[[int], Sequence[Any]] | None = None
    ) -> None:
        self.wrapped = wrapped
        self.indices = indices
        self.origin = origin

    def __iter__(self) -> Iterator[Any]:
        with user_code(f"starting {self.origin}"):
            iterator = iter(self.wrapped)
        number = 0
        while True:
            number += 1
            with user_code(f"drawing batch {number} from {self.origin}"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch


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
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
