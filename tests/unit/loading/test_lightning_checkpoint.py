"""What a checkpoint of Lightning says beside the weights, read without running code from it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnprobe.config.spec import CheckpointSpec
from bnprobe.errors import CheckpointError, ModelError
from bnprobe.loading.frameworks.lightning_checkpoint import Saved, arguments_for, read_saved

WATCHED = "ModelCheckpoint{'monitor': 'val_acc', 'mode': 'max', 'every_n_epochs': 1}"


def saved_in(folder: Path, **more: Any) -> Saved:
    torch.save({"state_dict": {}, **more}, folder / "last.ckpt")
    return read_saved(CheckpointSpec(path=str(folder / "last.ckpt")))


def test_plain_arguments_and_how_far_it_was(tmp_path: Path) -> None:
    found = saved_in(
        tmp_path,
        hyper_parameters={"width": 3, "sizes": [1, 2]},
        hparams_name="kwargs",
        datamodule_hyper_parameters={"path": "x"},
        callbacks={"EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}": {}, WATCHED: {}, "Else{broken": {}},
        epoch=4,
        global_step=400,
    )
    assert found == Saved(
        "last.ckpt", {"width": 3, "sizes": [1, 2]}, None, {"path": "x"}, None, ("val_acc", "max"), 4, 400
    )


def test_a_file_of_weights_says_nothing(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pt")
    assert read_saved(CheckpointSpec(path=str(tmp_path / "w.pt"))) == Saved("w.pt")
    assert read_saved(CheckpointSpec()) == Saved()


def test_namespaces_are_read_as_what_they_hold(tmp_path: Path) -> None:
    found = saved_in(tmp_path, hyper_parameters=Namespace(width=3, deep=Namespace(lr=0.1)), hparams_name="args")
    assert (found.model, found.model_argument) == ({"width": 3, "deep": {"lr": 0.1}}, "args")


class Net(nn.Module):
    def __init__(self, width: int, depth: int = 2, act: Any = None) -> None:
        super().__init__()


class Open(nn.Module):
    def __init__(self, width: int, **more: Any) -> None:
        super().__init__()


def arguments(kind: type, given: dict[str, Any], saved: dict[str, Any], file: str = "last.ckpt") -> dict[str, Any]:
    return arguments_for(kind, "lit.py:Net", given, saved, None, file, "--model-arg NAME=VALUE")


def test_what_the_class_takes_is_used_and_the_user_comes_first() -> None:
    saved = {"width": 3, "depth": 4, "forgotten": 1, "_instantiator": "x.y"}
    assert arguments(Net, {"depth": 5}, saved) == {"width": 3, "depth": 5}
    assert arguments(Open, {}, saved) == {"width": 3, "depth": 4, "forgotten": 1}


def test_objects_are_refused_unless_given(tmp_path: Path) -> None:
    found = saved_in(tmp_path, hyper_parameters={"width": 3, "act": [nn.ReLU()]})
    with pytest.raises(
        CheckpointError, match=r'lit.py:Net in last.ckpt is an object, .*: "act" \(torch.nn.*ReLU\). Write'
    ):
        arguments(Net, {}, dict(found.model))
    assert arguments(Net, {"act": "relu"}, dict(found.model)) == {"width": 3, "act": "relu"}


def test_all_that_is_missing_or_an_object_is_named_and_no_module_is_asked_for_as_a_value(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self, net: nn.Module, loss: nn.Module, width: int, depth: int) -> None:
            super().__init__()

    found = saved_in(tmp_path, hyper_parameters={"net": nn.ReLU(), "loss": nn.MSELoss(), "width": 1, "depth": 2})
    with pytest.raises(
        CheckpointError, match=r'^2 arguments .* are objects, .*: "net" \(.*\) and "loss" \(.*\)\. Write a'
    ):
        arguments(Wrapped, {}, dict(found.model))
    with pytest.raises(ModelError, match=r"needs net, loss, width, depth, which are not given: .*checkpoint\. Write a"):
        arguments(Wrapped, {}, {}, file="")
    net = {"net": nn.ReLU(), "loss": nn.MSELoss()}
    with pytest.raises(ModelError, match=r"Give them by --model-arg width=VALUE --model-arg depth=VALUE, or write a"):
        arguments(Wrapped, net, {})


def test_a_class_that_a_checkpoint_names_is_not_imported() -> None:
    saved = {"width": 3, "act": {"class_path": "os.system", "init_args": {"command": "true"}}}
    with pytest.raises(
        CheckpointError, match=r'1 argument of lit.py:Net in last.ckpt is described by class, .*: "act" \(os.system\)'
    ):
        arguments(Net, {}, saved)


@pytest.mark.parametrize(
    ("file", "said"),
    [("last.ckpt", "which last.ckpt has not saved"), ("", "which is not given: there is no --checkpoint")],
)
def test_what_is_missing_is_named(file: str, said: str) -> None:
    with pytest.raises(ModelError, match=f"lit.py:Net needs width, {said}.*--model-arg width=VALUE.*lit.py:FUNCTION"):
        arguments(Net, {}, {}, file)
