"""The state of a run in progress, in a file to resume from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from bnprobe.errors import StateError, UsageError
from bnprobe.files import write_whole

_VERSION = 1


def save_state(path: Path, run: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a state whole or not at all.

    Args:
        path: The file.
        run: Which run the state is of.
        state: Tensors and plain types.

    Raises:
        OutputError: It could not be written; what was there before is still there.
    """
    write_whole(path, _bytes({"version": _VERSION, "run": run, "state": state}))


def load_state(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Read a state, on the CPU; nothing in the file is executed.

    Args:
        path: Written by ``save_state``.
        run: Which run it must be of.

    Raises:
        StateError: The file is damaged, or of another run; says in what it differs.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        with file:
            content = torch.load(file, map_location="cpu", weights_only=True)
        version, of, state = content["version"], content["run"], content["state"]
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise StateError(
            f"{path} is damaged, or no state of a training run ({type(error).__name__}). Start anew with --force."
        ) from None
    if version != _VERSION:
        raise StateError(f"{path} has format {version}; this bnprobe reads {_VERSION}. Start anew with --force.")
    _require_same(path, of, run)
    return dict(state)


def _require_same(path: Path, of: dict[str, Any], run: dict[str, Any]) -> None:
    differing = [key for key, value in run.items() if of.get(key) != value]
    if differing:
        words = "; ".join(f"{key} is {of.get(key)!r} there and {run[key]!r} here" for key in differing)
        raise StateError(
            f"{path} is of another run: {words}. Resume with the settings that it was begun with, or start anew with"
            " --force."
        )


def require_resumable(name: str, part: Any) -> None:
    """Refuse an optimizer or schedule whose state could not be saved, or not be read again safely.

    Args:
        name: "optimizer" or "schedule".
        part: Made already; None will do.

    Raises:
        UsageError: Says what is in the way.
    """
    if part is None:
        return
    key, remedy = f"train.{name}.target", "Choose another one, or give your class a state_dict() and load_state_dict()"
    if not all(callable(getattr(part, method, None)) for method in ("state_dict", "load_state_dict")):
        raise UsageError(f"{key}: {type(part).__name__} has no state to save, so a run could not be resumed. {remedy}.")
    try:
        torch.load(io.BytesIO(_bytes(part.state_dict())), weights_only=True)
    except Exception as error:  # pickle's and torch's own
        raise UsageError(
            f"{key}: the state_dict() of {type(part).__name__} holds what cannot be saved as plain numbers and tensors,"
            f" so a run could not be resumed ({str(error).splitlines()[0]}). {remedy} of numbers, strings, lists and"
            " tensors."
        ) from None


def _bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
