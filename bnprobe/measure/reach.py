"""What hangs on a model: its modules, also those that plain containers hold, and every object behind them."""

from __future__ import annotations

import copy
import functools
import io
import queue
import subprocess
import sys
import threading
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, Dataset, Sampler

from bnprobe.errors import is_library_file

CONTAINERS = (dict, list, set, deque, tuple, frozenset, types.MappingProxyType)
"""Types whose items are reached one by one."""

INTERNAL = frozenset(nn.Module().__dict__)
"""Attributes that every module has."""

_PLAIN = (int, float, complex, str, bytes, type, torch.dtype, torch.device, type(None))
"""Types that hold nothing."""

_NO_STATE = (sys.stdlib_module_names - {"types"}) | {"bnprobe", "numpy", "torch"}
"""Packages whose objects hold no state of a model, or are kept in another way; ``types`` has SimpleNamespace."""

_DATA = (DataLoader, Dataset, Sampler, torch.optim.Optimizer)
"""What a model's trainer refers to as well: no state of the model, and as large as the data."""

_ALIVE = (threading.Thread, queue.Queue, subprocess.Popen, io.IOBase)
"""What an object holds that works by itself or is open to the outside: its attributes are not ours to set back."""


class Reached(NamedTuple):
    """An object that hangs on a model.

    Attributes:
        path: The way to it, as its user writes it: ``"layer1.0.meter.values"``.
    """

    path: str
    item: Any


def reached(roots: Mapping[str, Any], functions: bool = True, data: bool = False) -> list[Reached]:
    """Every object that holds state and hangs on ``roots``, once each: what holds others comes before these.

    Modules, tensors and their gradients, arrays, containers, generators of random numbers, and objects of the user's
    classes with their attributes and slots. Objects that work by themselves (threads, open files) are left out.

    Args:
        roots: By their paths.
        functions: Go on to what functions, e.g. hooks, close over.
        data: Enter loaders, samplers and data sets, but no container with many items.
    """
    found: dict[int, Reached] = {id(item): Reached(path, item) for path, item in roots.items()}
    waiting = deque(found.values())
    while waiting:
        holder = waiting.popleft()
        for path, item in _inside(*holder, functions, data):
            if not isinstance(item, _PLAIN) and id(item) not in found:
                found[id(item)] = Reached(path, item)
                waiting.append(found[id(item)])
    return list(found.values())


_MANY = 1000
"""Items of a container that are samples rather than parts of a pipeline."""


def _inside(path: str, item: Any, functions: bool, data: bool) -> Iterator[tuple[str, Any]]:
    if isinstance(item, nn.Module):
        # With the names that their user knows; the dictionaries that hold them come with the attributes.
        registered = (item.named_parameters, item.named_buffers)
        yield from ((dotted(path, name), each) for named in registered for name, each in named(recurse=False))
        yield from ((dotted(path, name), each) for name, each in item._modules.items())
    elif isinstance(item, Tensor):
        yield from _of_tensor(path, item)
    elif isinstance(item, CONTAINERS) and not (data and len(item) > _MANY):
        pairs: Iterable[tuple[Any, Any]] = item.items() if isinstance(item, Mapping) else enumerate(item)
        yield from ((f"{path}[{key!r}]" if isinstance(key, _PLAIN) else f"{path}[...]", each) for key, each in pairs)
    elif isinstance(item, np.ndarray) and item.dtype == object:
        yield from ((f"{path}[{number}]", each) for number, each in enumerate(item.flat))
    elif functions:
        yield from _of_function(path, item)
    if isinstance(item, torch.utils.data.DataLoader | Sampler) and data:
        yield from ((dotted(path, name), each) for name, each in vars(item).items())
    attributes = attributes_of(item, data)
    if attributes:
        yield from ((dotted(path, name), each) for name, each in attributes.items())
    if has_slots(item):
        yield from ((dotted(path, name), each) for name, each in slots_of(item))


def dotted(path: str, name: str) -> str:
    """The path of an attribute."""
    return f"{path}.{name}" if path else name


def _of_tensor(path: str, tensor: Tensor) -> Iterator[tuple[str, Any]]:
    yield from ((f"{path}.{name}", each) for name, each in vars(tensor).items())
    if wraps_tensors(tensor):
        wrapper: Any = tensor
        names, _ = wrapper.__tensor_flatten__()
        yield from ((f"{path}.{name}", getattr(tensor, name)) for name in names)
    if not is_lazy(tensor) and tensor.is_leaf and tensor.grad is not None:
        yield f"{path}.grad", tensor.grad


def wraps_tensors(tensor: Tensor) -> bool:
    """Whether a tensor is one of a class that holds others in its place."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False  # as torch says, but it looks at every attribute of a parameter first
    return is_traceable_wrapper_subclass(tensor)


def _of_function(path: str, item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, types.MethodType):
        yield path, item.__self__
        yield path, item.__func__
    elif isinstance(item, functools.partial):
        yield from ((path, each) for each in (item.func, item.args, item.keywords))
    elif isinstance(item, types.FunctionType) and _is_users(item.__code__.co_filename):
        named = zip(item.__code__.co_freevars, item.__closure__ or (), strict=True)
        for name, cell in named:
            yield f"{path}.{name}", cell
    elif isinstance(item, types.CellType):
        try:
            yield path, item.cell_contents
        except ValueError:  # the variable has no value yet
            return


def _is_users(filename: str) -> bool:
    return filename.startswith("<") or not is_library_file(filename)


def attributes_of(item: Any, data: bool = False) -> dict[str, Any] | None:
    """The dictionary of a module's attributes, or of those of an object of a class of the user's; None for others."""
    attributes = getattr(item, "__dict__", None)
    if type(attributes) is not dict or isinstance(item, Tensor):
        return None
    if isinstance(item, nn.Module):
        return attributes
    return attributes if _is_entered(item, data) else None


def slots_of(item: Any) -> list[tuple[str, Any]]:
    """The attributes of an object that its class keeps in slots, those that have a value."""
    return [(name, value) for name, _, value in filled_slots(item)]


def filled_slots(item: Any) -> list[tuple[str, types.MemberDescriptorType, Any]]:
    """Name, descriptor and value of each slot of an object that has one."""
    if not isinstance(item, nn.Module) and not _is_entered(item, False):
        return []
    kind: type = type(item)
    found = []
    for slot in slots_of_class(kind):
        try:
            found.append((slot.__name__, slot, slot.__get__(item)))
        except AttributeError:
            continue
    return found


def has_slots(item: Any) -> bool:
    """Whether the class of an object has slots."""
    kind: type = type(item)
    return bool(slots_of_class(kind))


@functools.lru_cache(maxsize=4096)
def slots_of_class(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    """The slots of a class and of those that it derives from; not those of C's structures."""
    own = [each for each in kind.__mro__ if "__slots__" in vars(each)]
    return tuple(slot for each in own for slot in vars(each).values() if isinstance(slot, types.MemberDescriptorType))


def _is_entered(item: Any, data: bool) -> bool:
    kind: type = type(item)
    if not _may_be_entered(kind) or (isinstance(item, _DATA) and not data):
        return False
    return not any(isinstance(each, _ALIVE) for each in (getattr(item, "__dict__", None) or {}).values())


@functools.lru_cache(maxsize=4096)
def _may_be_entered(kind: type) -> bool:
    without = kind.__module__.partition(".")[0] in _NO_STATE
    return not without and not issubclass(kind, (type, types.ModuleType, Tensor, *_ALIVE))


def what_cannot_be_copied(model: nn.Module) -> str:
    """The first tensor or other object that copy.deepcopy refuses, as it follows "cannot be copied"; empty if none."""
    for path, item in reached(every_module(model), functions=False):
        holds_others = isinstance(item, (nn.Module, *CONTAINERS)) or attributes_of(item) is not None
        if not holds_others:
            try:
                copy.deepcopy(item)
            except Exception:  # whatever the user's classes raise
                return f": {path}, a {type(item).__name__}"
    return ""


def every_module(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its first name: those registered, then those that plain containers of theirs hold.

    The latter, e.g. ``blocks[0]`` of a list, are reached by no ``train()``, ``state_dict()`` or ``to()``.
    """
    found = dict(model.named_modules())
    known = {id(module) for module in found.values()}
    waiting = list(found.items())
    while waiting:
        name, module = waiting.pop(0)
        for attribute, value in module.__dict__.items():
            if attribute in INTERNAL:
                continue
            for path, held in _held(value, dotted(name, attribute)):
                inner = [(dotted(path, below) if below else path, each) for below, each in held.named_modules()]
                new = [(path, each) for path, each in inner if id(each) not in known]
                known.update(id(each) for _, each in new)
                found.update(new)
                waiting += new
    return found


def _held(value: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a container or plain object and in those within it, with the way to each.

    Objects behind an object are not looked into: what these refer to need not be part of the model.
    """
    seen: set[int] = set()
    waiting = deque([(path, value, True)])
    while waiting:
        path, content, outer = waiting.popleft()
        inside = content if isinstance(content, CONTAINERS) else attributes_of(content) if outer else None
        if id(content) in seen or inside is None or isinstance(content, nn.Module):
            continue
        seen.add(id(content))
        within = inside is content
        for key, item in inside.items() if isinstance(inside, Mapping) else enumerate(inside):
            if isinstance(item, (*_PLAIN, Tensor)):
                continue
            place = f"{path}[{key!r}]" if within else dotted(path, str(key))
            if isinstance(item, nn.Module):
                yield place, item
            else:
                waiting.append((place, item, outer and within))
