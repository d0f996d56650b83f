"""Read a weights file, without running code from it unless the user allows it."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint

from bnprobe.errors import CheckpointError
from bnprobe.loading.keys import CONVERTED
from bnprobe.targets import nearest_file
from bnprobe.usercode import user_code

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
        return _read_safely(path)
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


def _read_safely(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols: success, or the error, says enough
        return torch.load(path, map_location="cpu", weights_only=True)


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
    names = _unsafe_globals(path, error)
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


def _unsafe_globals(path: Path, error: pickle.UnpicklingError) -> list[str]:
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError):  # not a zip archive: the message names the first one
        return re.findall(r"GLOBAL (\S+)", str(error))[:1]


def _damaged(path: Path, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    reason = reason.split(". ")[0]  # what follows is PyTorch's own advice, cut off at its line
    return (
        f"The checkpoint {path} ({path.stat().st_size} bytes) could not be read: it is truncated, damaged, "
        f"or neither safetensors nor a torch.save file ({reason[:200].rstrip('.')}). Save or copy it again."
    )
