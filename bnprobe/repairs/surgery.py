"""Put a layer in another's place, wherever that stands, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bnprobe.norms.lookalikes import lookalike_reason
from bnprobe.repairs.beyond import HOOKS, apply_children, further_work

Replacements = Mapping[nn.Module, nn.Module]

_MACHINERY = frozenset(vars(nn.Module()))
"""What every module keeps in its ``__dict__``: none of it holds other modules but ``_modules``."""

_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def obstacle(module: nn.Module) -> str | None:
    """Why no repair can take this module's place, a clause; None if nothing speaks against it."""
    if any(is_lazy(tensor) for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]):
        return "is lazy and has not seen a batch yet: run the model once before converting it"
    if parametrize.is_parametrized(module):
        return "is parametrized (torch.nn.utils.parametrize): remove the parametrizations before converting it"
    if not isinstance(module, _BatchNorm):
        likeness = lookalike_reason(module)
        return f"is no Batch Normalization layer{f' ({likeness})' if likeness else ''}"
    return _own_state(module) or further_work(module)[1]


def succeed(replacement: nn.Module, module: _BatchNorm, applies_children: bool) -> nn.Module:
    """Give a replacement what its predecessor has beside the normalization: children, hooks, attributes, mode.

    Hooks are the same objects in the same dictionaries, so that handles which the user holds still remove them.

    Args:
        replacement: Made by a repair.
        module: What it replaces.
        applies_children: The module applies its children after normalizing (see ``further_work``).
    """
    for name, child in module._modules.items():
        replacement.add_module(name, child)
    for name in vars(module).keys() - vars(replacement).keys() - _settings_of_its_class(module):
        vars(replacement)[name] = vars(module)[name]
    for name in HOOKS:
        vars(replacement)[name] = vars(module)[name]
    if applies_children:
        replacement.register_forward_hook(apply_children, prepend=True)  # the user's hooks see what they used to see
    replacement.training = module.training
    return replacement


def replace_everywhere(root: nn.Module, replacements: Replacements) -> nn.Module:
    """Put every replacement in all places where its predecessor is registered or referred to.

    Places are those of registered submodules, all of them where a module is shared or stands under two names, and
    attributes of modules (a bound method too), also within lists, tuples and dictionaries. What other objects hold on
    to is not found.

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
    """The value, or what stands for it; lists and dictionaries are changed in place."""
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
    """What a layer has that a replacement would not: further tensors, methods of its own, hooks on its state."""
    tensors = {*module._parameters, *module._buffers} - _TENSORS - {"gate_logit"}
    if tensors:
        return f"has parameters or buffers that BN has not ({', '.join(sorted(tensors))})"
    missing = [name for name in ("weight", "bias") if name not in module._parameters]
    if missing:
        return f"has no parameter {missing[0]}: something (weight or spectral norm) computes it; remove that first"
    shadowed = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    if shadowed:
        return f"has its method {shadowed[0]} replaced on the instance, which would be lost"
    if any(vars(module).get(name) for name in _STATE_HOOKS):
        return "has state_dict hooks, which are bound to it: remove them before converting it"
    return None


def _settings_of_its_class(module: _BatchNorm) -> frozenset[str]:
    """Attributes of any layer of its class in torch or bnprobe: a replacement has its own, or no use for them."""
    base = next(kind for kind in type(module).__mro__ if kind.__module__.startswith(("torch.nn.", "bnprobe.nn.")))
    return frozenset(vars(base(1))) | {"_compiled_call_impl"}
