"""Put everything back: the model, its hooks and flags, the random state, and the handling of Ctrl-C."""

from __future__ import annotations

import copy
import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def seed_everything(seed: int) -> None:
    """Seed random, numpy and torch (CPU and CUDA)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> object:
    """The state of random, numpy and torch (CPU and CUDA), to be compared: equal if nothing was drawn in between."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    tensors = [torch.get_rng_state(), *cuda]
    numpy = np.random.get_state(legacy=False)
    drawn = numpy["state"]["key"].tobytes(), numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]
    return random.getstate(), drawn, [state.numpy().tobytes() for state in tensors]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random state when the block is done."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    if torch.cuda.is_available():
        torch.cuda.init()  # else a seed that the user set would still be waiting, and ours would replace it
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def preserved_training_flags(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every module when the block ends, also after an exception."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def held_in_eval(model: nn.Module) -> list[nn.Module]:
    """Modules that the user keeps in eval mode while training: those in eval mode beside a root in train mode."""
    return [module for module in model.modules() if model.training and not module.training]


def set_mode(model: nn.Module, training: bool, held: Iterable[nn.Module]) -> None:
    """Put a model into train or eval mode, as the user does: modules that are held in eval mode stay there."""
    model.train(training)
    for module in held:
        module.training = False


Restore = Callable[[], None]

_CONTAINERS = (dict, list, set, deque, tuple)
"""Types that are saved item by item."""


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore everything about ``model`` and the process that a forward pass may change.

    Parameters, buffers and other tensors of a module, their grad and requires_grad, every attribute of every module
    (training flags, momentum, hooks, containers in containers), the class of what was lazy, the random state of torch
    (CPU, CUDA), numpy and random, and the grad mode. Bit-identical, also after an exception or Ctrl-C. Costs a copy of
    the model's tensors in host memory.
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
                # Attributes first: they hold which tensors there are; then gradients, and what is in the tensors.
                _run_all(reversed(restores))


def _run_all(restores: Iterable[Restore]) -> None:
    """Run every restore, also after one that fails, and raise the first failure at the end."""
    failures: list[Exception] = []
    for restore in restores:
        try:
            restore()
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor that hangs on a module, once each: parameters, buffers, plain attributes; their gradients last."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for content in _containers(module.__dict__):
            items = content.values() if isinstance(content, dict) else content
            found.update((id(item), item) for item in items if isinstance(item, Tensor))
    # Moving a model to a device moves what is in its gradients too.
    gradients = [tensor.grad for tensor in found.values() if tensor.is_leaf and tensor.grad is not None]
    found.update((id(gradient), gradient) for gradient in gradients)
    return list(found.values())


def _containers(root: Any) -> list[Any]:
    """A container and those in it, at any depth, once each; modules in it are not entered."""
    found: dict[int, Any] = {id(root): root}
    waiting = [root]
    while waiting:
        content = waiting.pop()
        for item in content.values() if isinstance(content, dict) else content:
            if isinstance(item, _CONTAINERS) and id(item) not in found:
                found[id(item)] = item
                waiting.append(item)
    return list(found.values())


def _save_tensor(tensor: Tensor) -> Restore:
    if is_lazy(tensor):
        return _save_lazy(tensor)
    values = tensor.detach().to("cpu", copy=True)
    storage = tensor.data
    grad, requires_grad = tensor.grad if tensor.is_leaf else None, tensor.requires_grad

    def restore() -> None:
        if tensor.data_ptr() != storage.data_ptr() or tensor.dtype != storage.dtype:
            tensor.data = storage
        if not _same_bits(tensor, values):
            with torch.no_grad():
                tensor.copy_(values)
        if tensor.is_leaf and tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)
        if tensor.is_leaf and tensor.grad is not grad:
            tensor.grad = grad

    return restore


def _save_lazy(tensor: Tensor) -> Restore:
    kind, empty = type(tensor), tensor.data

    def restore() -> None:
        if type(tensor) is not kind:
            tensor.data = empty
            tensor.__class__ = kind

    return restore


def _same_bits(tensor: Tensor, values: Tensor) -> bool:
    """Equality of the bits themselves: -0.0 is not 0.0, and a NaN is itself."""
    here = tensor.detach().cpu()
    if here.dtype.is_complex or not (here.is_contiguous() and values.is_contiguous()):
        return False  # restoring costs no more than looking closely
    return torch.equal(_bits(here), _bits(values))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    wide = flat.numel() * flat.element_size() % 8 == 0 and flat.data_ptr() % 8 == 0
    return flat.view(torch.int64 if wide else torch.uint8)


def _save_attributes(module: nn.Module) -> Restore:
    kind, attributes = type(module), dict(module.__dict__)
    changeable = [content for content in _containers(attributes) if not isinstance(content, tuple)]
    contents = [(content, copy.copy(content)) for content in changeable if content is not attributes]

    def restore() -> None:
        if type(module) is not kind:
            module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for container, content in contents:
            _refill(container, content)

    return restore


def _refill(container: Any, content: Any) -> None:
    """Put the old content back into the same object."""
    container.clear()
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Defer Ctrl-C until the block is done, so that the block runs completely or not at all.

    Signals reach the main thread only; elsewhere this does nothing, nor where the handler was not set from Python:
    such a one could not be put back.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending and callable(previous):
            previous(*pending[0])
