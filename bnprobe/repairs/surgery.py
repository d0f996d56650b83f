"""Put a layer in the place of another one, everywhere in a model, and lose nothing of what it did.

A subclass of BN may do more than normalize. What it does is found out by running it: child modules that it applies
after normalizing are carried over, anything else is refused (docs/decisions/0015-subclasses-are-tried.md).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bnprobe.errors import message_of
from bnprobe.measure.norms import lookalike_reason
from bnprobe.measure.restore import preserved_random_state
from bnprobe.repairs.conversions import space_dimensions

Replacements = Mapping[nn.Module, nn.Module]

_MACHINERY = frozenset(vars(nn.Module()))
"""The attributes of every module; of these only ``_modules`` holds other modules."""

_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""The attributes in which a module keeps its hooks."""

_PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_SIDE = {1: 16, 2: 8, 3: 4}
_TOLERANCE = 1e-5
"""Relative to the largest output: float32 rounding stays below it, and any activation is far above."""


def obstacle(module: nn.Module) -> str | None:
    """Why nothing can replace this module, whatever the repair target, a clause; None if something can."""
    if any(is_lazy(tensor) for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]):
        return "is lazy and has not seen a batch yet: run the model once before converting it"
    if parametrize.is_parametrized(module):
        return "is parametrized (torch.nn.utils.parametrize): remove the parametrizations before converting it"
    if not isinstance(module, _BatchNorm):
        likeness = lookalike_reason(module)
        return f"is not a Batch Normalization layer{f' ({likeness})' if likeness else ''}"
    return _own_state(module) or _further_work(module)[1]


def succeed(replacement: nn.Module, module: _BatchNorm, with_children: bool) -> nn.Module:
    """Give a replacement what its predecessor has besides the normalization: children, hooks, attributes, mode.

    Hooks stay the same objects in the same dictionaries, so that the user's handles still remove them.

    Args:
        replacement: The new layer.
        module: The layer that it replaces.
        with_children: The module applies its children after normalizing, see ``applies_children``.
    """
    for name, child in module._modules.items():
        replacement.add_module(name, child)
    # Attributes of every layer of its class in torch or bnprobe: the replacement has its own, or does not need them.
    base = next(kind for kind in type(module).__mro__ if kind.__module__.startswith(("torch.nn.", "bnprobe.nn.")))
    common = {*vars(base(1)), "_compiled_call_impl"}
    for name in vars(module).keys() - vars(replacement).keys() - common:
        vars(replacement)[name] = vars(module)[name]
    for name in _HOOKS:
        vars(replacement)[name] = vars(module)[name]
    if with_children:
        replacement.register_forward_hook(_apply_children, prepend=True)  # the user's hooks see what they used to see
    replacement.training = module.training
    return replacement


def replace_everywhere(root: nn.Module, replacements: Replacements) -> nn.Module:
    """Put every replacement in all places of a model where its predecessor is registered or referred to.

    These are registered submodules, under all their names, and attributes of modules (also bound methods), even within
    lists, tuples and dictionaries. References held by other objects are not found.

    Returns:
        The root, or its replacement.
    """
    for parent in [*root.modules(), *replacements.values()]:
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
        for name in vars(parent).keys() - _MACHINERY:
            vars(parent)[name] = _replaced(vars(parent)[name], replacements, set())
    return replacements.get(root, root)


def _replaced(value: Any, replacements: Replacements, seen: set[int]) -> Any:
    """The value, or its replacement; lists and dictionaries are changed in place."""
    if isinstance(value, nn.Module):
        return replacements.get(value, value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and value.__self__ in replacements:
        return getattr(replacements[value.__self__], value.__name__)
    if not isinstance(value, list | tuple | dict) or id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, tuple):
        return _replaced_tuple(value, replacements, seen)
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        other = _replaced(item, replacements, seen)
        if other is not item:
            value[key] = other
    return value


def _replaced_tuple(value: tuple[Any, ...], replacements: Replacements, seen: set[int]) -> tuple[Any, ...]:
    items = [_replaced(item, replacements, seen) for item in value]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _own_state(module: _BatchNorm) -> str | None:
    """What tensors, methods or hooks on its state a replacement would lose, a clause; None if nothing is lost."""
    tensors = {*module._parameters, *module._buffers} - _TENSORS - {*getattr(module, "training_only", ())}
    if tensors:
        return f"has parameters or buffers that BN does not have ({', '.join(sorted(tensors))})"
    missing = [name for name in ("weight", "bias") if name not in module._parameters]
    if missing:
        return f"has no parameter {missing[0]}: something (weight or spectral norm) computes it; remove that first"
    shadowed = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    if shadowed:
        return f"has its method {shadowed[0]} replaced on the instance, which would be lost"
    if any(vars(module).get(name) for name in _STATE_HOOKS):
        return "has state_dict hooks, which are bound to it: remove them before converting it"
    return None


def _apply_children(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Forward hook of a replacement: applies its child modules to the output, in the order of their registration."""
    for child in module.children():
        output = child(output)
    return output


def _normalizes_only(module: _BatchNorm) -> bool:
    """Whether the layer's forward is known to normalize and nothing else, and its train() and eval() are torch's."""
    kind = type(module)
    author = next(each for each in kind.__mro__ if "forward" in vars(each))
    known = author in (_BatchNorm, nn.SyncBatchNorm) or vars(author).get("normalizes_only", False)
    return (
        known and kind.__call__ is nn.Module.__call__ and kind.train is nn.Module.train and kind.eval is nn.Module.eval
    )


def applies_children(module: _BatchNorm) -> bool:
    """Whether a layer applies its child modules to the normalized values."""
    return _further_work(module)[0]


def _further_work(module: _BatchNorm) -> tuple[bool, str | None]:
    """Whether a layer applies its children after normalizing; and why it cannot be replaced, or None.

    A subclass with a forward (or train, eval) of its own is run on random values, in eval and in train mode, and
    compared with BN alone and with BN followed by its children. Copies are run on the CPU, and the random state is
    restored.
    """
    if _normalizes_only(module):
        return False, None
    try:
        for children in (True, False):
            if _is_bn_with_children(module, children):
                return children, None
    except Exception as error:  # the user's own code, which need not like random values
        return (
            False,
            f"has a forward of its own, which failed on a random input ({type(error).__name__}: {message_of(error)})",
        )
    return False, "does more than normalize and apply its child modules; that would be lost"


@torch.no_grad()
def _is_bn_with_children(module: _BatchNorm, children: bool) -> bool:
    values = _random_input(module)
    modes = (False,) if isinstance(module, nn.SyncBatchNorm) else (False, True)  # which trains on CUDA alone
    for training in modes:
        own, plain = _bare_copy(module), _plain_twin(module, children)
        outputs = [_run(layer.train(training), values) for layer in (own, plain)]
        if not all(map(_alike, [outputs[0], *_statistics(own)], [outputs[1], *_statistics(plain)])):
            return False
    return True


def _statistics(module: nn.Module) -> list[Tensor]:
    """The running statistics. Whether a layer counts its updates changes nothing that it computes."""
    return [buffer for name, buffer in module.named_buffers(recurse=False) if name != "num_batches_tracked"]


def _bare_copy(module: _BatchNorm) -> _BatchNorm:
    """A copy on the CPU in float32, without hooks, which may refer to the whole model."""
    kept = [vars(module).get(name) for name in _HOOKS]
    memo: dict[int, Any] = {id(hooks): OrderedDict() for hooks in kept if isinstance(hooks, dict)}
    return copy.deepcopy(module, memo).to("cpu", torch.float32)


def _plain_twin(module: _BatchNorm, children: bool) -> nn.Module:
    """nn.BatchNorm in the same state, followed by copies of the layer's children."""
    own = _bare_copy(module)
    twin = _PLAIN[space_dimensions(module) or 2](own.num_features, own.eps, own.momentum, affine=False)
    twin.track_running_stats = own.track_running_stats
    for name, value in (*own._parameters.items(), *own._buffers.items()):
        setattr(twin, name, value)
    for name, child in own.named_children() if children else ():
        twin.add_module(name, child)
    twin.register_forward_hook(_apply_children)
    return twin


def _random_input(module: _BatchNorm) -> Tensor:
    """Values with twice the spread that the layer is used to, so that an activation shows."""
    space = space_dimensions(module) or 2
    generator = torch.Generator().manual_seed(0)
    shape = (4, module.num_features, *[_SIDE[space]] * space)
    values = 2 * torch.randn(shape, generator=generator)
    if module.running_mean is None or module.running_var is None:
        return values
    mean, variance = (
        torch.nan_to_num(buffer.detach().float().cpu()).view(-1, *[1] * space)
        for buffer in (module.running_mean, module.running_var)
    )
    return values * variance.clamp(min=0).sqrt() + mean


def _run(layer: nn.Module, values: Tensor) -> Tensor:
    with preserved_random_state():
        torch.manual_seed(0)
        output: Tensor = layer(values.clone())
    return output


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    scale = float(torch.nan_to_num(b.float()).abs().max()) if b.numel() else 0.0
    return torch.allclose(a.float(), b.float(), rtol=0, atol=_TOLERANCE * scale + 1e-30, equal_nan=True)
