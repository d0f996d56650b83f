"""Put everything back: the model, its hooks and flags, the random state, and the handling of Ctrl-C."""

from __future__ import annotations

import copy
import functools
import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnprobe.errors import ModelError, message_of


def seed_everything(seed: int) -> None:
    """Seed random, numpy and torch (CPU and CUDA)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> tuple[object, object, object]:
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


Restore = Callable[[], object]

_CONTAINERS = (dict, list, set, deque, tuple)
"""Types that are saved item by item."""


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore everything about ``model`` and the process that a forward pass may change.

    Parameters, buffers and other tensors of a module, their grad and requires_grad, every attribute of every module
    (training flags, momentum, hooks, containers in containers, generators of random numbers), the class of what was
    lazy, the random state of torch (CPU, CUDA), numpy and random, and the grad mode. Modules that plain containers hold
    are modules of the model here. Bit-identical, also after an exception or Ctrl-C. Costs a copy of the model's tensors
    in host memory.

    Raises:
        ModelError: A tensor cannot be saved; before anything runs.
    """
    modules = every_module(model)
    held = _tensors(modules)
    # Moving a model to a device moves what is in its gradients too.
    held += [(name, tensor.grad) for name, tensor in held if tensor.is_leaf and tensor.grad is not None]
    restores = [_saved(name, tensor) for name, tensor in held]
    restores += [_save_attributes(module) for module in modules.values()]
    restores += [restore for module in modules.values() for restore in _save_generators(module.__dict__)]
    with preserved_random_state():
        grad_mode = torch.is_grad_enabled()
        try:
            yield
        finally:
            with deferred_interrupts():
                torch.set_grad_enabled(grad_mode)
                # Attributes first: they hold which tensors there are; then gradients, and what is in the tensors.
                _run_all(reversed(restores))


@contextmanager
def preserved_generators(*holders: Any) -> Iterator[None]:
    """Put back the generators of random numbers that objects hold as attributes; of a loader, its samplers' too."""
    parts = [getattr(holder, name, None) for holder in holders for name in ("sampler", "batch_sampler", "dataset")]
    inner = [getattr(part, "sampler", None) for part in parts]
    every = {id(each): each for each in (*holders, *parts, *inner)}.values()
    restores = [restore for each in every for restore in _save_generators(getattr(each, "__dict__", {}))]
    try:
        yield
    finally:
        _run_all(restores)


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


def every_module(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its first name: those registered, then those that plain containers of theirs hold.

    The latter, e.g. ``blocks[0]`` of a list, are reached by no ``train()``, ``state_dict()`` or ``to()``.
    """
    found = dict(model.named_modules())
    known = {id(module) for module in found.values()}
    waiting = list(found.items())
    while waiting:
        name, module = waiting.pop(0)
        prefix = f"{name}." if name else ""
        for attribute, value in module.__dict__.items():
            if attribute in _INTERNAL:
                continue
            for path, held in _held(value, f"{prefix}{attribute}"):
                inner = [(f"{path}.{below}" if below else path, each) for below, each in held.named_modules()]
                new = [(path, each) for path, each in inner if id(each) not in known]
                known.update(id(each) for _, each in new)
                found.update(new)
                waiting += new
    return found


_INTERNAL = frozenset(nn.Module().__dict__)
"""Attributes that every module has."""


def _held(value: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a container or plain object and in those within it, with the way to each."""
    seen: set[int] = set()
    waiting = deque([(path, value, True)])
    while waiting:
        path, content, outer = waiting.popleft()
        attributes = None if isinstance(content, _CONTAINERS) or not outer else _attributes_of(content)
        if id(content) in seen or (attributes is None and not isinstance(content, _CONTAINERS)):
            continue
        seen.add(id(content))
        inside = content if attributes is None else attributes
        for key, item in inside.items() if isinstance(inside, dict) else enumerate(inside):
            if isinstance(item, _PLAIN):
                continue
            place = f"{path}[{key!r}]" if attributes is None else f"{path}.{key}"
            if isinstance(item, nn.Module):
                yield place, item
            else:
                waiting.append((place, item, outer and attributes is None))


_PLAIN = (int, float, str, bytes, Tensor, type(None))
"""Types that hold nothing."""


def _tensors(modules: dict[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """Every tensor that hangs on a module, once each, with the module's name: parameters, buffers, plain attributes."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in modules.items():
        kept = [
            *module.parameters(recurse=False),
            *module.buffers(recurse=False),
        ]  # of scripts no dictionary holds them
        for content in (*_containers(module.__dict__), kept):
            items = content.values() if isinstance(content, dict) else content
            found.update((id(item), (name, item)) for item in items if isinstance(item, Tensor))
    return list(found.values())


def _containers(root: Any) -> list[Any]:
    """A container and those in it, at any depth, once each; modules in it are not entered.

    The attributes of a plain object that it holds are a container too, but not those of further objects behind it.
    """
    found: dict[int, Any] = {id(root): root}
    waiting = [(root, True)]
    while waiting:
        content, outer = waiting.pop()
        for item in content.values() if isinstance(content, dict) else content:
            inside = item if isinstance(item, _CONTAINERS) else _attributes_of(item) if outer else None
            if inside is not None and id(inside) not in found:
                found[id(inside)] = inside
                waiting.append((inside, outer and inside is item))
    return list(found.values())


def _attributes_of(item: Any) -> dict[str, Any] | None:
    """The attributes of an object of a class of the user's; None for anything else."""
    kind = type(item)
    if isinstance(item, nn.Module | type) or kind.__module__.partition(".")[0] in _NO_STATE:
        return None
    attributes = getattr(item, "__dict__", None)
    return attributes if type(attributes) is dict else None


_NO_STATE = frozenset(
    {"builtins", "torch", "numpy", "functools", "collections", "logging", "threading", "types", "weakref"}
)
"""Packages whose objects hold no state of a model, or are saved in another way."""


def _save_generators(content: dict[str, Any]) -> list[Restore]:
    """For each generator of random numbers in containers, what puts its state back."""
    items = (item for box in _containers(content) for item in (box.values() if isinstance(box, dict) else box))
    found: list[Restore] = []
    for item in items:
        if isinstance(item, torch.Generator):
            found.append(functools.partial(item.set_state, item.get_state()))
        elif isinstance(item, random.Random):
            found.append(functools.partial(item.setstate, item.getstate()))
        elif isinstance(item, np.random.RandomState):
            found.append(functools.partial(item.set_state, item.get_state()))
        elif isinstance(item, np.random.Generator):
            found.append(
                functools.partial(setattr, item.bit_generator, "state", copy.deepcopy(item.bit_generator.state))
            )
    return found


def _saved(name: str, tensor: Tensor) -> Restore:
    """What restores a tensor of the module of this name.

    Raises:
        ModelError: It cannot be saved.
    """
    if is_lazy(tensor):
        return _save_lazy(tensor)
    try:
        return _save_tensor(tensor)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        said = message_of(error).partition("\n")[0]
        kind = f"of layout {str(tensor.layout).removeprefix('torch.')} on {tensor.device}"
        raise ModelError(
            f"{name or 'The model'} holds a {type(tensor).__name__} {kind}, of which bnprobe cannot keep a copy, so it"
            f" could not give the model back unchanged ({said}). Nothing was run."
        ) from error


def _save_tensor(tensor: Tensor) -> Restore:
    storage = tensor.data
    parts = [(part, part.to("cpu", copy=True)) for part in _parts(storage)]
    form = _form(tensor)
    grad, requires_grad = tensor.grad if tensor.is_leaf else None, tensor.requires_grad

    def restore() -> None:
        if _form(tensor) != form:
            tensor.data = storage
        with torch.no_grad():
            for here, values in zip(_parts(tensor.data), (values for _, values in parts), strict=True):
                if not _same_bits(here, values):
                    here.copy_(values)
        if tensor.is_leaf and tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)
        if tensor.is_leaf and tensor.grad is not grad:
            tensor.grad = grad

    return restore


def _parts(tensor: Tensor) -> list[Tensor]:
    """Flat views of all memory that a tensor without a graph uses: of a sparse one, its indices and values."""
    if tensor.is_nested:
        return [_flat(tensor.values())]
    if tensor.layout is torch.sparse_coo:
        return [_flat(tensor._indices()), _flat(tensor._values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [_flat(part) for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values())]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [_flat(part) for part in (tensor.ccol_indices(), tensor.row_indices(), tensor.values())]
    return [_flat(tensor)]


def _flat(tensor: Tensor) -> Tensor:
    """A view of one axis; of an expanded tensor, or one with gaps, all memory from its first value to its last."""
    if tensor.numel() == 0 or tensor.is_contiguous():
        return tensor.reshape(-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,))


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor in its own memory from one that was moved, resized or replaced."""
    parts = [(part.data_ptr(), part.numel()) for part in _parts(tensor.data)]
    strides = tensor.stride() if tensor.layout is torch.strided and not tensor.is_nested else None
    shape = None if tensor.is_nested else tensor.shape
    return tensor.device, tensor.dtype, tensor.layout, shape, strides, parts


def _save_lazy(tensor: Tensor) -> Restore:
    kind, empty = type(tensor), tensor.data

    def restore() -> None:
        if type(tensor) is not kind:
            tensor.data = empty
            tensor.__class__ = kind

    return restore


def _same_bits(flat: Tensor, values: Tensor) -> bool:
    """Equality of the bits themselves: -0.0 is not 0.0, and a NaN is itself."""
    if flat.shape != values.shape:
        return False
    if flat.numel() == 0:
        return True
    here = flat.cpu()
    if here.is_quantized:
        here, values = here.int_repr(), values.int_repr()
    if here.dtype.is_complex:
        here, values = torch.view_as_real(here).reshape(-1), torch.view_as_real(values).reshape(-1)
    return torch.equal(_bits(here), _bits(values))


def _bits(flat: Tensor) -> Tensor:
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


_SMALL = 2**20
"""Values up to which a buffer is put back after every pass, whether it was seen to move or not."""


class ModelState:
    """The state that a model is deployed with, put back after every pass that moved it.

    A pass in train mode may write into buffers (running statistics of the model's own code, the vectors of spectral
    norm, codebooks, counters), replace them, or set attributes. Small buffers are always put back, since not every
    write can be seen: neither ``.data`` nor the kernel of batch norm raises a tensor's version. Parameters and large
    buffers are, once ``watching`` has seen them move: a copy is kept of these only.

    Args:
        model: As loaded, on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = every_module(model)
        self._tensors = [tensor for _, tensor in _tensors(modules) if _can_be_copied(tensor)]
        trained = {id(tensor) for module in modules.values() for tensor in module.parameters(recurse=False)}
        self._kept = {
            id(tensor): (tensor, tensor.detach().clone())
            for tensor in self._tensors
            if id(tensor) not in trained and tensor.numel() <= _SMALL
        }
        # The attributes of a lazy module are those of another class once it has run.
        self._attributes = [
            _Attributes(module)
            for module in modules.values()
            if not any(map(is_lazy, [*module.parameters(recurse=False), *module.buffers(recurse=False)]))
        ]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Find out which of the other tensors move while the block runs, and keep their values from before."""
        others = [tensor for tensor in self._tensors if id(tensor) not in self._kept]
        before = [tensor.detach().to("cpu", copy=True) for tensor in others]
        try:
            yield
        finally:
            for tensor, values in zip(others, before, strict=True):
                same = tensor.shape == values.shape and tensor.dtype == values.dtype
                if not same or not _same_bits(_flat(tensor.data), _flat(values)):
                    self._kept[id(tensor)] = (tensor, values.to(tensor.device))

    def accept_attributes(self) -> None:
        """Take the attributes as they are: a model's own ``train()`` may set some."""
        for attributes in self._attributes:
            attributes.accept()

    def put_back(self) -> None:
        """Put back attributes and kept tensors; the versions of these stay, for graphs that hold them."""
        for attributes in self._attributes:
            attributes.put_back()
        # The data of a tensor has a version counter of its own.
        moved = [(tensor.data, values) for tensor, values in self._kept.values() if tensor.shape == values.shape]
        if moved:
            torch._foreach_copy_([here for here, _ in moved], [values for _, values in moved])
        for tensor, values in self._kept.values():
            if tensor.shape != values.shape:
                tensor.data = values.clone()


def _can_be_copied(tensor: Tensor) -> bool:
    """Whether a tensor is plain memory, each value in its own place."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return not (overlaps and tensor.numel())


class _Attributes:
    """The plain attributes of a module and what its containers hold; not its modules, hooks and training flag."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = self._plain()
        within = _containers(self._values)[1:]
        boxes = {id(box): box for box in within if not isinstance(box, tuple)}
        boxes.update((id(box), box) for box in (module._buffers, module._parameters) if isinstance(box, dict))
        self._boxes = [(box, copy.copy(box)) for box in boxes.values()]

    def _plain(self) -> dict[str, Any]:
        return {name: value for name, value in self._module.__dict__.items() if name not in _NOT_PLAIN}

    def accept(self) -> None:
        self._values = self._plain()

    def put_back(self) -> None:
        attributes = self._module.__dict__
        for name in [name for name in attributes if name not in self._values and name not in _NOT_PLAIN]:
            del attributes[name]
        attributes.update(self._values)
        for box, content in self._boxes:
            if not _same_items(box, content):
                _refill(box, content)


_NOT_PLAIN = _INTERNAL | {"forward"}
"""Attributes that a module has of its class, and the one that a session sets."""


def _same_items(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(map(is_, one, other)) and all(map(is_, one.values(), other.values()))
    return one == other if isinstance(one, set) else all(map(is_, one, other))


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
