"""Calls into the user's code: what it raises becomes a UserCodeError that says what was called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bnprobe.errors import BnprobeError, UserCodeError

BatchFunction = Callable[[nn.Module, Any], Any]
"""A function of the user, called as f(model, batch)."""


@contextmanager
def user_code(call: str, passes: Callable[[BaseException], bool] = lambda error: False) -> Iterator[None]:
    """Turn an exception of the user's code into a UserCodeError. bnprobe's own errors and Ctrl-C pass unchanged.

    Args:
        call: What is being called, e.g. ``"calling load_model() of model.py"``.
        passes: Which further exceptions pass unchanged.
    """
    try:
        yield
    except BnprobeError:
        raise
    except (Exception, SystemExit) as error:  # exit() in a model file must not end bnprobe silently
        if passes(error):
            raise
        raise UserCodeError(call, error) from error
