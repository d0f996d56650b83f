"""``bnprobe profile`` and ``bnprobe drift``: what is healthy, and whether other data is like it."""

from __future__ import annotations

import json

import pytest

from functional.command import CLEAN, ERROR, FINDINGS, MODEL, NOTHING, Workspace

NET = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def images(seed, size=320):
    return torch.randn(size, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def load_model(momentum=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, momentum=momentum), nn.ReLU(), nn.Flatten())
    for seed in range(30):
        model(images(seed))
    return model


def loader(images, batch_size):
    return DataLoader(TensorDataset(images), batch_size=batch_size)


def load_data(batch_size=32):
    return loader(images(100), batch_size)


def load_eval_data(batch_size=32):
    return loader(images(101), batch_size)


def other(batch_size=32):
    return loader(images(102), batch_size)


def brighter(batch_size=32):
    return loader(images(103) + 0.5, batch_size)


def few(batch_size=32):
    return loader(images(104, 40), batch_size)
"""


@pytest.fixture
def profiled(workspace: Workspace) -> Workspace:
    workspace.write("model.py", NET)
    found = workspace.run("profile", "model.py", "-o", "profile.json")
    assert found.code == CLEAN
    return workspace


def test_healthy_data_is_let_pass_and_other_data_is_an_alarm(profiled: Workspace) -> None:
    for data, code in (("model.py:other", CLEAN), ("model.py:brighter", FINDINGS)):
        report = profiled.run("drift", "profile.json", "model.py", "--data", data, "--format", "json").report(code)
        assert (report["alarm"] is None) == (code == CLEAN)
        assert (report["samples"], report["block"], report["alpha"]) == (320, 8, 0.01)
        assert [layer["moved"] for layer in report["layers"]] == [code == FINDINGS]
    found = profiled.run("drift", "profile.json", "model.py", "--data", "model.py:brighter")
    assert "Alarm after" in found.stdout
    assert profiled.run("drift", "profile.json", "model.py", "--data", "model.py:brighter", "--exit-zero").code == CLEAN


def test_a_profile_is_of_held_out_data_and_drift_takes_the_same(profiled: Workspace) -> None:
    profile = json.loads((profiled.folder / "profile.json").read_text())
    assert profile["data"] == "load_eval_data of model.py"
    assert (profile["described"], profile["blocks"], profile["notes"][0][:16]) == (106, 26, "There are 26 blo")
    report = profiled.run("drift", "profile.json", "model.py", "--format", "json").report(CLEAN)
    assert report["data"] == "load_eval_data of model.py"


def test_a_profile_of_training_data_says_what_that_means(workspace: Workspace) -> None:
    workspace.write("model.py", NET + "\n\ndel load_eval_data\n")
    found = workspace.run("profile", "model.py", "-o", "profile.json")
    assert (found.code, "Give held-out data (--eval-data)" in " ".join(found.stdout.split())) == (CLEAN, True)


def test_a_profile_is_shown_again(profiled: Workspace) -> None:
    assert "1 layer profiled on 314 samples" in profiled.run("show", "profile.json").stdout


def test_a_profile_replaces_no_file(profiled: Workspace) -> None:
    assert "exists" in profiled.run("profile", "model.py", "-o", "profile.json").error(ERROR)
    assert profiled.run("profile", "model.py", "-o", "profile.json", "--force").code == CLEAN


def test_other_weights_than_the_profiles_are_refused(profiled: Workspace) -> None:
    found = profiled.run("drift", "profile.json", "model.py", "--model-arg", "momentum=0.2")
    assert "The running statistics are not those of model.py:load_model" in found.error(ERROR)


def test_what_is_no_profile_is_refused(profiled: Workspace) -> None:
    profiled.write("other.json", '{"schema_version": 1}')
    assert "does not fit its schema" in profiled.run("drift", "other.json", "model.py").error(ERROR)
    assert "does not exist" in profiled.run("drift", "nowhere.json", "model.py").error(ERROR)
    assert "a number between 0 and 1" in profiled.run("drift", "profile.json", "model.py", "--alpha", "2").error(ERROR)


def test_too_few_samples(profiled: Workspace) -> None:
    few = ("--eval-data", "model.py:few")
    assert "gave 40 samples" in profiled.run("profile", "model.py", "-o", "few.json", *few).error(ERROR)
    assert "at least 1" in profiled.run("profile", "model.py", "-o", "few.json", "--block", "0").error(ERROR)
    data = ("--data", "model.py:few", "--batch-size", "4", "--batches", "1")
    assert "there is nothing to compare" in profiled.run("drift", "profile.json", "model.py", *data).error(NOTHING)


def test_synthetic_data_and_a_model_without_layers(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL + "del load_data\n")
    workspace.write("spec.yaml", "model: model.py\ndata: {input_shape: [[2, 8, 8]], batch_size: 2}\n")
    assert "Synthetic inputs" in workspace.run("profile", "spec.yaml", "-o", "p.json").error(ERROR)
    workspace.write("plain.py", NET.replace("nn.BatchNorm2d(6, momentum=momentum)", "nn.GroupNorm(2, 6)"))
    assert "no Batch Normalization layer" in workspace.run("profile", "plain.py", "-o", "p.json").error(NOTHING)
