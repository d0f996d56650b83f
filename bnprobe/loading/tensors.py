"""Tensors in a file as a data set: of torch.save, NumPy or safetensors, with one row for each sample."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from bnprobe.config.spec import why_missing
from bnprobe.errors import DataError, first_line_of
from bnprobe.loading.model import kind_of
from bnprobe.loading.samples import why_unreadable
from bnprobe.paths import is_file, placed, short_path


class TensorSamples(Dataset[Any]):
    """The rows of tensors, in the structure that the file has: a tensor, a tuple or a dictionary of tensors.

    Args:
        rows: The tensors; all have the same first dimension.
    """

    def __init__(self, rows: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(_parts(self.rows)[0][1])

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.rows, Tensor):
            return self.rows[index]
        if isinstance(self.rows, dict):
            return {name: tensor[index] for name, tensor in self.rows.items()}
        return tuple(tensor[index] for tensor in self.rows)


def tensor_samples(name: str, key: str) -> TensorSamples:
    """The samples in a file.

    Nothing but tensors is read: a file that holds other objects is refused, and none of their code is run.

    Args:
        name: Path of the file, as the user wrote it.
        key: The key of the spec that names it, e.g. "data.tensors".

    Raises:
        DataError: The file cannot be read, or does not hold tensors with equally many rows.
    """
    path = placed(Path(name))
    if (missing := why_missing(path)) is not None:
        raise DataError(f"The file {name} ({key}) {missing}")
    if not is_file(path):
        raise DataError(f"{name} ({key}) is not a file. Name a file with tensors (.pt, .npz, .npy or .safetensors).")
    found = _checked(_read(path, f"{short_path(path)} ({key})"), f"{short_path(path)} ({key})")
    lengths = {place: len(tensor) for place, tensor in _parts(found)}
    if len(set(lengths.values())) > 1:
        words = ", ".join(f"{place}: {length}" for place, length in lengths.items())
        raise DataError(
            f"The tensors of {short_path(path)} ({key}) have different numbers of rows ({words}). Save them with one"
            " row for each sample."
        )
    return TensorSamples(found)


def _read(path: Path, name: str) -> Any:
    suffix = path.suffix.lower()
    try:
        if suffix == ".safetensors":
            return load_file(path, device="cpu")
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {each: from_array(archive[each]) for each in archive.files}
        if suffix == ".npy":
            return from_array(np.load(path, allow_pickle=False))
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{name} holds objects that are no tensors, which are not read, since that may run code. Save a tensor, or"
            " a tuple or dictionary of tensors, with torch.save."
        ) from None
    except (SafetensorError, zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        said = first_line_of(error)[:200].rstrip(".")
        raise DataError(f"{name} could not be read ({said}). Save it again.") from None


def from_array(array: np.ndarray) -> Any:
    """An array of numbers as a tensor; floating-point ones in the precision that models have."""
    if array.dtype.kind not in "biuf":
        return array
    is_longer = array.dtype.kind == "f" and array.dtype.itemsize > np.dtype(np.float32).itemsize
    return torch.from_numpy(array.astype(np.float32) if is_longer else array)


def _checked(found: Any, name: str) -> Any:
    """A tensor, a tuple or a dictionary of tensors with rows.

    Raises:
        DataError: It is something else; names the part.
    """
    if isinstance(found, list | tuple):
        found = tuple(found)
    elif isinstance(found, Mapping):
        found = {str(key): value for key, value in found.items()}
    for place, part in _parts(found):
        problem = f"{kind_of(part)}, not a tensor" if not isinstance(part, Tensor) else why_unreadable(part)
        if problem is None and not part.dim():
            problem = "a single number, not a tensor with a row for each sample"
        if problem:
            raise DataError(f"{name} holds {problem}{f', under {place}' if place else ''}. Save tensors alone.")
    if not _parts(found):
        raise DataError(f"{name} holds no tensor.")
    return found


def _parts(rows: Any) -> list[tuple[str, Any]]:
    """The tensors with their places."""
    if isinstance(rows, dict):
        return list(rows.items())
    if isinstance(rows, tuple):
        return [(str(index), part) for index, part in enumerate(rows)]
    return [("", rows)]
