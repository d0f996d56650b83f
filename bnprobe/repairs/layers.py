"""The norm layers of a model and their names; models that cannot be operated on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.errors import RepairError
from bnprobe.loading.model import unwrapped
from bnprobe.probing.layers import ROOT


@dataclass(frozen=True)
class NamedModule:
    """A module, and every name it has: ``name`` is the first, as reports have it."""

    name: str
    aliases: tuple[str, ...]
    module: nn.Module

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def kind(self) -> str:
        return type(self.module).__name__


def named_once(model: nn.Module) -> list[NamedModule]:
    """Every module once, in network order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name or ROOT)
    return [NamedModule(found[0], tuple(found[1:]), module) for module, found in names.items()]


def batch_norms(model: nn.Module) -> list[NamedModule]:
    """The layers of torch's BN family, subclasses included, in network order."""
    return [found for found in named_once(model) if isinstance(found.module, _BatchNorm)]


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that is a wrapper, or has one around BN layers, that would not see them change.

    Raises:
        RepairError: Names the wrapper and what to do instead.
    """
    for found in named_once(model):
        advice = _advice(found.module)
        if advice and (found.name == ROOT or _holds_norm(found.module)):
            place = "The model is" if found.name == ROOT else f"{found.name} is"
            raise RepairError(f"{place} wrapped in {found.kind}, which would not see its layers change: {advice}.")


def unknown_name(name: str, known: Iterable[str], what: str = "layer") -> RepairError:
    """The error that says what is nearest to a name or glob that nothing has."""
    nearest = difflib.get_close_matches(name, list(known), 1, cutoff=0.0)
    hint = f'; the nearest name is "{nearest[0]}"' if nearest else ""
    return RepairError(f'No {what} is called or matches "{name}"{hint}.')


def _holds_norm(module: nn.Module) -> bool:
    """Whether a BN layer is inside, a scripted one too."""
    kinds = (getattr(inner, "original_name", "") for inner in module.modules())
    return bool(batch_norms(module)) or any("BatchNorm" in str(kind) for kind in kinds)


def _advice(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "convert the model before torch.jit.script or torch.jit.trace"
    if unwrapped(module)[0] is not module:
        inside = "module" if hasattr(module, "module") and isinstance(module.module, nn.Module) else "_orig_mod"
        return f"convert the module inside (its attribute {inside}) before wrapping it"
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
        return "convert the model before wrapping it"
    return None
