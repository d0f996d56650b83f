"""How a batch goes through the user's model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from bnprobe.errors import DataError
from bnprobe.probing.batches import CannotEmulateError
from bnprobe.probing.memory import is_out_of_memory
from bnprobe.usercode import user_code

BatchFunction = Callable[[nn.Module, Any], Any]
"""A user's function of (model, batch)."""

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
