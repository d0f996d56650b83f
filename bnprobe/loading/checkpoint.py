"""Load weights into the model: find the state dict, match its keys, check everything, and only then copy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.errors import CheckpointError
from bnprobe.loading.fit import check_fit
from bnprobe.loading.inspection import kind_of
from bnprobe.loading.keys import without_prefix, without_wrappers
from bnprobe.loading.weights import read_conversion, read_weights
from bnprobe.spec import CheckpointSpec
from bnprobe.usercode import user_code

ROOT = "(root)"
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def load_checkpoint(model: nn.Module, spec: CheckpointSpec) -> tuple[str, ...]:
    """Copy the weights of a file into the model. Without a path, do nothing.

    Args:
        model: Changed in place; left unchanged if anything is wrong.
        spec: Path, key, prefix, strictness.

    Returns:
        Notes on what was done, one sentence each.

    Raises:
        CheckpointError: The file cannot be read, or does not fit the model.
    """
    if spec.path is None:
        return ()
    path, notes = Path(spec.path), list[str]()
    state = _find_state(read_weights(path, spec.unsafe_load), spec.key, path, notes)
    _refuse_converted(path, model)
    if spec.strip_prefix:
        state = without_prefix(state, spec.strip_prefix, path)
    target = _own_state(model)
    state, stripped = without_wrappers(state, target)
    if stripped:
        notes.append(f"The prefixes {' and '.join(stripped)} were stripped from the keys of {path.name}.")
    state, fit_notes = check_fit(state, target, spec.strict, path)
    with user_code(f"loading the weights of {path} into the model"):
        model.load_state_dict(state, strict=False)
    return (*notes, *fit_notes)


def _refuse_converted(path: Path, model: nn.Module) -> None:
    """Reject weights of converted layers for a model with plain BN in their place: inference would differ."""
    conversion = read_conversion(path)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in conversion[1] if conversion else ():
        module = modules.get("" if name == ROOT else name)
        if conversion and isinstance(module, _BatchNorm) and not hasattr(module, "deployment_obstacle"):
            raise CheckpointError(
                f"{path} holds the weights of a model whose layers were converted to {conversion[0]}, but {name} is"
                f" {type(module).__name__} in this model, so inference would differ. Convert it in load_model():"
                f' bnprobe.convert(model, [...], to="{conversion[0]}").'
            )


def _own_state(model: nn.Module) -> dict[str, Any]:
    with user_code("calling state_dict() of the model"):
        return dict(model.state_dict(keep_vars=True))


def _find_state(saved: Any, key: str | None, path: Path, notes: list[str]) -> dict[str, Any]:
    if key is not None:
        saved = _pick(saved, key, path)
    if isinstance(saved, nn.Module):
        notes.append(f"{path.name} holds a whole {type(saved).__name__}; its state dict was used.")
        saved = saved.state_dict()
    if not isinstance(saved, Mapping) or not saved:
        inside = f" under the key {key}" if key else ""
        raise CheckpointError(f"{path} holds {kind_of(saved)}{inside}, not a state dict (name to tensor).")
    if _is_flat(saved):
        return dict(saved)
    return _unwrap(saved, key, path, notes)


def _unwrap(saved: Mapping[Any, Any], key: str | None, path: Path, notes: list[str]) -> dict[str, Any]:
    wrapper = next((name for name in _WRAPPERS if isinstance(saved.get(name), Mapping | nn.Module)), None)
    if wrapper is None:
        inside = f" under the key {key}" if key else ""
        raise CheckpointError(
            f"{path} holds no state dict{inside}. Its keys are {_listed(saved)}. Set checkpoint.key in the spec to "
            "the one that holds the weights."
        )
    notes.append(f'The weights were taken from the key "{wrapper}" of {path.name}.')
    return _find_state(saved[wrapper], None, path, notes)


def _is_flat(saved: Mapping[Any, Any]) -> bool:
    """Whether all values are tensors, apart from the extra state of modules."""
    values = [value for name, value in saved.items() if not str(name).endswith("_extra_state")]
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def _pick(saved: Any, key: str, path: Path) -> Any:
    """Look up ``"ema.model"``: the key of that name, or else the key "model" under the key "ema"."""
    if isinstance(saved, Mapping) and key in saved:
        return saved[key]
    head, dot, rest = key.partition(".")
    if dot and isinstance(saved, Mapping) and head in saved:
        return _pick(saved[head], rest, path)
    if not isinstance(saved, Mapping):
        raise CheckpointError(f'{path} has no key "{key}": it holds {kind_of(saved)} there, not a mapping.')
    close = difflib.get_close_matches(key, [str(name) for name in saved], 1)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    raise CheckpointError(f'{path} has no key "{key}".{hint} Its keys are {_listed(saved)}.')


def _listed(saved: Mapping[Any, Any]) -> str:
    names = [str(name) for name in saved]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
