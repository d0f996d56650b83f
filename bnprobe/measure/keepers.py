"""Keepers: one function for each kind of state, which gives what puts it back, bit by bit.

``keep`` finds the one for an object. What is put back is written only where it differs: an object that nobody changed
is not touched, nor is the version of a tensor that a graph of the user's holds.
"""

from __future__ import annotations

import array
import copy
import itertools
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _python_dispatch as dispatch

from bnprobe.errors import ModelError
from bnprobe.measure.interrupts import Restore
from bnprobe.measure.reach import (
    CONTAINERS,
    Reached,
    attributes_of,
    filled_slots,
    has_slots,
    slots_of_class,
    wraps_tensors,
)


def keep_structure(item: Any) -> Iterator[Restore]:
    """What puts back which objects an object holds: attributes, slots, items, its class."""
    if isinstance(item, nn.Module):
        yield _keep_class(item)
    if isinstance(item, torch.jit.ScriptModule):
        yield from _keep_script(item)
    if isinstance(item, Tensor):
        yield from _keep_marks(item)
    attributes = vars(item) if isinstance(item, Tensor) else attributes_of(item)
    if attributes is not None:
        yield _keep_items(attributes)
    if has_slots(item):
        yield _keep_slots(item)
    if isinstance(item, dict | list | set | deque):
        yield _keep_items(item)
    elif isinstance(item, types.CellType):
        yield _keep_cell(item)


def keep_values(item: Any) -> Restore | None:
    """What puts back the value of an object; None where it has none of its own."""
    if isinstance(item, (nn.Module, *CONTAINERS)):  # most of what a model holds
        return None
    if isinstance(item, Tensor):
        return keep_tensor(item)
    if isinstance(item, np.ndarray):
        return _keep_array(item)
    if isinstance(item, bytearray | array.array):
        return _keep_bytes(item)
    return keep_generator(item)


def keep(reached: list[Reached]) -> list[Restore]:
    """What puts back all that was reached, in this order: what there is first, then the values that it has.

    Raises:
        ModelError: Something cannot be kept; says which, and what to do.
    """
    structure: list[Restore] = []
    values: list[Restore] = []
    for path, item in reached:
        structure += keep_structure(item)
        try:
            value = keep_values(item)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise _refusal(path, item, error) from error
        if value is not None:
            values.append(value)
    # A gradient, which is reached after its tensor, has its form back before it is given to it.
    return [*structure, *reversed(values)]


def _refusal(path: str, item: Any, error: Exception) -> ModelError:
    name = path or "The model"
    if isinstance(item, Tensor) and item.is_meta:
        return ModelError(
            f"{name} is on the meta device, where tensors have no values, so the model cannot run. Allocate it with"
            " to_empty(), and load its weights. Nothing was run."
        )
    kind = type(item).__name__
    if isinstance(item, Tensor):
        kind += f" of layout {str(item.layout).removeprefix('torch.')} on {item.device}"
    return ModelError(
        f"{name} is a {kind}, of which bnprobe cannot keep a copy, so it could not give the model back unchanged"
        f" ({str(error).splitlines()[0]}). Give the model a dense tensor in its place, or take it out while bnprobe"
        " runs. Nothing was run."
    )


# Which objects there are


def _keep_class(module: nn.Module) -> Restore:
    kind, training = type(module), module.training

    def restore() -> None:
        if type(module) is not kind:
            object.__setattr__(module, "__class__", kind)  # past a class that takes no attributes
        if module.training != training:  # of a script, no dictionary holds it
            set_flag(module, training)

    return restore


def set_flag(module: nn.Module, training: bool) -> None:
    """Set the training flag of a module, also of one that takes no attributes."""
    try:
        module.training = training
    except (AttributeError, TypeError):
        vars(module)["training"] = training


def _keep_script(module: torch.jit.ScriptModule) -> Iterator[Restore]:
    """Plain attributes of a script, which C++ holds."""
    for name in module._concrete_type.get_attributes():
        value = getattr(module, name, None)
        if isinstance(value, int | float | str | list | dict):
            yield partial(setattr, module, name, copy.deepcopy(value))


def _keep_marks(tensor: Tensor) -> Iterator[Restore]:
    """The hooks of a tensor."""
    hooks = tensor._backward_hooks
    kept = None if hooks is None else OrderedDict(hooks)

    def restore() -> None:
        if tensor._backward_hooks is not hooks:
            tensor._backward_hooks = hooks
        if hooks is not None and kept is not None and not same_items(hooks, list(kept.items())):
            refill(hooks, list(kept.items()))

    yield restore


def items_of(container: Any) -> list[Any]:
    """What a container holds, whatever a class of the user's makes of reading it."""
    if isinstance(container, dict):
        return list(_base(container).items(container))
    return list(_base(container).__iter__(container))


_KINDS = (OrderedDict, dict, list, set, deque)


def _base(container: Any) -> Any:
    kind = type(container)
    return kind if kind in _KINDS else next(each for each in _KINDS if isinstance(container, each))


def same_items(container: Any, items: Sequence[Any]) -> bool:
    """Whether a container holds these very objects, in this order."""
    now = items_of(container)
    if len(now) != len(items):
        return False
    if isinstance(container, dict):
        return all(map(is_, chain.from_iterable(now), chain.from_iterable(items)))
    return all(map(is_, now, items)) or (isinstance(container, set) and set(map(id, now)) == set(map(id, items)))


def refill(container: Any, items: Sequence[Any]) -> None:
    """Put items back into the same container, whatever a class of the user's makes of writing to it."""
    kind = _base(container)
    kind.clear(container)
    if isinstance(container, dict):
        for key, value in items:
            kind.__setitem__(container, key, value)
    elif isinstance(container, set):
        set.update(container, items)
    else:
        kind.extend(container, items)


def _keep_items(container: Any) -> Restore:
    items = tuple(items_of(container))
    counters = [(place, counter) for place, item in enumerate(items) if (counter := _counter_of(item)) is not None]
    if counters:
        return _keep_counters(container, list(items), counters)
    return partial(_put_back_items, container, items)


def _put_back_items(container: Any, items: Sequence[Any]) -> None:
    if not same_items(container, items):
        refill(container, items)


def _keep_counters(container: Any, items: list[Any], counters: list[tuple[int, itertools.count[int]]]) -> Restore:
    """Of a container with counters among its items."""
    before = [(place, counter, copy.copy(counter)) for place, counter in counters]

    def restore() -> None:
        for place, counter, kept in before:
            if repr(counter) != repr(kept):  # it cannot be turned back: the container gets another one
                items[place] = (items[place][0], kept) if isinstance(container, dict) else kept
        _put_back_items(container, items)

    return restore


def _counter_of(item: Any) -> itertools.count[int] | None:
    """The counter that an item of a container, or of a dictionary with its key, is."""
    value = item[1] if type(item) is tuple and len(item) == 2 else item
    return value if isinstance(value, itertools.count) else None


def _keep_slots(item: Any) -> Restore:
    kind: type = type(item)
    filled = {slot: value for _, slot, value in filled_slots(item)}

    def restore() -> None:
        now = {slot: value for _, slot, value in filled_slots(item)}
        for slot in slots_of_class(kind):
            if slot in now and slot not in filled:
                slot.__delete__(item)
            elif slot in filled and (slot not in now or now[slot] is not filled[slot]):
                slot.__set__(item, filled[slot])

    return restore


def _keep_cell(cell: types.CellType) -> Restore:
    try:
        content = cell.cell_contents
    except ValueError:  # the variable has no value yet
        return lambda: None

    def restore() -> None:
        cell.cell_contents = content

    return restore


# The values that they have


def keep_generator(item: Any) -> Restore | None:
    """What puts back a generator of random numbers; None for anything else."""
    if isinstance(item, torch.Generator):
        return partial(item.set_state, item.get_state())
    if isinstance(item, random.Random):
        return partial(item.setstate, item.getstate())
    if isinstance(item, np.random.RandomState):
        return partial(item.set_state, item.get_state())
    if isinstance(item, np.random.Generator):
        return partial(setattr, item.bit_generator, "state", copy.deepcopy(item.bit_generator.state))
    if isinstance(item, np.random.BitGenerator):
        return partial(setattr, item, "state", copy.deepcopy(item.state))
    return None


def _keep_array(values: np.ndarray[Any, Any]) -> Restore | None:
    if isinstance(values, np.memmap) or not values.flags.writeable:
        return None  # a file, which may be any size; or what cannot be written to
    kept, shape, strides = values.copy(order="K"), values.shape, values.strides

    def restore() -> None:
        if values.shape != shape or values.strides != strides:
            values.resize(shape, refcheck=False)
        if values.dtype == object:
            changed = not all(map(is_, values.flat, kept.flat))
        else:
            changed = values.tobytes() != kept.tobytes()
        if changed:
            np.copyto(values, kept)

    return restore


def _keep_bytes(values: Any) -> Restore:
    kept = bytes(values)

    def restore() -> None:
        if bytes(values) != kept:
            del values[:]
            values.extend(kept) if isinstance(values, bytearray) else values.frombytes(kept)

    return restore


def keep_tensor(tensor: Tensor) -> Restore:
    """What puts back the memory, form, gradient and flags of a tensor.

    Raises:
        RuntimeError, NotImplementedError: Its values cannot be copied.
    """
    if is_lazy(tensor):
        return _keep_lazy(tensor)
    if wraps_tensors(tensor):  # its inner tensors are reached by themselves
        return lambda: None
    if tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]
        return _keep_opaque(tensor)
    return KeptTensor(tensor)


class KeptTensor:
    """Puts back the memory, form, gradient and flags of a tensor.

    Attributes:
        tensor: The tensor.
        values: Copies in host memory of the parts of its memory, as ``parts_of`` gives them.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._data = tensor, tensor.data
        self.values = [part.to("cpu", copy=True) for part in parts_of(self._data)]
        self._form = _form(tensor)
        self._memory = None if _has_parts(tensor) else self._data.untyped_storage().nbytes()
        self._grad, self._requires_grad = tensor.grad if tensor.is_leaf else None, tensor.requires_grad

    def __call__(self) -> None:
        tensor, data = self.tensor, self._data
        if self._memory is not None and data.untyped_storage().nbytes() != self._memory:
            data.untyped_storage().resize_(self._memory)
        if _form(tensor) != self._form:
            tensor.data = data
        with torch.no_grad():
            for here, values in zip(parts_of(tensor.data), self.values, strict=True):
                if not same_bits(here, values):
                    here.copy_(values)
        set_requires_grad(tensor, self._requires_grad)
        if tensor.is_leaf and tensor.grad is not self._grad:
            tensor.grad = self._grad


def set_requires_grad(tensor: Tensor, requires_grad: bool) -> None:
    """Set whether a leaf requires a gradient."""
    if tensor.is_leaf and tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)


def _keep_opaque(tensor: Tensor) -> Restore:
    """Of a tensor whose memory is laid out for a library."""
    data, kept = tensor.data, tensor.detach().clone()

    def restore() -> None:
        if not same_bits(flat(tensor.detach().to_dense()), flat(kept.to_dense())):
            tensor.data = data
            with torch.no_grad():
                data.copy_(kept)

    return restore


def _keep_lazy(tensor: Tensor) -> Restore:
    kind, empty = type(tensor), tensor.data

    def restore() -> None:
        if type(tensor) is not kind:
            tensor.data = empty
            tensor.__class__ = kind

    return restore


def _has_parts(tensor: Tensor) -> bool:
    return bool(tensor.is_nested or tensor.layout is not torch.strided)


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Flat views of all memory that a tensor without a graph uses: of a sparse one, its indices and values."""
    if tensor.is_nested:
        return [flat(tensor.values())]
    if tensor.layout is torch.sparse_coo:
        return [flat(tensor._indices()), flat(tensor._values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [flat(part) for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values())]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [flat(part) for part in (tensor.ccol_indices(), tensor.row_indices(), tensor.values())]
    return [flat(tensor)]


def flat(tensor: Tensor) -> Tensor:
    """A view of one axis; of an expanded tensor, or one with gaps, all memory from its first value to its last."""
    if tensor.numel() == 0 or tensor.is_contiguous():
        return tensor.reshape(-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,))


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor in its own memory from one that was moved, resized or replaced."""
    parts = [(part.data_ptr(), part.numel()) for part in parts_of(tensor.data)]
    strides = None if _has_parts(tensor) else tensor.stride()
    shape = None if tensor.is_nested else tensor.shape
    coalesced = tensor.layout is torch.sparse_coo and tensor.is_coalesced()
    return tensor.device, tensor.dtype, tensor.layout, shape, strides, parts, coalesced


def same_bits(one: Tensor, values: Tensor) -> bool:
    """Equality of the bits of flat tensors: -0.0 is not 0.0, and a NaN is itself."""
    if one.shape != values.shape:
        return False
    if one.numel() == 0:
        return True
    here = one.cpu()
    if here.is_quantized:
        here, values = here.int_repr(), values.int_repr()
    if here.dtype.is_complex:
        here, values = (torch.view_as_real(each.resolve_conj()).reshape(-1) for each in (here, values))
    return torch.equal(_bits(here.resolve_neg()), _bits(values.resolve_neg()))


def _bits(flattened: Tensor) -> Tensor:
    wide = flattened.numel() * flattened.element_size() % 8 == 0 and flattened.data_ptr() % 8 == 0
    return flattened.view(torch.int64 if wide else torch.uint8)


# The process


def keep_process() -> list[Restore]:
    """What puts back the modes of torch that this thread has: gradients, autocast, interceptors, eager running.

    They are put back by blocks of their own, which Ctrl-C may leave without their end.
    """
    return [_keep_modes(), _keep_autocast(), _keep_stance(), partial(torch.set_grad_enabled, torch.is_grad_enabled())]


def _keep_modes() -> Restore:
    functions, dispatches = _function_modes(), list(dispatch._get_current_dispatch_mode_stack())

    def restore() -> None:
        _reset(functions, _function_modes, torch.overrides._pop_mode, torch.overrides._push_mode)
        _reset(dispatches, dispatch._get_current_dispatch_mode_stack, dispatch._pop_mode, dispatch._push_mode)

    return restore


def _function_modes() -> list[Any]:
    return list(torch.overrides._get_current_function_mode_stack())


def _reset(
    stack: list[Any], current: Callable[[], list[Any]], pop: Callable[[], Any], push: Callable[[Any], object]
) -> None:
    now = list(current())
    same = next((at for at, pair in enumerate(zip(now, stack, strict=False)) if pair[0] is not pair[1]), None)
    same = min(len(now), len(stack)) if same is None else same
    for _ in now[same:]:
        pop()
    for mode in stack[same:]:
        push(mode)


def _keep_autocast() -> Restore:
    devices = ("cpu", "cuda")
    kept = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    cache, depth = torch.is_autocast_cache_enabled(), _autocast_depth()

    def restore() -> None:
        for device, enabled, dtype in kept:
            if torch.is_autocast_enabled(device) != enabled:
                torch.set_autocast_enabled(device, enabled)
            if torch.get_autocast_dtype(device) != dtype:
                torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cache)
        for _ in range(_autocast_depth() - depth):
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()

    return restore


def _autocast_depth() -> int:
    depth: int = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def _keep_stance() -> Restore:
    """Whether torch.compile compiles."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:
        return lambda: None
    return partial(frames._set_stance, frames._stance)
