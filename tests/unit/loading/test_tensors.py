"""Tensors in a file, and buffers that are drawn from, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bnprobe.config.spec import DataSpec
from bnprobe.errors import DataError
from bnprobe.loading.data import as_batch_source
from bnprobe.loading.source import load_held_out, load_source
from bnprobe.loading.tensors import tensor_samples

ROWS, LABELS = torch.arange(24.0).reshape(12, 2), torch.arange(12)


def saved(path: Path, name: str) -> str:
    """A file of each kind that can be read."""
    target = path / name
    if name.endswith(".npz"):
        np.savez(target, x=ROWS.double().numpy(), y=LABELS.numpy())
    elif name.endswith(".npy"):
        np.save(target, ROWS.numpy().astype(np.longdouble if target.stem == "long" else np.float64))
    elif name.endswith(".safetensors"):
        save_file({"x": ROWS, "y": LABELS}, target)
    else:
        kinds: dict[str, Any] = {"tensor": ROWS, "tuple": (ROWS, LABELS), "list": [ROWS, LABELS]}
        torch.save(kinds.get(target.stem, {"x": ROWS, "y": LABELS}), target)
    return str(target)


NAMES = ("tensor.pt", "tuple.pt", "list.pth", "dict.pt", "file.npz", "file.npy", "long.npy", "file.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_rows_come_in_the_structure_of_the_file(tmp_path: Path, name: str) -> None:
    samples = tensor_samples(saved(tmp_path, name), "data.tensors")
    assert len(samples) == 12
    third = samples[2]
    rows, label = third, 2
    if isinstance(third, dict):
        rows, label = third["x"], third["y"]
    elif isinstance(third, tuple):
        rows, label = third
    assert label == 2
    assert torch.equal(rows, torch.tensor([4.0, 5.0]))
    assert rows.dtype == torch.float32


def test_a_spec_names_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, "tuple.pt")
    source = load_source(DataSpec(batch_size=4, tensors=path), None)
    assert (source.batch_size, source.images, source.own_order) == (4, 12, False)
    batches = list(source.batches)
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(12))
    held_out = load_held_out(DataSpec(tensors=path), None, 3)
    assert held_out is not None
    assert held_out.batch_size == 3


def test_what_cannot_be_read(tmp_path: Path) -> None:
    def said(value: object, name: str = "file.pt") -> str:
        torch.save(value, tmp_path / name)
        return error(tmp_path / name)

    def error(path: Path) -> str:
        with pytest.raises(DataError) as raised:
            tensor_samples(str(path), "data.tensors")
        return str(raised.value)

    assert "(data.tensors) does not exist" in error(tmp_path / "none.pt")
    assert "is not a file" in error(tmp_path)
    assert "different numbers of rows (x: 12, y: 11)" in said({"x": ROWS, "y": LABELS[:11]})
    assert "holds an int, not a tensor, under epoch. Save tensors alone." in said({"x": ROWS, "epoch": 3})
    assert "holds a single number" in said(torch.tensor(1.0))
    assert "holds no tensor" in said({})
    assert "objects that are no tensors, which are not read" in said({"x": Path()})
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    assert "could not be read" in error(tmp_path / "bad.npz")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "could not be read" in error(tmp_path / "objects.npy")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    assert "holds a ndarray, not a tensor" in error(tmp_path / "words.npy")


class Buffer:
    """As reinforcement learning keeps transitions: nothing but ``sample(batch_size)``."""

    def __len__(self) -> int:
        return 100

    def sample(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch_size, 3), torch.zeros(batch_size)


def test_replay_buffers_are_drawn_from() -> None:
    source = as_batch_source(Buffer(), 5)
    iterator = iter(source.batches)
    assert [next(iterator)[0].shape for _ in range(30)] == [(5, 3)] * 30
    assert source.batch_size == 5
