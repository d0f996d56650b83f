"""What the user's loss(model, batch) must return to be trained with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.errors import DeviceError, UsageError
from bnprobe.probing.forward import model_code
from bnprobe.probing.memory import is_out_of_memory


def require_scalar(value: object) -> Tensor:
    """What the user's loss returned, as a tensor without axes.

    Raises:
        UsageError: It is no tensor of one number.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"loss(model, batch) returned {what}; return a tensor of one number, e.g. with .mean().")
    return value.reshape(())


def require_graph(value: Tensor) -> None:
    """Refuse a loss that depends on no parameter.

    Raises:
        UsageError: It has no gradient.
    """
    if not value.requires_grad:
        raise UsageError(
            "The loss has no gradient to train with. loss(model, batch) must return the loss itself, without"
            " .item(), .detach() or torch.no_grad(), and the model must have trainable parameters."
        )


def require_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Refuse a backward pass that reached none of the parameters.

    Raises:
        UsageError: No parameter got a gradient.
    """
    if all(parameter.grad is None for parameter in parameters):
        raise UsageError(
            "No parameter got a gradient: loss(model, batch) must call the model that it is given, not another one."
        )


def held_in_eval(model: nn.Module) -> list[nn.Module]:
    """Modules that the user keeps in eval mode while training: those in eval mode beside a root in train mode."""
    return [module for module in model.modules() if model.training and not module.training]


def casting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast of the forward pass, or none."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


@contextmanager
def training_code(call: str, what: str, device: torch.device) -> Iterator[None]:
    """The border to the user's code in training, where running out of memory is a finding of its own.

    Args:
        call: As in ``model_code``.
        what: What does not fit, e.g. "Training a copy of the model".

    Raises:
        UserCodeError: The user's code raised.
        DeviceError: There is not enough memory.
    """
    try:
        with model_code(call):
            yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise too_large(what, device) from error


def too_large(what: str, device: torch.device) -> DeviceError:
    """One micro-batch is too large for the memory of the device."""
    return DeviceError(
        f"{what} on one micro-batch does not fit into the memory of {device}."
        " Use a smaller --batch-size, --autocast, or another --device."
    )
