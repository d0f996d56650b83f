"""Give the user's model back as it was, whatever happens in between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnprobe.probing.interrupts import deferred_interrupts
from bnprobe.randomness import preserved_random_state

Restore = Callable[[], None]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore everything about ``model`` and the process that a forward pass may change.

    Parameters, buffers and other tensors of a module, their grad and requires_grad, every attribute of every module
    (training flags, momentum, hooks, containers), the random state of torch (CPU, CUDA), numpy and random, and the
    grad mode. Bit-identical, also after an exception or Ctrl-C. Costs a copy of the model's tensors in host memory.
    """
    restores = [_save_tensor(tensor) for tensor in _tensors(model)]
    restores += [_save_attributes(module) for module in model.modules()]
    with preserved_random_state():
        grad_mode = torch.is_grad_enabled()
        try:
            yield
        finally:
            with deferred_interrupts():
                torch.set_grad_enabled(grad_mode)
                # Attributes first: they hold which tensors there are; then what is in the tensors.
                for restore in reversed(restores):
                    restore()


def _tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor that hangs on a module, once each: parameters, buffers, plain attributes."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        attributes = {**module.__dict__, **module._parameters, **module._buffers}
        tensors = [value for value in attributes.values() if isinstance(value, Tensor) and not is_lazy(value)]
        found.update((id(tensor), tensor) for tensor in tensors)
    return list(found.values())


def _save_tensor(tensor: Tensor) -> Restore:
    values = tensor.detach().to("cpu", copy=True)
    storage = tensor.data
    grad, requires_grad = tensor.grad if tensor.is_leaf else None, tensor.requires_grad

    def restore() -> None:
        if tensor.data_ptr() != storage.data_ptr() or tensor.dtype != storage.dtype:
            tensor.data = storage
        if not _same_bits(tensor, values):
            with torch.no_grad():
                tensor.copy_(values)
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad

    return restore


def _same_bits(tensor: Tensor, values: Tensor) -> bool:
    """Equal values and equal signs of zero; a NaN counts as different, which only costs a copy."""
    here = tensor.detach().cpu()
    signs_agree = not here.is_floating_point() or torch.equal(torch.signbit(here), torch.signbit(values))
    return signs_agree and torch.equal(here, values)


def _save_attributes(module: nn.Module) -> Restore:
    attributes = dict(module.__dict__)
    containers = {name: copy.copy(value) for name, value in attributes.items() if isinstance(value, dict | list | set)}

    def restore() -> None:
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for name, content in containers.items():
            _refill(attributes[name], content)

    return restore


def _refill(container: Any, content: Any) -> None:
    """Put the old content back into the same object."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
