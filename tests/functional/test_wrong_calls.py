"""Wrong calls of the functions of Python: what is wrong is said in terms of Python, all of it at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnprobe
from bnprobe.errors import BnprobeError, UsageError

MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
DATA = TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 2)
LOADER = DataLoader(DATA, 4)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "size 0": (lambda: bnprobe.scan(MODEL, LOADER, 0), "at least 1 for batch_size, but got 0"),
    "size as text": (lambda: bnprobe.scan(MODEL, LOADER, "2"), "whole number for batch_size"),  # type: ignore[arg-type]
    "no batches": (lambda: bnprobe.scan(MODEL, LOADER, num_batches=0), "at least 1 for num_batches, but got 0"),
    "misspelt": (lambda: bnprobe.scan(MODEL, LOADER, batchsize=2), 'argument "batchsize"; the nearest is "batch_size"'),
    "misspelt data": (lambda: bnprobe.scan(MODEL, LOADER, evaluate=LOADER), 'the nearest is "evaluation"'),
    "misspelt setting": (lambda: bnprobe.scan(MODEL, LOADER, max_batch=2), 'the nearest is "max_batches"'),
    "device": (lambda: bnprobe.scan(MODEL, LOADER, device="gpu"), "use device='cpu'"),
    "device without values": (lambda: bnprobe.scan(MODEL, LOADER, device="meta"), "'meta' cannot be used"),
    "autocast": (lambda: bnprobe.scan(MODEL, LOADER, autocast="fp16"), "'bfloat16' or 'float16' for autocast"),
    "steps": (lambda: bnprobe.scan(MODEL, LOADER, train_steps=2), "train_steps needs a loss: give loss=..."),
    "gradients": (lambda: bnprobe.scan(MODEL, LOADER, gradients=True), "gradients needs a loss: give loss=..."),
    "what if": (lambda: bnprobe.scan(MODEL, LOADER, what_if=True, loss=loss), "held-out data: give evaluation=..."),
    "unknown size": (lambda: bnprobe.scan(MODEL, DATA), "batch_size=2"),
    "globs": (lambda: bnprobe.scan(MODEL, LOADER, include=["head.*"]), "include/exclude exclude every BN layer"),
    "rule": (lambda: bnprobe.scan(MODEL, LOADER, select="BN999"), 'no rule "BN999"'),
    "class": (lambda: bnprobe.scan(nn.BatchNorm2d, LOADER), "not the class: call it"),  # type: ignore[arg-type]
    "function": (lambda: bnprobe.scan(MODEL, LOADER, metric=1), "function for metric, but got 1"),  # type: ignore[arg-type]
    "fixed": (
        lambda: bnprobe.scan(MODEL, DataLoader(DATA, batch_sampler=[[0, 1], [2, 3]]), batch_size=4),
        "give batch_size=2, or pass a loader whose batches have 4 samples",
    ),
    "goal": (lambda: bnprobe.scan(MODEL, LOADER, goal="up"), "'max' or 'min' for goal"),
    "sizes": (lambda: bnprobe.sweep(MODEL, LOADER, batch_sizes=[0]), "batch_sizes 0 is not a batch size"),
    "large sizes": (lambda: bnprobe.sweep(MODEL, LOADER, batch_sizes=[64]), "give more num_batches or more data"),
    "rates": (lambda: bnprobe.sweep(MODEL, LOADER, momentum=[2.0]), "None for the cumulative average"),
    "train sizes": (lambda: bnprobe.sweep(MODEL, LOADER, train_size=[8]), 'the nearest is "train_sizes"'),
    "lint": (lambda: bnprobe.lint(None), "torch.nn.Module for model, but got None"),  # type: ignore[arg-type]
    "lint rule": (lambda: bnprobe.lint(MODEL, select="BN9"), 'no rule "BN9"'),
    "verify": (lambda: bnprobe.verify("a.json", "b.json"), r"Report.load('a.json') reads it"),  # type: ignore[arg-type]
    "target": (lambda: bnprobe.convert(MODEL, to="renorm"), "the nearest is batch-renorm"),
    "layer": (lambda: bnprobe.convert(MODEL, ["bn1"]), 'the nearest name is "1"'),
    "option": (lambda: bnprobe.convert(MODEL, group=2), 'the nearest is "groups"'),
    "path": (lambda: bnprobe.recalibrate(MODEL, LOADER, path="both"), 'give one of "train"'),  # type: ignore[arg-type]
    "size below 0": (lambda: bnprobe.recalibrate(MODEL, LOADER, -1), "at least 1 for batch_size"),
    "format": (lambda: bnprobe.export(MODEL, LOADER, "model.bin"), "give to=..., or one of .pt2"),
    "quantized": (lambda: bnprobe.export(MODEL, LOADER, "m.pt2", quantize=True), "give to='torchscript'"),
    "exists": (lambda: bnprobe.export(MODEL, LOADER, __file__, to="onnx"), "or force=True to overwrite"),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_message_is_of_python(name: str) -> None:
    call, expected = CALLS[name]
    with pytest.raises(BnprobeError, match=re.escape(expected)) as caught:
        call()
    assert not re.search(r"--[a-z]|model file|\bspec\b|load_", str(caught.value))


def test_all_that_is_wrong_is_said_before_anything_runs() -> None:
    def forward(model: nn.Module, batch: Any) -> None:
        raise AssertionError

    with pytest.raises(UsageError) as caught:
        bnprobe.scan(nn.Linear, LOADER, 0, forward=forward, loss=3, max_batch=2)  # type: ignore[arg-type]
    lines = str(caught.value).splitlines()
    assert [re.findall("for (model|loss|batch_size)|argument", line) != [] for line in lines] == [True] * 4


def test_a_device_that_is_not_there_is_one_of_the_problems() -> None:
    with pytest.raises(UsageError) as told:
        bnprobe.scan(MODEL, LOADER, 0, device="cdua", metric=1)  # type: ignore[arg-type]
    said = str(told.value)
    assert all(part in said for part in ("function for metric", "at least 1 for batch_size", "device 'cdua' cannot"))
    assert len(said.splitlines()) == 3


def test_the_command_line_keeps_its_words(tmp_path: Path) -> None:
    from bnprobe.wording import either, from_python, option

    assert (option("--batch-size", 2), option("--force", True), either("a", "b")) == ("--batch-size 2", "--force", "a")
    assert from_python(lambda: option("--batches", 2))() == "num_batches=2"
    assert option("--exclude", ["a.*"]) == "--exclude a.*"
