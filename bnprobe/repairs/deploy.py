"""From a converted model back to weights for the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.errors import RepairError
from bnprobe.nn.per_domain import DomainBatchNorm
from bnprobe.wording import from_python


@from_python
def deployable_state(converted: nn.Module, original: nn.Module, *, domain: int | None = None) -> dict[str, Tensor]:
    """The state_dict of a converted model for the original model with plain BN, which loads it strictly.

    The original with these weights gives the same output at inference as the converted model.

    Args:
        converted: Made from ``original`` by ``bnprobe.convert``, perhaps trained since.
        original: The model before; it is not changed.
        domain: Of layers with statistics per domain, whose statistics to take: the original then gives the output for
            data of this domain.

    Raises:
        RepairError: A layer is not BN at inference, or keys or shapes are not those of the original.
        UsageError: A layer has no such domain.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> repaired = bnprobe.convert(model)
        >>> model.load_state_dict(bnprobe.deployable_state(repaired, model))
        <All keys matched successfully>
    """
    here = dict(converted.named_modules(remove_duplicate=False))
    for name, layer in original.named_modules(remove_duplicate=False):
        if isinstance(layer, _BatchNorm) and name in here:
            _require_same_inference(name or "The model", here[name], layer, domain)
    state, expected = _without_training_only(converted), original.state_dict()
    if domain is not None:
        state |= _statistics_of(converted, domain)
    # A layer that did not count its updates does so once it is converted.
    counted = {key for key in state if key.rpartition(".")[2] == "num_batches_tracked"}
    state = {key: value for key, value in state.items() if key in expected or key not in counted}
    _require_same_keys(state, expected)
    return state


def on_host(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of a state's tensors on the CPU, each with memory of its own, as weights files need them."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def left_out(model: nn.Module) -> list[str]:
    """A sentence if a model's state holds something that a weights file cannot."""
    names = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if not names:
        return []
    return [
        f"The weights file lacks the entries of the model's state that are not tensors ({', '.join(names)}): load it"
        " with strict=False, and take these entries from your own checkpoint."
    ]


def _without_training_only(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict without what layers name in ``training_only``, such as the gates of gated BN."""
    state = dict(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        for key in getattr(module, "training_only", ()):
            state.pop(f"{name}.{key}".removeprefix("."), None)
    return state


def _statistics_of(model: nn.Module, domain: int) -> dict[str, Tensor]:
    """The running statistics of one domain, by the names that they have in plain BN."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DomainBatchNorm):
            names = ("running_mean", "running_var", "num_batches_tracked")
            for key, value in zip(names, module.statistics_of(domain), strict=True):
                found[f"{name}.{key}".removeprefix(".")] = value.detach()
    return found


def _require_same_inference(name: str, converted: nn.Module, original: _BatchNorm, domain: int | None) -> None:
    kind = type(converted).__name__
    reason: str | None
    if not isinstance(converted, _BatchNorm):
        reason = f"is {kind}, which does not normalize like BN at inference"
    elif converted.eps != original.eps:
        reason = f"has eps {converted.eps:g}, and {original.eps:g} in the original"
    elif domain is not None and isinstance(converted, DomainBatchNorm):
        reason = None
    else:
        reason = getattr(converted, "deployment_obstacle", None)
    if reason:
        advice = "These weights are for the converted model alone, not for the original."
        if isinstance(converted, DomainBatchNorm) and converted.eps == original.eps:
            advice = "Say of which to take them, as in deployable_state(..., domain=0)."
        raise RepairError(f"{name} {reason}. {advice}")


def _require_same_keys(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key in [*expected, *state]:
        if key not in state or key not in expected:
            where = "the original" if key not in state else "the converted model"
            raise RepairError(f"The converted model was not made from this original model: only {where} has {key}.")
        shapes = [getattr(held[key], "shape", None) for held in (state, expected)]
        if shapes[0] != shapes[1]:
            raise RepairError(
                f"The converted model was not made from this original model: {key} has the shape"
                f" {tuple(shapes[0] or ())} there and {tuple(shapes[1] or ())} in the original."
            )
