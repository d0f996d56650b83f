"""Everything that a model, a loader and the process hold, as values that can be compared.

It is written without a look at how bnprobe restores anything: it walks from object to object, and knows no kinds of
state but those of torch, numpy and Python.
"""

from __future__ import annotations

import itertools
import random
import signal
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.Size, range)


def snapshot(*roots: Any) -> dict[str, Any]:
    """What the roots hold, by the way to each value; two are equal if nothing was changed in between."""
    found: dict[str, Any] = dict(_process())
    seen: dict[int, str] = {}
    places: dict[int, str] = {}  # memory by who is first to hold it: its address changes where it was resized and back
    kept: list[Any] = []  # so that no identity is given to a second object meanwhile
    waiting = deque((f"{type(root).__name__} {position}", root) for position, root in enumerate(roots))
    while waiting:
        path, value = waiting.popleft()
        if isinstance(value, _ATOMS):
            found[path] = value
            continue
        # A counter that has gone on cannot be turned back: another one takes its place.
        found[f"{path} is"] = type(value) if isinstance(value, itertools.count) else (id(value), type(value))
        if id(value) in seen:
            continue
        seen[id(value)] = path
        kept.append(value)
        content = _bits(value, partial(_place, places, path))
        if content is not None:
            found[f"{path} holds"] = content
        waiting.extend((f"{path}{name}", item) for name, item in _parts(value))
    return found


def _place(places: dict[int, str], path: str, address: int) -> str:
    return places.setdefault(address, path) if address else "nowhere"


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The ways to what is not as it was."""
    missing = object()
    return [path for path in {**before, **after} if not _same(before.get(path, missing), after.get(path, missing))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one.hex() == other.hex()
    return type(one) is type(other) and bool(one == other)


def _process() -> Iterator[tuple[str, Any]]:
    yield "random", random.getstate()
    state = np.random.get_state(legacy=False)
    yield "numpy", (state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"], state["gauss"])
    yield "torch", torch.get_rng_state().numpy().tobytes()
    if torch.cuda.is_initialized():
        yield "cuda", [each.cpu().numpy().tobytes() for each in torch.cuda.get_rng_state_all()]
    yield "grad mode", torch.is_grad_enabled()
    yield "inference mode", torch.is_inference_mode_enabled()
    for device in ("cpu", "cuda"):
        yield f"autocast {device}", (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    yield "autocast cache", torch.is_autocast_cache_enabled()
    functions = [
        torch.overrides._get_current_function_mode_stack(),
        _get_current_dispatch_mode_stack(),
    ]
    yield "modes", [[id(mode) for mode in stack] for stack in functions]
    yield "Ctrl-C", id(signal.getsignal(signal.SIGINT))
    yield "default dtype", torch.get_default_dtype()
    yield "threads", torch.get_num_threads()
    yield "deterministic", torch.are_deterministic_algorithms_enabled()
    yield "anomalies", torch.is_anomaly_enabled()
    frames = sys.modules.get("torch._dynamo.eval_frame")
    yield "torch.compile", frames._stance.stance if frames else "default"
    for name in sorted(vars(global_hooks)):
        if name.startswith("_global") and isinstance(vars(global_hooks)[name], dict):
            yield name, list(vars(global_hooks)[name])


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What hangs on an object, with names."""
    if isinstance(value, dict | types.MappingProxyType):
        for number, (key, item) in enumerate(value.items()):
            if not isinstance(key, _ATOMS):
                yield f".key {number}", key
            yield f"[{key!r}]" if isinstance(key, _ATOMS) else f"[{number}]", item
    elif isinstance(value, list | tuple | deque):
        yield from ((f"[{number}]", item) for number, item in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from ((f"{{{item!r}}}" if isinstance(item, _ATOMS) else f"{{{id(item)}}}", item) for item in value)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        yield from ((f".flat[{number}]", item) for number, item in enumerate(value.flat))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f"({name})", cell.cell_contents
            except ValueError:
                continue
    elif hasattr(value, "func") and type(value).__name__ == "partial":
        yield from ((f".{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    if isinstance(value, Tensor) and value.is_leaf and value.layout is torch.strided and not is_lazy(value):
        yield ".grad", value.grad
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType | type) or not _is_walked(value):
        return
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield from ((f".{name}", item) for name, item in attributes.items())
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            hidden = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, hidden):
                yield f".{name}", getattr(value, hidden)


_LIBRARIES = ("_io", "logging", "threading", "multiprocessing", "weakref", "_weakref", "queue", "concurrent", "inspect")


def _is_walked(value: Any) -> bool:
    root = type(value).__module__.partition(".")[0]
    if root in _LIBRARIES or isinstance(value, Tensor):
        return False
    return (
        root not in ("torch", "numpy")
        or isinstance(value, nn.Module)
        or type(value).__module__.startswith("torch.utils")
    )


Place = Callable[[int], str]


def _bits(value: Any, place: Place) -> Any:
    """The value of what is no container, bit by bit."""
    if isinstance(value, Tensor):
        return _tensor(value, place)
    if isinstance(value, np.ndarray):
        content = None if value.dtype == object else value.tobytes()
        return place(value.__array_interface__["data"][0]), value.shape, value.strides, value.dtype.str, content
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, torch.Generator):
        return value.get_state().cpu().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state(legacy=False))
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if type(value).__module__ == "array":
        return value.tobytes()
    if isinstance(value, torch.jit.ScriptModule):
        return [(name, _tensor(tensor, place)) for name, tensor in value.state_dict().items()]
    if isinstance(value, itertools.count):
        return repr(value)
    if isinstance(value, dict):
        return list(map(id, value)), len(value)
    if isinstance(value, list | tuple | deque | set | frozenset):
        return len(value), getattr(value, "maxlen", None)
    return None


def _tensor(tensor: Tensor, place: Place) -> Any:
    if is_lazy(tensor):
        return type(tensor)
    grad = tensor.grad if tensor.is_leaf and tensor.layout is torch.strided else None
    marks = tensor.requires_grad, tensor.is_inference(), tensor.dtype, str(tensor.device), tensor.layout, id(grad)
    if tensor.is_meta:
        return marks, tuple(tensor.shape)
    if tensor.is_nested:
        return marks, place(tensor.values().data_ptr()), _memory(tensor.values())
    if tensor.layout is torch._mkldnn:
        return marks, tuple(tensor.shape), _memory(tensor.to_dense())
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
        return (
            marks,
            tuple(tensor.shape),
            tensor.is_coalesced(),
            [(place(part.data_ptr()), _memory(part)) for part in parts],
        )
    if tensor.layout is not torch.strided:
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        compressed = tensor.crow_indices() if rows else tensor.ccol_indices()
        plain = tensor.col_indices() if rows else tensor.row_indices()
        parts = [compressed, plain, tensor.values()]
        return marks, tuple(tensor.shape), [(place(part.data_ptr()), _memory(part)) for part in parts]
    where = place(tensor.untyped_storage().data_ptr()), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    if tensor.is_quantized:
        return marks, where, tensor.qscheme(), _memory(tensor.int_repr())
    return marks, where, tensor.untyped_storage().nbytes(), _memory(tensor)


def _memory(tensor: Tensor) -> bytes:
    with torch.no_grad():
        plain = tensor.detach().as_subclass(Tensor).cpu().resolve_conj().resolve_neg().contiguous().clone()
    if plain.numel() == 0:
        return b""
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()
