"""Put everything back: the model, its hooks and flags, the random state, and the handling of Ctrl-C."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnprobe.measure.interrupts import Restore, Restoring
from bnprobe.measure.keepers import (
    KeptTensor,
    flat,
    keep,
    keep_generator,
    keep_process,
    keep_structure,
    keep_values,
    same_bits,
    set_flag,
    set_requires_grad,
)
from bnprobe.measure.reach import INTERNAL, every_module, reached, wraps_tensors


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


def preserved_random_state() -> Restoring:
    """Restore the random state when the block is done."""
    return Restoring(keep_random_state)


def preserved_process() -> Restoring:
    """Restore the random state and torch's modes: for what looks at a model without running it."""
    return Restoring(lambda: [*keep_process(), *keep_random_state()])


def keep_random_state() -> list[Restore]:
    """What puts the random state of torch (CPU, CUDA), numpy and random back."""
    if torch.cuda.is_available():
        torch.cuda.init()  # else a seed that the user set would still be waiting, and ours would replace it
    restores: list[Restore] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_initialized():
        restores.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return restores


def preserved_training_flags(model: nn.Module) -> Restoring:
    """Restore the training flag of every module when the block ends, also after an exception."""
    return Restoring(lambda: [partial(set_flag, module, module.training) for module in model.modules()])


def preserved_settings(model: nn.Module) -> Restoring:
    """Restore what a ``train()`` of the user's own may set: flags, attributes and requires_grad; no tensor's values."""
    if not any(map(_sets_more_than_flags, model.modules())):
        return preserved_training_flags(model)

    def save() -> list[Restore]:
        found = reached(every_module(model), functions=False)
        structure = [restore for _, item in found for restore in keep_structure(item)]
        return [*structure, *(partial(set_requires_grad, each, each.requires_grad) for each in model.parameters())]

    return Restoring(save)


def _sets_more_than_flags(module: nn.Module) -> bool:
    """Whether code of the user's runs when a module is put into train mode: of its class, or put onto it."""
    kind, own = type(module), nn.Module
    replaced = (kind.train, kind.eval, kind.__setattr__) != (own.train, own.eval, own.__setattr__)
    return replaced or not vars(module).keys().isdisjoint(("train", "eval"))


def held_in_eval(model: nn.Module) -> list[nn.Module]:
    """Modules that the user keeps in eval mode while training: those in eval mode beside a root in train mode."""
    return [module for module in model.modules() if model.training and not module.training]


def set_mode(model: nn.Module, training: bool, held: Iterable[nn.Module]) -> None:
    """Put a model into train or eval mode, as the user does: modules that are held in eval mode stay there."""
    model.train(training)
    for module in held:
        set_flag(module, False)


def untouched(model: nn.Module) -> Restoring:
    """Restore everything about ``model`` and the process that a forward pass may change, when the block ends.

    Parameters, buffers and all other tensors, their grad and requires_grad; every attribute of every module (training
    flags, momentum, hooks) and what hangs on them: containers in containers, arrays, generators of random numbers,
    objects with their attributes and slots, the variables that hooks close over. The random state of torch (CPU, CUDA),
    numpy and random, the grad mode and torch's other modes. Bit-identical, also after an exception or Ctrl-C. Costs a
    copy of the model's tensors in host memory. What is not kept is listed in docs/limits.md.

    Raises:
        ModelError: A tensor cannot be kept; before anything runs.
    """

    def save() -> list[Restore]:
        # A mode that was left on would see what puts the tensors back.
        return [*keep_process(), *keep(reached(every_module(model))), *keep_random_state()]

    return Restoring(save)


def undone_if_failed(model: nn.Module) -> Restoring:
    """Undo what the block did to a model and the process, unless it ends well: also where Ctrl-C comes at its very end.

    For blocks that change modules and buffers: the values of parameters and their gradients are not kept.
    """

    def save() -> list[Restore]:
        found = reached(every_module(model), functions=False)
        trained = [item for _, item in found if isinstance(item, nn.Parameter)]
        left_out = {id(tensor) for tensor in trained} | {id(tensor.grad) for tensor in trained}
        kept = keep([each for each in found if id(each.item) not in left_out])
        return [*keep_process(), *kept, *keep_random_state()]

    return Restoring(save, undo=True)


def preserved_generators(*holders: Any) -> Restoring:
    """Put back the generators of random numbers that hang on objects: of a loader, its samplers' and data set's too."""

    def save() -> Iterator[Restore]:
        roots = {str(position): holder for position, holder in enumerate(holders)}
        kept = (keep_generator(item) for _, item in reached(roots, functions=False, data=True))
        return (restore for restore in kept if restore is not None)

    return Restoring(save)


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
        kept: What ``untouched`` keeps of it, whose copies serve here too: no tensor has changed since.
    """

    def __init__(self, model: nn.Module, kept: Iterable[Restore] = ()) -> None:
        found = reached(every_module(model), functions=False)
        modules = [item for _, item in found if isinstance(item, nn.Module)]
        self._tensors = [item for _, item in found if isinstance(item, Tensor) and _can_be_copied(item)]
        trained = {id(tensor) for module in modules for tensor in module.parameters(recurse=False)}
        self._kept = {
            id(tensor): (tensor, tensor.detach().clone())
            for tensor in self._tensors
            if id(tensor) not in trained and tensor.numel() <= _SMALL
        }
        self._data: dict[int, Tensor] = {}
        originals = {id(each.tensor): each.values for each in kept if isinstance(each, KeptTensor)}
        self._originals = {id(tensor): originals[id(tensor)] for tensor in self._tensors if id(tensor) in originals}
        # The attributes of a lazy module are those of another class once it has run.
        self._attributes = [_Attributes(module) for module in modules if not _is_lazy(module)]
        own = {id(each) for module in modules for name, each in vars(module).items() if name in _NOT_PLAIN}
        own |= {id(each) for module in modules if _is_lazy(module) for each in (module._parameters, module._buffers)}
        within = [item for _, item in found if id(item) not in own and not isinstance(item, nn.Module | Tensor)]
        self._within = [restore for item in within for restore in _kept_between_passes(item)]
        self._generators = [item for item in within if keep_generator(item) is not None]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Find out which of the other tensors move while the block runs, and keep their values from before."""
        others = [tensor for tensor in self._tensors if id(tensor) not in self._kept]
        before = [self._original(tensor) for tensor in others]
        try:
            yield
        finally:
            for tensor, values in zip(others, before, strict=True):
                if not _is_there(tensor, values) or not same_bits(flat(tensor.data), flat(values)):
                    self._kept[id(tensor)] = (tensor, values.to(tensor.device, copy=True))

    def keep_generators(self) -> list[Restore]:
        """What puts back the model's own generators of random numbers, which otherwise go on from pass to pass."""
        return [restore for each in self._generators if (restore := keep_generator(each)) is not None]

    def _original(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, in host memory; not another copy where they are kept already."""
        for flat_values in self._originals.get(id(tensor), ()):
            if flat_values.shape == flat(tensor.data).shape:
                return flat_values.as_strided(tensor.shape, tensor.stride())
        return tensor.detach().to("cpu", copy=True)

    def accept_attributes(self) -> None:
        """Take the attributes as they are: a model's own ``train()`` may set some."""
        for attributes in self._attributes:
            attributes.accept()

    def put_back(self) -> None:
        """Put back attributes and kept tensors; the versions of these stay, for graphs that hold them."""
        for attributes in self._attributes:
            attributes.put_back()
        for restore in self._within:
            restore()
        here: list[Tensor] = []
        kept: list[Tensor] = []
        for tensor, values in self._kept.values():
            data = self._data_of(tensor, values)
            if data is None:
                tensor.data = values.clone()
            else:
                here.append(data)
                kept.append(values)
        if here:
            torch._foreach_copy_(here, kept)

    def _data_of(self, tensor: Tensor, values: Tensor) -> Tensor | None:
        """The data of a tensor, which has a version counter of its own; None where it was replaced or freed.

        It is not taken anew while the tensor stays in its place.
        """
        known = self._data.get(id(tensor))
        if known is not None and tensor.data_ptr() and _place(known) == _place(tensor):
            return known
        if not _is_there(tensor, values):
            return None
        self._data[id(tensor)] = tensor.data
        return self._data[id(tensor)]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _is_lazy(module: nn.Module) -> bool:
    return any(map(is_lazy, [*module.parameters(recurse=False), *module.buffers(recurse=False)]))


def _can_be_copied(tensor: Tensor) -> bool:
    """Whether a tensor is plain memory, each value in its own place."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    if wraps_tensors(tensor) or tensor.is_conj() or tensor.is_neg():
        return False
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return not (overlaps and tensor.numel())


def _is_there(tensor: Tensor, values: Tensor) -> bool:
    """Whether a tensor still is one of the same form, in memory that was not freed."""
    same = tensor.shape == values.shape and tensor.dtype == values.dtype
    return same and (tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0)


def _kept_between_passes(item: Any) -> Iterator[Restore]:
    """What puts back an object that hangs on a module; generators of random numbers go on from pass to pass."""
    yield from keep_structure(item)
    if isinstance(item, np.ndarray) and item.size <= _SMALL:
        restore = keep_values(item)
        if restore is not None:
            yield restore


class _Attributes:
    """The plain attributes of a module; not its modules, hooks and training flag."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = self._plain()

    def _plain(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self._module).items() if name not in _NOT_PLAIN}

    def accept(self) -> None:
        self._values = self._plain()

    def put_back(self) -> None:
        attributes = vars(self._module)
        for name in attributes.keys() - self._values.keys() - _NOT_PLAIN:
            del attributes[name]
        attributes.update(self._values)


_NOT_PLAIN = (INTERNAL - {"_parameters", "_buffers"}) | {"forward"}
"""Attributes that a module has of its class, and the one that a session sets."""
