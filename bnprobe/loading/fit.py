"""Check whether a state dict fits a model, and give the likeliest explanation if it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from bnprobe.errors import CheckpointError

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
        return _shape_explanation(shapes)
    return (
        "This looks like another version of the model. checkpoint.strict: false loads the keys that match; all BN"
        " buffers must still be in the file."
    )


def _shape_explanation(shapes: list[str]) -> str:
    layers = {name.split(" ")[0].rpartition(".")[0] for name in shapes}
    if len(layers) == 1:
        return f"Only {layers.pop()} differs: this looks like the same model with a different number of classes."
    return "This looks like the same model with other sizes: check model.args."


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
