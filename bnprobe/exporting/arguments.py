"""The arguments that the user's forward passes to the model, with which an exported file will be called."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from bnprobe.errors import RepairError
from bnprobe.exporting.interface import Arguments
from bnprobe.probing.batch import copy_tensors, map_leaves, tensors_of
from bnprobe.probing.session import describe_call, model_code
from bnprobe.usercode import BatchFunction


def arguments_of(model: nn.Module, forward: BatchFunction, batch: Any) -> Arguments:
    """Run the user's forward on a batch, and return the positional arguments of the first call of the model itself.

    Raises:
        RepairError: The model itself is not called, gets no tensor, or gets keyword-only arguments.
        UserCodeError: The user's code raised.
    """
    calls: list[Arguments] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(copy_tensors(_positional(module, args, kwargs)))

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), model_code(f"calling {describe_call(forward, batch)} (before the export)"):
            forward(model, copy_tensors(batch))
    finally:
        handle.remove()
    if not calls:
        raise RepairError(
            "forward(model, batch) calls only parts of the model, never the model itself, so there is no complete graph"
            " to export. Move what is to be deployed into the model's own forward()."
        )
    if not tensors_of(calls[0]):
        raise RepairError("The model is called without a tensor, so an exported file would have no input.")
    return calls[0]


def _positional(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    if not kwargs:
        return args
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    if bound.kwargs:
        raise RepairError(
            f"The model is called with keyword-only arguments ({', '.join(bound.kwargs)}), but exported files accept"
            " only positional ones: remove the * or ** from its forward()."
        )
    return bound.args


def shapes_of(arguments: Arguments, images: int) -> Arguments:
    """The batch axes of the arguments, in the form that ``torch.export`` takes for dynamic shapes."""
    batch = Dim("batch")

    def shape(leaf: Any) -> Any:
        counts = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == images
        return {0: batch} if counts else None

    found: Arguments = map_leaves(arguments, shape)
    return found
