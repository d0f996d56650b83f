"""Weights files: what is wrong with them, and what is mended in passing."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from functional.command import CLEAN, FINDINGS, MODEL, Workspace

STATE = {
    "bn.weight": torch.ones(2),
    "bn.bias": torch.zeros(2),
    "bn.running_mean": torch.zeros(2),
    "bn.running_var": torch.ones(2),
    "bn.num_batches_tracked": torch.tensor(7),
    "head.weight": torch.ones(3, 2),
    "head.bias": torch.zeros(3),
}


@pytest.fixture
def weights(workspace: Workspace) -> Path:
    """Where to save; the model file is there already."""
    workspace.write("model.py", MODEL)
    return workspace.folder / "weights.pt"


def _error(workspace: Workspace, *options: str) -> str:
    return workspace.scan("--checkpoint", "weights.pt", *options).error()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_truncated_file(workspace: Workspace, weights: Path, name: str) -> None:
    path = weights.with_name(name)
    save_file(STATE, path) if name.endswith(".safetensors") else torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-60])
    message = workspace.scan("--checkpoint", name).error()
    assert (
        f"The checkpoint {name} ({path.stat().st_size:,} bytes) could not be read: it is truncated, damaged" in message
    )
    assert message.endswith("). Save or copy it again.")


def test_the_weights_of_another_model(workspace: Workspace, weights: Path) -> None:
    torch.save({"features.0.weight": torch.ones(2), "head.weight": torch.ones(3, 2)}, weights)
    assert _error(workspace) == (
        "The checkpoint weights.pt does not fit the model.\n"
        "Missing (6): bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked, head.bias.\n"
        "Unexpected (1): features.0.weight.\n"
        "These look like the weights of a different model."
    )


def test_weights_without_running_statistics(workspace: Workspace, weights: Path) -> None:
    torch.save({name: value for name, value in STATE.items() if "running" not in name}, weights)
    message = _error(workspace)
    assert "Missing (2): bn.running_mean, bn.running_var." in message
    assert "BatchNorm needs its running statistics: save model.state_dict(), or compute" in message


def test_a_training_script_s_checkpoint_needs_no_unsafe_load(workspace: Workspace, weights: Path) -> None:
    saved = {"args": argparse.Namespace(lr=1, out=Path("runs")), "model": STATE, "model_ema": STATE, "epoch": 3}
    torch.save(saved, weights)
    notes = workspace.scan("--checkpoint", "weights.pt", "--format", "json").report(CLEAN)["scan"]["notes"]
    assert 'The weights were taken from the key "model" of weights.pt.' in notes
    assert 'weights.pt also holds averaged weights (EMA) under "model_ema": --key model_ema.' in notes
    assert any("also holds objects of argparse.Namespace, pathlib." in note for note in notes)
    other = workspace.scan("--checkpoint", "weights.pt", "--key", "model_ema", "--format", "json").report(CLEAN)
    assert 'The weights were taken from the key "model_ema" of weights.pt.' in other["scan"]["notes"]


def test_a_prefix_of_the_project_is_named_and_stripped_on_demand(workspace: Workspace, weights: Path) -> None:
    torch.save({f"encoder.net.{name}": value for name, value in STATE.items()}, weights)
    assert "give --strip-prefix encoder.net. (checkpoint.strip_prefix)" in _error(workspace)
    assert workspace.scan("--checkpoint", "weights.pt", "--strip-prefix", "encoder.net.").code == CLEAN


def test_arguments_of_the_model(workspace: Workspace) -> None:
    wide = MODEL.replace(
        "def load_model():\n    return Net()", "def load_model(name, width=2):\n    assert width == 3\n    return Net()"
    )
    workspace.write("model.py", wide)
    assert workspace.scan("--model-arg", "width=3", "--model-arg", "name=r50").code == CLEAN
    assert "--model-arg takes NAME=VALUE" in workspace.scan("--model-arg", "width").stderr


def test_a_file_that_is_not_there(workspace: Workspace, weights: Path) -> None:
    torch.save(STATE, weights.with_name("weight.pt"))
    assert _error(workspace) == "The checkpoint weights.pt does not exist. Did you mean weight.pt?"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(workspace: Workspace, weights: Path, prefix: str) -> None:
    torch.save({prefix + name: value for name, value in STATE.items()}, weights)
    report = workspace.scan("--checkpoint", "weights.pt", "--format", "json").report(CLEAN)
    assert any("stripped from the keys of weights.pt" in note for note in report["scan"]["notes"])
    assert report["layers"][0]["batches_tracked"] == 7


def test_the_weights_decide_the_verdict(workspace: Workspace, weights: Path) -> None:
    save_file(STATE | {"bn.running_mean": torch.full((2,), 3.0)}, weights.with_suffix(".safetensors"))
    assert workspace.scan("--checkpoint", "weights.safetensors").code == FINDINGS


ODD_FILES = {
    "a tuple as a key": "torch.save({('a', 1): torch.zeros(2), None: {}}, path)",
    "itself": "held = {'model': 3}; held['again'] = held; torch.save(held, path)",
    "nothing but numbers": "torch.save({1: 2, 3: torch.zeros(1)}, path)",
    "other tensors": "torch.save({name: value.to_sparse() for name, value in state.items() if value.dim()}, path)",
    "no values": "torch.save({name: value.to('meta') for name, value in state.items()}, path)",
    "nested tensors": "torch.save({name: torch.nested.nested_tensor([value]) for name, value in state.items()}, path)",
    "the legacy format, cut off": "torch.save(state, path, _use_new_zipfile_serialization=False); cut(path, 700)",
    "less of it": "torch.save(state, path, _use_new_zipfile_serialization=False); cut(path, 60)",
}


@pytest.mark.parametrize("what", ODD_FILES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_holds_no_weights_of_a_model(workspace: Workspace, weights: Path, what: str) -> None:
    def cut(path: Path, size: int) -> None:
        path.write_bytes(path.read_bytes()[:size])

    path = workspace.folder / "odd.pt"
    exec(ODD_FILES[what], {"torch": torch, "state": STATE, "path": path, "cut": cut})
    for more in ((), ("--key", "model"), ("--strip-prefix", "module")):
        assert "odd.pt" in workspace.scan("--checkpoint", "odd.pt", *more).error()
