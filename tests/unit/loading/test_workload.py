"""Model, checkpoint, data and functions together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bnprobe.config.load import build_spec
from bnprobe.errors import BnprobeError, CheckpointError, DataError, ModelError
from bnprobe.loading.workload import Workload, load_model_only, load_workload, read_again
from bnprobe.paths import from_here

MODEL = """
import torch
from torch import nn
class Net(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(nn.Linear(2, width), nn.BatchNorm1d(width))
def load_model(): return Net()
def load_data(batch_size): return [{"x": torch.randn(batch_size, 2)} for _ in range(3)]
def forward(model, batch): return model(batch["x"])
def metric(model, batch): return 0.5
"""


def write(folder: Path, text: str = "", name: str = "model.py") -> str:
    path = folder / name
    path.write_text(MODEL + text if name == "model.py" else text, encoding="utf-8")
    return str(path)


def load(folder: Path, text: str = "", **overrides: object) -> Workload:
    options = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_workload(build_spec(write(folder, text), {"data.batch_size": 2, **options}))


def weights(workload: Workload) -> torch.Tensor:
    return workload.model.state_dict()["0.weight"]


def test_everything_from_one_model_file(tmp_path: Path) -> None:
    workload = load(tmp_path)
    assert workload.model_name == f"{tmp_path / 'model.py'}:load_model"
    assert (workload.checkpoint, workload.loss, workload.notes) == (None, None, ())
    assert workload.source.batch_size == 2
    assert workload.forward is not None
    assert workload.metric is not None
    batch = next(iter(workload.source.batches))
    assert workload.forward(workload.model, batch).shape == (2, 4)
    assert workload.metric(workload.model, batch) == 0.5


def test_what_was_taken_is_said_where_the_documented_names_do_not(tmp_path: Path) -> None:
    here, documented = tmp_path / "model.py", load(tmp_path)
    assert (documented.taken, documented.missing) == ({}, {})
    torch.save(torch.randn(8, 2), tmp_path / "x.pt")
    workload = load_workload(build_spec(f"{write(tmp_path)}:Net", {"data.batch_size": 2}))
    functions = {role: f"{role} of {here}" for role in ("forward", "metric")}
    assert workload.taken == {"model": f"{here}:Net", "data": f"load_data of {here}", **functions}
    assert workload.missing == {"loss": f"{here} has no such function of (model, batch)"}
    assert load(tmp_path, data__tensors=str(tmp_path / "x.pt")).taken["data"] == str(tmp_path / "x.pt")
    write(tmp_path, "model: {_target_: model.Net}\ndata: {_target_: model.load_data, batch_size: 2}\n", "conf.yaml")
    composed = load_workload(build_spec(str(tmp_path / "conf.yaml"), {}))
    assert composed.taken["model"] == f"{tmp_path / 'conf.yaml'}:model (Net)"
    assert composed.missing.keys() == {"loss", "metric"}


def test_everything_from_a_spec_file(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "def mean(model, batch): return 7.0\n", "losses.py")
    state = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pt")
    path = write(
        tmp_path,
        "model: {target: 'model.py:Net', args: {width: 3}}\ncheckpoint: w.pt\ndata: {batch_size: 4}\n"
        "loss: losses.py:mean\n",
        "spec.yaml",
    )
    workload = load_workload(build_spec(str(path), {}))
    assert workload.checkpoint == str(tmp_path / "w.pt")
    assert torch.equal(weights(workload), state["0.weight"])
    assert [note.split(" ")[0] for note in workload.notes] == ["The", "The"]
    assert workload.source.batch_size == 4
    assert workload.loss is not None
    assert workload.loss(workload.model, None) == 7.0


def test_a_model_file_that_changes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    torch.save(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)).state_dict(), tmp_path / "w.pt")
    write(tmp_path, "import os\nos.chdir('elsewhere')\n")
    monkeypatch.chdir(tmp_path)
    with from_here():
        load_workload(build_spec("model.py", {"data.batch_size": 2, "checkpoint.path": "w.pt"}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("loss = nn.CrossEntropyLoss()\n", "it is a CrossEntropyLoss, not a function of (model, batch)"),
        ("loss = 0.3\n", "it is a float, not a function of (model, batch)"),
        ("def loss(batch): pass\n", "it takes (batch), not (model, batch)"),
    ],
)
def test_functions_of_another_kind(tmp_path: Path, text: str, reason: str) -> None:
    workload = load(tmp_path, text)
    assert workload.loss is None
    assert workload.notes == (f"loss of {tmp_path / 'model.py'} was not used: {reason}.",)
    with pytest.raises(ModelError) as caught:
        load(tmp_path, text, loss="loss")
    assert str(caught.value) == f"loss of {tmp_path / 'model.py'} cannot be used as loss: {reason}."


def test_a_function_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r'has no "forwrd"\. Did you mean "forward"'):
        load(tmp_path, forward="forwrd")


def test_the_model_alone_needs_no_data(tmp_path: Path) -> None:
    path = write(tmp_path, "del load_data\n")
    assert isinstance(load_model_only(build_spec(path, {})).model, nn.Sequential)
    with pytest.raises(BnprobeError, match="--input-shape"):
        load_workload(build_spec(path, {}))


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"The checkpoint .* does not exist"):
        load(tmp_path, checkpoint__path=str(tmp_path / "none.pt"))


def test_held_out_data_that_comes_with_the_training_data(tmp_path: Path) -> None:
    both = (
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "def load_data(batch_size):\n"
        "    return [DataLoader(TensorDataset(torch.full((6, 2), v)), batch_size=2) for v in (1.0, 2.0)]\n"
    )
    workload = load(tmp_path, both)
    assert workload.held_out is not None
    for found in (workload, read_again(build_spec(str(tmp_path / "model.py"), {"data.batch_size": 2}), workload)):
        assert [float(batch[0].mean()) for batch in found.source.batches] == [1, 1, 1]
        assert [float(batch[0].mean()) for batch in found.held_out.batches] == [2, 2, 2]  # type: ignore[union-attr]
    own = load(tmp_path, both + "def load_eval_data(batch_size): return [torch.zeros(3, 2)]\n")
    assert own.held_out is not None
    assert own.held_out.description.startswith("load_eval_data of ")


def test_held_out_tensors_that_are_named_must_load(tmp_path: Path) -> None:
    (tmp_path / "rows.pt").write_bytes(b"no tensors")
    for synthetic in (False, True):
        overrides = {"data__input_shape": ["2"]} if synthetic else {}
        with pytest.raises(DataError, match=r"rows\.pt \(eval_data\.tensors\)"):
            load(tmp_path, eval_data__target=str(tmp_path / "rows.pt"), **overrides)


def test_synthetic_inputs_have_no_labels_and_nothing_to_compare_them_with(tmp_path: Path) -> None:
    text = "del load_data\nval_loader = [torch.zeros(3, 2)]\ndef loss(model, batch): return model(batch[0]).mean()\n"
    workload = load(tmp_path, text, data__input_shape="2")
    assert (workload.loss, workload.metric, workload.held_out) == (None, None, None)
    assert load(tmp_path, text, data__input_shape="2", scan__gradients=True).loss is not None


def test_what_may_be_data_is_named(tmp_path: Path) -> None:
    text = "class DataSet: pass\ndef get_batches(): pass\nclass Unload(nn.Module): pass\ndel load_data\n"
    with pytest.raises(BnprobeError, match=r"Of what it defines, get_batches, DataSet may be data: --data get_batches"):
        load(tmp_path, text)
