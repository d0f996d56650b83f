"""Tensors by which checkpoints of converted layers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
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


def marked(model: nn.Module, mark: dict[str, Any], path: Path) -> None:
    """The weights of a converted model as ``bnprobe convert`` writes them."""
    save_file(dict(model.state_dict()), path, {"bnprobe.converted": json.dumps(mark)})


@pytest.mark.parametrize(
    ("to", "setting", "value", "other", "difference"),
    [
        ("example-weighing", "blend", 0.75, 0.5, "has blend 0.5 in this model and 0.75 in the file"),
        ("instance-renorm", "blend", 0.25, 0.5, "has blend 0.5 in this model and 0.25 in the file"),
        ("group-norm", "groups", 1, 32, "has groups 2 in this model and 1 in the file"),
        ("per-domain", "domains", 3, 2, "has domains 2 in this model and 3 in the file"),
    ],
)
def test_a_mark_with_other_settings_than_the_layers_is_refused(
    to: str, setting: str, value: Any, other: Any, difference: str, tmp_path: Path
) -> None:
    converted = bnprobe.convert(plain(), to=to, **{setting: value})
    path = tmp_path / "out.safetensors"
    marked(converted, {"to": to, "layers": {"1": type(converted[1]).__name__}, "settings": {setting: value}}, path)
    spec = CheckpointSpec(path=str(path))
    load_checkpoint(bnprobe.convert(plain(), to=to, **{setting: value}), spec)
    for model, what in ((bnprobe.convert(plain(), to=to, **{setting: other}), difference), (plain(), "is BatchNorm2d")):
        with pytest.raises(CheckpointError) as refused:
            load_checkpoint(model, spec)
        assert f"converted to {to}, but 1 {what}" in str(refused.value)
        assert f'bnprobe.convert(model, [...], to="{to}", {setting}={value})' in str(refused.value)


def test_a_mark_of_other_layers_with_the_same_settings_is_refused(tmp_path: Path) -> None:
    converted = bnprobe.convert(plain(), to="example-weighing")
    path = tmp_path / "out.safetensors"
    mark = {"to": "example-weighing", "layers": {"1": "ExampleWeighedBatchNorm2d"}, "settings": {"blend": 0.5}}
    marked(converted, mark, path)
    for to in ("instance-renorm", "frozen"):
        with pytest.raises(CheckpointError, match="converted to example-weighing, but 1 is "):
            load_checkpoint(bnprobe.convert(plain(), to=to), CheckpointSpec(path=str(path)))


def test_a_mark_without_settings_is_one_of_an_earlier_version(tmp_path: Path) -> None:
    converted, path = bnprobe.convert(plain(), to="example-weighing", blend=0.75), tmp_path / "out.safetensors"
    marked(converted, {"to": "example-weighing", "layers": ["1"]}, path)
    load_checkpoint(bnprobe.convert(plain(), to="example-weighing"), CheckpointSpec(path=str(path)))
    with pytest.raises(CheckpointError, match="but 1 is BatchNorm2d in this model"):
        load_checkpoint(plain(), CheckpointSpec(path=str(path)))
