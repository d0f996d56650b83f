"""Tensors by which checkpoints of converted layers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnprobe
from bnprobe.config.spec import CheckpointSpec
from bnprobe.config.targets import TARGETS
from bnprobe.errors import CheckpointError
from bnprobe.loading.checkpoint import LoadedWeights, load_checkpoint


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def loaded(model: nn.Module, state: dict[str, Any], folder: Path, strict: bool = True) -> LoadedWeights:
    torch.save(state, folder / "weights.pt")
    return load_checkpoint(model, CheckpointSpec(path=str(folder / "weights.pt"), strict=strict))


def test_every_target_says_which_tensors_its_layers_have_beside_those_of_bn() -> None:
    of_bn = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    for target in TARGETS:
        converted = bnprobe.convert(plain(), to=target.name)
        own = {name.partition(".")[2] for name in converted.state_dict() if name.startswith("1.")}
        assert set(target.marks) <= own
        assert bool(own - of_bn) == bool(target.marks), target.name
    marks = [mark for target in TARGETS for mark in target.marks]
    assert len(marks) == len(set(marks))


def test_a_prefix_comes_before_what_is_said_of_conversions(tmp_path: Path) -> None:
    """With another prefix the tensors of converted layers are missing and unexpected as all others are."""
    model = bnprobe.convert(plain(), to="gated")
    state = {f"net.{name}": value for name, value in model.state_dict().items()}
    for other in (model, plain()):
        with pytest.raises(CheckpointError, match=r'match without the prefix "net\."'):
            loaded(other, state, tmp_path)


class Patchy(nn.Module):
    """Has a parameter and a buffer that are called like those of converted layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = plain()
        self.patches = nn.Parameter(torch.zeros(2))
        self.register_buffer("domain_mean", torch.zeros(2))


def test_parameters_of_the_same_names_outside_of_norms_are_the_users(tmp_path: Path) -> None:
    state = dict(Patchy().state_dict())
    del state["patches"], state["domain_mean"]
    assert "domain_mean" in loaded(Patchy(), state, tmp_path, strict=False).notes[0]
    with pytest.raises(CheckpointError, match="another version of the model"):
        loaded(Patchy(), state, tmp_path)


def test_layers_that_are_converted_to_something_else_are_not_undone(tmp_path: Path) -> None:
    state = bnprobe.convert(plain(), to="gated").state_dict()
    assert loaded(plain(), state, tmp_path, strict=False).undone == {"1": "gated"}
    assert loaded(bnprobe.convert(plain(), to="frozen"), state, tmp_path, strict=False).undone == {}


def test_other_settings_of_a_conversion_are_not_another_number_of_classes(tmp_path: Path) -> None:
    for to, setting in (("per-domain", "domains"), ("cross-iteration", "window")):
        state = bnprobe.convert(plain(), to=to, **{setting: 3}).state_dict()
        with pytest.raises(CheckpointError, match=rf"converted to {to} with other settings.*{setting}"):
            loaded(bnprobe.convert(plain(), to=to, **{setting: 4}), state, tmp_path)
