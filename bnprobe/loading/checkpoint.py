"""The weights: read a checkpoint without running code, find the state dict in it, and load it into the model.

Where it does not fit, the error says what does not, and which prefix or key would make it fit.
"""

from __future__ import annotations

import difflib
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.serialization import get_unsafe_globals_in_checkpoint

from bnprobe.config.spec import CheckpointSpec, nearest_file
from bnprobe.config.targets import CONVERTED
from bnprobe.errors import CheckpointError
from bnprobe.loading.model import kind_of, user_code
from bnprobe.numbers import listed

WRAPPERS = ("module.", "_orig_mod.")


def without_prefix(state: Mapping[str, Any], prefix: str, path: Path) -> dict[str, Any]:
    """The state dict with the user's prefix removed from the keys that start with it.

    Raises:
        CheckpointError: No key starts with the prefix.
    """
    prefix = prefix if prefix.endswith(".") else f"{prefix}."
    if not any(key.startswith(prefix) for key in state):
        raise CheckpointError(
            f'No key of {path} starts with "{prefix}" (checkpoint.strip_prefix); the first key is {next(iter(state))}.'
        )
    return {key.removeprefix(prefix): value for key, value in state.items()}


def without_wrappers(state: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state dict under the model's own names, as far as prefixes of wrappers explain the difference.

    The way of removing prefixes that matches most keys is used; the keys stay unchanged if none matches more.

    Returns:
        The renamed state dict, and the prefixes that were removed.
    """
    best = dict(state)
    for rename in (*_leading(state), _everywhere(target)):
        renamed = {rename(key): value for key, value in state.items()}
        lossless = len(renamed) == len(state)
        if lossless and len(renamed.keys() & target.keys()) > len(best.keys() & target.keys()):
            best = renamed
    changed = [key for key in state if key not in best]
    return best, [prefix for prefix in WRAPPERS if any(prefix in key for key in changed)]


def _leading(state: Mapping[str, Any]) -> list[Callable[[str], str]]:
    """Renamings that remove one leading prefix from each key, or two, up to as many as are nested."""
    deepest = max((_depth(key) for key in state), default=0)
    return [partial(_strip, depth=depth) for depth in range(1, deepest + 1)]


def _depth(key: str) -> int:
    depth = 0
    while key.startswith(WRAPPERS):
        key, depth = key.split(".", 1)[1], depth + 1
    return depth


def _strip(key: str, depth: int) -> str:
    for _ in range(min(depth, _depth(key))):
        key = key.split(".", 1)[1]
    return key


def _everywhere(target: Mapping[str, Any]) -> Callable[[str], str]:
    """A renaming that ignores wrapper parts anywhere in a name, since a submodule alone may be wrapped."""
    names = {_bare(name): name for name in target}
    unique = len(names) == len(target)
    return lambda key: names.get(_bare(key), key) if unique else key


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if f"{part}." not in WRAPPERS)


_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"


def check_fit(
    state: Mapping[str, Any], target: Mapping[str, Any], strict: bool, path: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Compare names and shapes; nothing is copied.

    Args:
        state: State dict of the file.
        target: The model's state dict with its own tensors.
        strict: Whether missing parameters and unexpected keys are errors. Missing BN buffers and mismatched shapes
            always are.
        path: The file, for messages.

    Returns:
        The entries to load, and notes.

    Raises:
        CheckpointError: The state dict does not fit; the message lists the differences.
    """
    missing = _missing(state, target)
    counters = _old_format(missing, state)
    missing = [name for name in missing if name not in counters]
    unexpected = [name for name in state if name not in target]
    shapes = _other_shapes(state, target)
    statistics = [name for name in missing if name.endswith((*_STATISTICS, _COUNTER))]
    if shapes or statistics or (strict and (missing or unexpected)):
        raise CheckpointError(_message(path, missing, unexpected, shapes, state, target))
    usable = {name: value for name, value in state.items() if name in target}
    return usable, _notes(path, missing, unexpected, counters)


def _missing(state: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    """Names that are missing in the file; of a tensor with two names (tied weights) one is enough."""
    given = {id(target[name]) for name in state if name in target}
    return [
        name
        for name, value in target.items()
        if name not in state and id(value) not in given and not name.endswith("_extra_state")
    ]


def _old_format(missing: list[str], state: Mapping[str, Any]) -> list[str]:
    """Counters that files from before PyTorch 0.4.1 lack although they have the statistics."""
    if any(name.endswith(_COUNTER) for name in state):
        return []
    return [
        name for name in missing if name.endswith(_COUNTER) and name.removesuffix(_COUNTER) + "running_var" in state
    ]


def _other_shapes(state: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in state.items():
        own = target.get(name)
        if not isinstance(own, Tensor) or is_lazy(own):
            continue
        if not isinstance(value, Tensor):
            found.append(f"{name} (not a tensor, but {type(value).__name__})")
        elif value.shape != own.shape and not (value.numel() == own.numel() == 1):
            found.append(f"{name} (file {_size(value)}, model {_size(own)})")
    return found


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _message(
    path: Path,
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
    state: Mapping[str, Any],
    target: Mapping[str, Any],
) -> str:
    lines = [f"The checkpoint {path} does not fit the model."]
    for title, names in (("Missing", missing), ("Unexpected", unexpected), ("Different shape", shapes)):
        if names:
            lines.append(f"{title} ({len(names)}): {_first(names)}.")
    return "\n".join([*lines, _explanation(missing, unexpected, shapes, state, target)])


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _explanation(
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
    state: Mapping[str, Any],
    target: Mapping[str, Any],
) -> str:
    matched = len(state.keys() & target.keys())
    prefix = _common_prefix(state, target, matched)
    if prefix:
        return f'Its keys match without the prefix "{prefix}": set checkpoint.strip_prefix in the spec.'
    if matched < len(target) / 2:
        return "These look like the weights of a different model."
    if missing and not unexpected and all(name.endswith((*_STATISTICS, _COUNTER)) for name in missing):
        return (
            "This looks like parameters saved without buffers. BatchNorm needs its running statistics: save "
            "model.state_dict()."
        )
    if shapes and not missing and not unexpected:
        layers = {name.split(" ")[0].rpartition(".")[0] for name in shapes}
        if len(layers) == 1:
            return f"Only {layers.pop()} differs: this looks like the same model with a different number of classes."
        return "This looks like the same model with other sizes: check model.args."
    return (
        "This looks like another version of the model. checkpoint.strict: false loads the keys that match; all BN"
        " buffers must still be in the file."
    )


def _common_prefix(state: Mapping[str, Any], target: Mapping[str, Any], matched: int) -> str | None:
    """A prefix such as "model." or "net.backbone." that must be stripped for half of the model's keys to match."""
    prefixes = {key[: end + 1] for key in state for end, char in enumerate(key) if char == "."}
    counts = {
        prefix: sum(key.startswith(prefix) and key.removeprefix(prefix) in target for key in state)
        for prefix in sorted(prefixes, key=len)[:200]
    }
    best = max(counts, key=lambda prefix: counts[prefix], default=None)
    return best if best and counts[best] > max(matched, len(target) / 2) else None


def _notes(path: Path, missing: list[str], unexpected: list[str], counters: list[str]) -> tuple[str, ...]:
    notes = []
    if missing:
        notes.append(f"{path.name} lacks {len(missing)} keys; they keep the values of the model: {_first(missing)}.")
    if unexpected:
        notes.append(f"{len(unexpected)} keys of {path.name} were not used: {_first(unexpected)}.")
    if counters:
        notes.append(f"{path.name} has no update counters (num_batches_tracked), like files from before PyTorch 0.4.1.")
    return tuple(notes)


_READ_ERRORS = (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError)


def read_weights(path: Path, unsafe_load: bool) -> Any:
    """Read a safetensors file, or a torch.save file with weights_only=True, onto the CPU.

    Args:
        path: The weights file.
        unsafe_load: Whether a file with unsafe globals may be unpickled, which runs code from it.

    Raises:
        CheckpointError: The file does not exist, is damaged, or was refused.
        UserCodeError: Unpickling ran the user's code, which raised.
    """
    _check_file(path)
    if _is_safetensors(path):
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: success, or the error, says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        return _read_unsafe(path, unsafe_load, error)
    except _READ_ERRORS as error:
        raise CheckpointError(_damaged(path, error)) from None


def read_conversion(path: Path) -> tuple[str, list[str]] | None:
    """What the layers in a file were converted to, and their names; None if plain BN may load it.

    Args:
        path: A file that ``read_weights`` has read.
    """
    if not _is_safetensors(path):
        return None
    with safe_open(path, framework="pt") as file:
        mark = (file.metadata() or {}).get(CONVERTED)
    if mark is None:
        return None
    found = json.loads(mark)
    return found["to"], found["layers"]


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder. Name the weights file in it.")
    if not path.exists():
        raise CheckpointError(f"The checkpoint {path} does not exist. {nearest_file(path)}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"The checkpoint {path} is empty (0 bytes). Save or copy it again.")


def _is_safetensors(path: Path) -> bool:
    """Judge by the name, or by the start of the header: eight bytes of length, then JSON."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".safetensors" or file.read(10)[8:] == b'{"'
    except OSError as error:
        raise CheckpointError(f"The checkpoint {path} could not be opened: {error.strerror}.") from None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(_damaged(path, error)) from None


def _read_unsafe(path: Path, unsafe_load: bool, error: pickle.UnpicklingError) -> Any:
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError):  # not a zip archive: the message names the first one
        names = re.findall(r"GLOBAL (\S+)", str(error))[:1]
    if not names:
        raise CheckpointError(_damaged(path, error)) from None
    if not unsafe_load:
        raise CheckpointError(
            f"{path} was refused because loading it would run code from it. It contains the unsafe globals "
            f"{', '.join(names)}. "
            "Save only the weights (torch.save(model.state_dict(), ...)), or, if you trust the file, "
            "give --unsafe-load."
        ) from None
    try:
        with user_code(f"unpickling {path}"):
            return torch.load(path, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, EOFError) as damage:
        raise CheckpointError(_damaged(path, damage)) from None


def _damaged(path: Path, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    reason = reason.split(". ")[0]  # what follows is PyTorch's own advice, cut off at its line
    return (
        f"The checkpoint {path} ({path.stat().st_size} bytes) could not be read: it is truncated, damaged, "
        f"or neither safetensors nor a torch.save file ({reason[:200].rstrip('.')}). Save or copy it again."
    )


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
    with user_code("calling state_dict() of the model"):
        target = dict(model.state_dict(keep_vars=True))
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


def _find_state(saved: Any, key: str | None, path: Path, notes: list[str]) -> dict[str, Any]:
    if key is not None:
        saved = _pick(saved, key, path)
    if isinstance(saved, nn.Module):
        notes.append(f"{path.name} holds a whole {type(saved).__name__}; its state dict was used.")
        saved = saved.state_dict()
    if not isinstance(saved, Mapping) or not saved:
        inside = f" under the key {key}" if key else ""
        raise CheckpointError(f"{path} holds {kind_of(saved)}{inside}, not a state dict (name to tensor).")
    values = [value for name, value in saved.items() if not str(name).endswith("_extra_state")]
    if values and all(isinstance(value, Tensor) for value in values):
        return dict(saved)
    return _unwrap(saved, key, path, notes)


def _unwrap(saved: Mapping[Any, Any], key: str | None, path: Path, notes: list[str]) -> dict[str, Any]:
    wrapper = next((name for name in _WRAPPERS if isinstance(saved.get(name), Mapping | nn.Module)), None)
    if wrapper is None:
        inside = f" under the key {key}" if key else ""
        raise CheckpointError(
            f"{path} holds no state dict{inside}. Its keys are {listed([*map(str, saved)])}. Set checkpoint.key in the"
            " spec to the one that holds the weights."
        )
    notes.append(f'The weights were taken from the key "{wrapper}" of {path.name}.')
    return _find_state(saved[wrapper], None, path, notes)


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
    raise CheckpointError(f'{path} has no key "{key}".{hint} Its keys are {listed([*map(str, saved)])}.')
