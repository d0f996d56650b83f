"""A repair target that another package adds: one layer and one row, and the command line works with it end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import bnprobe
from bnprobe.cli.app import app
from bnprobe.config.targets import TARGETS, Target
from bnprobe.errors import RepairError, UsageError
from bnprobe.repairs import deployable_state
from support.imports import as_in_a_new_process

ROW = """
from bnprobe.config.targets import Target

COUNTING = Target(
    name="counting",
    summary="batch statistics, and counts samples",
    conversion="counting_layers:ToCounting",
    deploys=True,
    settings=("blend",),
)
"""
LAYERS = """
import torch
from torch import nn

from bnprobe.repairs.conversions import adopt, arguments, no_statistics


class CountingBatchNorm2d(nn.BatchNorm2d):
    training_only = ("samples",)

    def __init__(self, num_features, share=1.0, **options):
        super().__init__(num_features, **options)
        self.share = share
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64))

    def forward(self, input):
        if self.training:
            self.samples += len(input)
        return super().forward(input)


class ToCounting:
    def obstacle(self, module):
        return no_statistics(module) or ("has one channel" if module.num_features == 1 else None)

    def note(self, module):
        return "counts its samples"

    def replacement(self, module, spec):
        return adopt(CountingBatchNorm2d(**arguments(module), momentum=module.momentum, share=spec.blend), module)
"""
MODEL = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def load_model():
    torch.manual_seed(0)
    return Net()


def load_data(batch_size):
    torch.manual_seed(1)
    images = 1 + torch.randn(64, 1, 8, 8)
    return DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 1).long()), batch_size)


def load_eval_data(batch_size):
    return load_data(batch_size)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    for name, text in (("counting_targets", ROW), ("counting_layers", LAYERS), ("model", MODEL)):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with as_in_a_new_process(), TARGETS.including(import_module("counting_targets").COUNTING) as row:
        assert "counting_layers" not in sys.modules  # imported when a layer is converted
        yield row


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["bnprobe", *arguments])
    found = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    common = ("--batch-size", "4", "--layers", "*", "--to", "counting", "--format", "json")
    return json.loads(run(monkeypatch, "convert", "model.py", *common, *arguments))


def test_the_help_lists_it(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    help_ = run(monkeypatch, "convert", "--help")
    assert "counting: batch statistics, and counts samples" in help_
    assert f"{TARGETS.names()[-2]}, counting; auto:" in " ".join(help_.replace("│", " ").split())


def test_the_plan_names_its_layer_and_its_note(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = convert(monkeypatch, "--dry-run")
    assert (plan["to"], plan["deploys"]) == ("counting", True)
    (change,) = plan["changes"]
    assert (change["kind"], change["to"], change["note"]) == (
        "BatchNorm2d",
        "CountingBatchNorm2d",
        "counts its samples",
    )


def test_it_is_trained_scanned_and_deployed(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    record = convert(monkeypatch, "--finetune", "--steps", "4", "-o", "out.safetensors")
    assert record["plan"]["to"] == record["settings"]["repair"]["to"] == "counting"
    assert record["proof"]["repaired"] == "counting"
    assert isinstance(record["flagged_after"], int)  # measured by the second scan
    (layer,) = json.loads(Path("out.after.json").read_text())["layers"]
    assert layer["kind"] == "CountingBatchNorm2d"
    weights = load_file("out.safetensors")
    plain = import_module("model").load_model()
    plain.load_state_dict(weights, strict=True)


def test_python_converts_deploys_and_scans_it(target: Target) -> None:
    original = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    converted = bnprobe.convert(original, to="counting", blend=0.25)
    assert (type(converted[1]).__name__, converted[1].share) == ("CountingBatchNorm2d", 0.25)
    converted.train()(torch.randn(6, 1, 8, 8))
    assert int(converted[1].samples) == 6
    state = deployable_state(converted, original)
    assert list(state) == list(original.state_dict())
    images = [(torch.randn(2, 1, 8, 8),) for _ in range(8)]
    (layer,) = bnprobe.scan(converted, images, 2, num_batches=8).layers
    assert layer.kind == "CountingBatchNorm2d"
    assert layer.train is not None
    again = bnprobe.convert(converted, to="frozen")  # its buffer goes, as the gates of gated BN do
    assert list(again.state_dict()) == list(original.state_dict())


def test_its_obstacle_is_named(target: Target) -> None:
    with pytest.raises(RepairError, match=r"Cannot be converted to counting:\n0 \(BatchNorm2d\) has one channel\."):
        bnprobe.convert(nn.Sequential(nn.BatchNorm2d(1)), to="counting")


def test_a_name_that_is_not_known_any_more() -> None:
    with pytest.raises(UsageError, match=r"one of batch-renorm, .*, auto \(the nearest is .*\) for to"):
        bnprobe.convert(nn.BatchNorm2d(2), to="counting")


def test_a_conversion_that_cannot_be_loaded_is_named() -> None:
    lost = Target("lost", "nothing", "no_such_package.layers:ToLost")
    message = r'repair target "lost" \(no_such_package\.layers:ToLost\) cannot be loaded: ModuleNotFoundError'
    with TARGETS.including(lost), pytest.raises(RepairError, match=message):
        bnprobe.convert(nn.BatchNorm2d(2), to="lost")
