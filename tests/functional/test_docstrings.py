"""The examples in the docstrings of the public functions run, and every function has one."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnprobe

FUNCTIONS = [name for name in bnprobe.__all__ if inspect.isfunction(getattr(bnprobe, name))]


def names(folder: Path) -> dict[str, Any]:
    """What the examples speak of: a model that is trained in large batches, and a loader of single pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    images = torch.randn(64, 3, 1, 1)
    for _ in range(200):
        model(images)
    loader = DataLoader(TensorDataset(images, torch.arange(64) % 2), batch_size=32, shuffle=True)
    return {"bnprobe": bnprobe, "model": model, "loader": loader, "folder": folder}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(bnprobe, name), name, globs=names(tmp_path))
    assert found.examples
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found)
    assert results.failed == 0


def test_the_public_names_are_what_completion_shows() -> None:
    assert dir(bnprobe) == sorted(bnprobe.__all__)
    assert all(hasattr(bnprobe, name) for name in bnprobe.__all__)


@pytest.mark.parametrize("name", ["scan", "sweep", "recalibrate", "export"])
def test_calls_have_one_style(name: str) -> None:
    """Model, batches, batch size, where a call takes them; all else by keyword."""
    signature = inspect.signature(getattr(bnprobe, name))
    positional = [each.name for each in signature.parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert [each for each in positional if each != "path"] == ["model", "batches", "batch_size"]
