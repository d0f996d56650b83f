"""Save and load the state of a run in progress, to resume it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from bnprobe.errors import StateError, UsageError
from bnprobe.files import write_whole

_VERSION = 1


def save_state(path: Path, run: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a state atomically.

    Args:
        path: File to write.
        run: Identity of the run.
        state: Tensors and plain types.

    Raises:
        OutputError: The file could not be written; a previous file is unchanged.
    """
    write_whole(path, _bytes({"version": _VERSION, "run": run, "state": state}))


def load_state(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Read a state onto the CPU; no code in the file is executed.

    Args:
        path: File written by ``save_state``.
        run: Identity of the run that it must belong to.

    Raises:
        StateError: The file is damaged or belongs to another run; the message says what differs.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        with file:
            content = torch.load(file, map_location="cpu", weights_only=True)
        version, of, state = content["version"], content["run"], content["state"]
    except Exception as error:  # a damaged file can make torch.load raise anything
        raise StateError(
            f"{path} is damaged, or not the state of a training run ({type(error).__name__}). Start over with --force."
        ) from None
    if version != _VERSION:
        raise StateError(f"{path} has format {version}; this bnprobe reads {_VERSION}. Start over with --force.")
    _require_same(path, of, run)
    return dict(state)


def _require_same(path: Path, of: dict[str, Any], run: dict[str, Any]) -> None:
    differing = [key for key, value in run.items() if of.get(key) != value]
    if differing:
        words = "; ".join(f"{key} was {of.get(key)!r} and is now {run[key]!r}" for key in differing)
        raise StateError(
            f"{path} belongs to a different run: {words}. Resume with the original settings, or start over with"
            " --force."
        )


def require_resumable(name: str, part: Any) -> None:
    """Reject an optimizer or schedule whose state cannot be saved, or cannot be loaded safely.

    Args:
        name: "optimizer" or "schedule".
        part: The optimizer or schedule; may be None.

    Raises:
        UsageError: The state cannot be saved; the message says why.
    """
    if part is None:
        return
    key, remedy = f"train.{name}.target", "Choose another one, or give your class a state_dict() and load_state_dict()"
    if not all(callable(getattr(part, method, None)) for method in ("state_dict", "load_state_dict")):
        raise UsageError(f"{key}: {type(part).__name__} has no state_dict(), so a run could not be resumed. {remedy}.")
    try:
        torch.load(io.BytesIO(_bytes(part.state_dict())), weights_only=True)
    except Exception as error:  # pickle's and torch's own
        raise UsageError(
            f"{key}: the state_dict() of {type(part).__name__} contains objects that cannot be saved safely,"
            f" so a run could not be resumed ({str(error).splitlines()[0]}). {remedy} of numbers, strings, lists and"
            " tensors."
        ) from None


def _bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
