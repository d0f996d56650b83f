"""What a spec names is looked up before any code of the user's runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bnprobe.config.spec import Spec
from bnprobe.errors import CheckpointError, DataError, ModelError
from bnprobe.loading.preflight import check

MODEL = """
raise AssertionError("this file was run")

class Net: ...

def load_model(width, depth=2): ...

def load_data(batch_size, root="."): ...

def scored(model, batch): ...

if width:
    from elsewhere import metric
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.py"
    path.write_text(MODEL, encoding="utf-8")
    return path


def problems(**spec: Any) -> list[str]:
    with pytest.raises(ModelError) as caught:
        check(Spec.model_validate({"model": {"target": "model.py", "args": {"width": 3}}} | spec))
    return str(caught.value).splitlines()


def test_all_that_is_not_there_is_said_at_once_with_the_nearest(file: Path) -> None:
    found = problems(
        model={"target": "model.py:load_modle"},
        data={"target": "load_dta", "args": {"rot": "."}},
        eval_data={"target": "models.py:load"},
        loss="scord",
        metric="model.py:metric",
        checkpoint={"path": "weights.pt"},
    )
    assert found == [
        "5 things cannot be found; nothing was run:",
        '  1. model.py has no "load_modle". Did you mean "load_model"?',
        '  2. data: model.py has no "load_dta". Did you mean "load_data"?',
        "  3. The file models.py does not exist. Did you mean model.py?",
        '  4. loss: model.py has no "scord". Did you mean "scored"?',
        "  5. The checkpoint weights.pt does not exist. Check the path.",
    ]


def test_arguments_are_compared_with_those_of_the_function(file: Path) -> None:
    assert problems(
        model={"target": "model.py", "args": {"dept": 3}}, data={"target": "load_data", "args": {"roots": "x"}}
    ) == [
        "3 things cannot be found; nothing was run:",
        '  1. model.py:load_model has no argument "dept" (model.args); the nearest is "depth".',
        "  2. model.py:load_model needs width: give model.args, or --model-arg width=....",
        '  3. load_data of model.py has no argument "roots" (data.args); the nearest is "root".',
    ]


def test_one_problem_is_a_sentence(file: Path) -> None:
    (found,) = problems(loss="lss")
    assert found == (
        'loss: model.py has no "lss". It defines: Net (class), load_model (function), load_data (function),'
        " scored (function)."
    )


def test_a_checkpoint_alone_is_an_error_of_checkpoints(file: Path) -> None:
    spec = {"model": {"target": "model.py", "args": {"width": 3}}, "checkpoint": {"path": "weights.pt"}}
    with pytest.raises(CheckpointError, match=r"weights\.pt does not exist"):
        check(Spec.model_validate(spec))


def test_files_of_tensors_are_looked_up_too(file: Path) -> None:
    spec = Spec.model_validate({"model": {"target": "model.py", "args": {"width": 3}}, "data": {"tensors": "rows.pt"}})
    with pytest.raises(DataError, match=r"rows\.pt \(data\.tensors\) does not exist"):
        check(spec)


@pytest.mark.parametrize(
    "text",
    [
        "from elsewhere import *",
        "globals().update(found())",
        "def __getattr__(name): ...",
        "def define():\n    global load_model\n    load_model = 1",
        "this is no Python",
    ],
)
def test_what_cannot_be_told_without_running_the_file_is_left_to_loading(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    check(Spec.model_validate({"model": {"target": "model.py:net"}, "data": {"target": "load"}, "loss": "loss"}))


@pytest.mark.parametrize("target", ["package.module:net", "timm:resnet18"])
def test_what_is_no_file_is_left_to_loading(file: Path, target: str) -> None:
    check(Spec.model_validate({"model": {"target": target}, "loss": "loss"}))


def test_what_is_right_passes(file: Path) -> None:
    check(Spec.model_validate({"model": {"target": "model.py", "args": {"width": 3}}, "loss": "scored"}))
