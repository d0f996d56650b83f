"""How a batch goes through the user's model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from bnprobe.errors import DataError
from bnprobe.probing.batches import CannotEmulateError, tensors_of
from bnprobe.probing.memory import is_out_of_memory
from bnprobe.usercode import BatchFunction, user_code

_INPUT_KEYS = ("image", "images", "input", "inputs", "pixel_values", "x", "data")


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on the inputs of a batch, for model files without ``forward(model, batch)``.

    A tensor is the input; of a tuple or list the first item is; of a mapping those items are whose keys are parameters
    of the model's ``forward``, else the item under a usual key (image, input, pixel_values, ...).

    Raises:
        DataError: The batch is something else; says to write ``forward(model, batch)``.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, list | tuple) and batch:
        return model(batch[0])
    if isinstance(batch, Mapping):
        return _forward_mapping(model, batch)
    raise DataError(
        f"bnprobe does not know how to give a batch of type {type(batch).__name__} to the model."
        " Add a function forward(model, batch) to the model file."
    )


def forward_all(model: nn.Module, batch: Any) -> Any:
    """Call the model on every item of a batch: made-up inputs are inputs, all of them."""
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def describe_call(forward: BatchFunction, batch: Any) -> str:
    """What is called on what, for messages: ``"the model on a batch of shape (2, 3, 8, 8)"``."""
    first = next(iter(tensors_of(batch)), None)
    shape = "" if first is None else f" of shape {tuple(first.shape)}"
    if forward is default_forward and isinstance(batch, list | tuple) and len(batch) > 1:
        return f"the model on batch[0]{shape} alone, for want of a forward(model, batch)"
    name = "the model" if forward in (default_forward, forward_all) else "forward(model, batch)"
    return f"{name} on a batch{shape}"


def model_code(call: str) -> AbstractContextManager[None]:
    """The border to the user's forward, loss and metric; what probing itself handles passes unchanged."""
    return user_code(call, lambda error: isinstance(error, CannotEmulateError) or is_out_of_memory(error))


def _forward_mapping(model: nn.Module, batch: Mapping[Any, Any]) -> Any:
    parameters = inspect.signature(model.forward).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    matching = {key: value for key, value in batch.items() if key in names}
    if matching:
        return model(**matching)
    key = next((key for key in _INPUT_KEYS if key in batch), None)
    if key is None:
        raise DataError(
            f"None of the batch's keys ({', '.join(map(str, batch))}) is a parameter of the model's forward."
            " Add a function forward(model, batch) to the model file."
        )
    return model(batch[key])
