"""Key prefixes in a state dict: those that DataParallel, DDP and torch.compile add, and the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bnprobe.errors import CheckpointError

WRAPPERS = ("module.", "_orig_mod.")

CONVERTED = "bnprobe.converted"
"""Metadata key that marks a safetensors file as unfit for plain BN: JSON with ``to`` and ``layers``."""


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
