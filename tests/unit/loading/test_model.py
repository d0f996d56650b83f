"""Model targets: what is found, in which order, and what is said when it is not."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnprobe.config.spec import ModelSpec, Spec
from bnprobe.errors import BnprobeError, ModelError, UserCodeError
from bnprobe.loading.model import LoadedModel, load_model, unwrapped

HEAD = "from torch import nn\n"


def write(folder: Path, text: str, name: str = "model.py") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + text, encoding="utf-8")
    return str(path)


def load(target: str, **args: Any) -> LoadedModel:
    return load_model(Spec(model=ModelSpec(target=target, args=args)))


def model_error(target: str, **args: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(target, **args)
    return str(caught.value)


# ---- what is found


def test_order_symbol_then_load_model_then_model(tmp_path: Path) -> None:
    text = "model = nn.BatchNorm1d(1)\ndef other(): return nn.BatchNorm1d(3)\n"
    target = write(tmp_path, text)
    assert load(target).model.num_features == 1
    assert load(target).name == f"{target}:model"
    target = write(tmp_path, text + "def load_model(): return nn.BatchNorm1d(2)\n")
    assert load(target).model.num_features == 2
    assert load(target).name == f"{target}:load_model"
    assert load(f"{target}:other").model.num_features == 3
    assert load(f"{target}:model").model.num_features == 1


def test_classes_functions_and_nested_names_are_called_with_the_args(tmp_path: Path) -> None:
    target = write(
        tmp_path,
        "class Net(nn.Linear):\n"
        "    @classmethod\n    def wide(cls, width): return cls(width, 2 * width)\n"
        "def make(width=1): return Net(width, 1)\n",
    )
    assert load(f"{target}:Net", in_features=3, out_features=4).model.out_features == 4
    assert load(f"{target}:make", width=5).model.in_features == 5
    assert load(f"{target}:Net.wide", width=3).model.out_features == 6


def test_the_folder_is_importable_during_and_after_the_load(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 7\n", "neighbour_a.py")
    write(tmp_path, "WIDTH = 8\n", "neighbour_b.py")
    target = write(
        tmp_path,
        "import neighbour_a\n"
        "class Net(nn.Linear):\n"
        "    def late(self):\n        import neighbour_b\n        return neighbour_b.WIDTH\n"
        "model = Net(neighbour_a.WIDTH, 1)\n",
    )
    model: Any = load(target).model
    assert model.in_features == 7
    assert model.late() == 8


def test_two_files_of_one_name_stay_apart_and_their_classes_can_be_pickled(tmp_path: Path) -> None:
    text = (
        "import dataclasses\n@dataclasses.dataclass\nclass Config:\n    width: 'int' = {}\n"
        "class Net(nn.Linear):\n    pass\nmodel = Net(Config().width, 1)\n"
    )
    first = load(write(tmp_path / "a", text.format(1))).model
    second = load(write(tmp_path / "b", text.format(2))).model
    assert type(first) is not type(second)
    for model in (first, second):
        assert type(pickle.loads(pickle.dumps(model))) is type(model)


def test_a_file_is_run_again_after_an_edit(tmp_path: Path) -> None:
    target = write(tmp_path, "model = nn.BatchNorm1d(1)\n")
    assert load(target).model.num_features == 1
    write(tmp_path, "model = nn.BatchNorm1d(2)\n")
    assert load(target).model.num_features == 2
    assert not (tmp_path / "__pycache__").exists()


def test_a_file_that_imports_the_model_file_gets_the_same_module(tmp_path: Path) -> None:
    target = write(tmp_path, "model = nn.BatchNorm1d(1)\n", "net_of_mine.py")
    other = write(tmp_path, "from net_of_mine import model\n", "wrapper.py")
    assert load(target).model is load(f"{other}:model").model


def test_a_name_that_the_library_uses_is_not_taken_over(tmp_path: Path) -> None:
    target = write(tmp_path, "model = nn.BatchNorm1d(1)\n", "json.py")
    before = sys.modules["json"]
    assert load(target).model.num_features == 1
    assert sys.modules["json"] is before


def test_module_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "class Net(nn.Linear):\n    def __init__(self): super().__init__(1, 2)\n", "pack_a/nets.py")
    write(tmp_path, "model = nn.Linear(1, 3)\n", "pack_a/__init__.py")
    monkeypatch.chdir(tmp_path)
    assert load("pack_a.nets:Net").model.out_features == 2
    assert load("pack_a.nets.Net").model.out_features == 2  # as in class_path
    assert load("pack_a").model.out_features == 3
    assert load("pack_a").name == "pack_a:model"
    assert 'has no "nats"' in model_error("pack_a.nats")
    assert 'Did you mean "Net"?' in model_error("pack_a.nets:Nett")
    assert 'There is no module "pack_a.nats"' in model_error("pack_a.nats:Net")
    assert 'There is no module "pack_none"' in model_error("pack_none.nets:Net")


# ---- wrappers


def test_data_parallel_is_unwrapped(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, "model = nn.DataParallel(nn.BatchNorm1d(2))\n"))
    assert type(loaded.model) is nn.BatchNorm1d
    assert loaded.notes == ("The model was wrapped in DataParallel; the module inside it is used.",)


def test_distributed_data_parallel_is_unwrapped(tmp_path: Path) -> None:
    target = write(tmp_path, "def load_model(): return nn.parallel.DistributedDataParallel(nn.BatchNorm1d(2))\n")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        loaded = load(target)
    finally:
        torch.distributed.destroy_process_group()
    assert type(loaded.model) is nn.BatchNorm1d
    assert "DistributedDataParallel" in loaded.notes[0]


def test_compiled_and_stacked_wrappers_are_unwrapped(tmp_path: Path) -> None:
    text = "import torch\nmodel = nn.DataParallel(torch.compile(nn.BatchNorm1d(2), backend='eager'))\n"
    loaded = load(write(tmp_path, text))
    assert type(loaded.model) is nn.BatchNorm1d
    assert "OptimizedModule in DataParallel" in loaded.notes[0]


def test_a_model_without_a_wrapper_is_itself() -> None:
    model = nn.Sequential(nn.DataParallel(nn.BatchNorm1d(2)))
    assert unwrapped(model) == (model, None)
    assert unwrapped(model[0]) == (
        model[0].module,
        "The model was wrapped in DataParallel; the module inside it is used.",
    )


# ---- bad input


def test_missing_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path, "")
    assert f"Did you mean {tmp_path / 'model.py'}?" in model_error(str(tmp_path / "modle.py"))
    assert "none does not exist" in model_error(str(tmp_path / "none" / "model.py"))
    assert "is a folder" in model_error(str(tmp_path))
    (tmp_path / "weights.pt").write_bytes(b"x")
    assert "is not a Python file" in model_error(str(tmp_path / "weights.pt"))


def test_a_file_of_the_working_directory_that_is_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    assert "weights.pt is not a Python file" in model_error("weights.pt")
    assert "folder is a folder" in model_error("folder")
    assert "is not the name of a Python file or module" in model_error("my-model")
    assert "is not the name of a Python file or module" in model_error("")


def test_a_syntax_error_shows_file_line_and_text(tmp_path: Path) -> None:
    target = write(tmp_path, "def load_model(:\n    pass\n")
    message = model_error(target)
    assert f"Syntax error in {target}, line 2 (" in message
    assert message.endswith(": def load_model(:")


def test_a_syntax_error_in_an_imported_file_names_that_one(tmp_path: Path) -> None:
    neighbour = write(tmp_path, "x = = 1\n", "broken_neighbour.py")
    message = model_error(write(tmp_path, "import broken_neighbour\n"))
    assert f"Syntax error in {neighbour}, line 2" in message
    assert message.endswith(": x = = 1")


def test_a_syntax_error_at_run_time_is_the_users_exception(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="SyntaxError while loading"):
        load(write(tmp_path, "eval('1 +')\n"))


@pytest.mark.parametrize(
    ("text", "error", "call"),
    [
        ("import no_such_package_at_all\n", ModuleNotFoundError, "loading"),
        ("1 / 0\n", ZeroDivisionError, "loading"),
        ("raise SystemExit(3)\n", SystemExit, "loading"),
        ("def load_model():\n    return {}['depth']\n", KeyError, "calling"),
        ("def load_model(depth): return depth\n", TypeError, "calling"),
    ],
)
def test_exceptions_of_the_users_file(tmp_path: Path, text: str, error: type[BaseException], call: str) -> None:
    target = write(tmp_path, text)
    with pytest.raises(UserCodeError) as caught:
        load(target)
    assert isinstance(caught.value.error, error)
    assert caught.value.call.startswith(f"{call} {target}")
    if error is not TypeError:  # raised at the call itself: there is no frame of the user's
        assert target in caught.value.frames
    assert "bnprobe" not in caught.value.frames.replace(str(tmp_path), "")
    assert "model" not in sys.modules or call == "calling"


def test_ctrl_c_passes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(write(tmp_path, "raise KeyboardInterrupt\n"))


def test_a_missing_symbol_lists_what_is_there(tmp_path: Path) -> None:
    text = "from torch import zeros\nclass Net(nn.Linear): pass\ndef make(): pass\nnet = nn.ReLU()\n_x = make\n"
    target = write(tmp_path, text)
    message = model_error(f"{target}:Nett")
    assert message == (
        f'{target} has no "Nett". Did you mean "Net"? It defines: Net (class, needs in_features and out_features),'
        " make (function), net (model)."
    )
    assert "neither load_model() nor model. It defines: Net (class, needs" in model_error(target)
    assert "defines no function, class or model" in model_error(write(tmp_path, "x = 1\n"))


@pytest.mark.parametrize(
    ("text", "symbol", "expected"),
    [
        ("config = {}\n", "config", "is a dict, not an nn.Module or a function"),
        ("def load_model(): pass\n", "load_model", "returned None, not an nn.Module"),
        ("def make(): return nn.ReLU(), {}\n", "make", "returned a tuple of ReLU and dict, not an nn.Module"),
        ("def make(): return nn.ReLU\n", "make", "returned the class ReLU, not an nn.Module"),
    ],
)
def test_what_is_no_module(tmp_path: Path, text: str, symbol: str, expected: str) -> None:
    target = write(tmp_path, text)
    assert f"{target}:{symbol} {expected}" in model_error(f"{target}:{symbol}")


def test_args_for_a_ready_model_are_refused(tmp_path: Path) -> None:
    target = write(tmp_path, "model = nn.ReLU()\n")
    assert "model.args (depth) cannot be used" in model_error(target, depth=3)


# ---- model libraries


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_not_installed(library: str) -> None:
    """Neither is among the dependencies; where one is installed, this has nothing to show."""
    if library in sys.modules or _installed(library):
        pytest.skip(f"{library} is installed")
    assert model_error(f"{library}:resnet18") == f'{library} is not installed. Run: pip install "bnprobe[{library}]".'


def _installed(library: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(library) is not None


def test_every_error_is_one_of_ours(tmp_path: Path) -> None:
    for target in ("", ":", "a:b:c", "timm:", "..x", "x y.py", str(tmp_path)):
        with pytest.raises(BnprobeError):
            load(target)


def test_a_module_that_trains_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "acme_training").mkdir()
    (tmp_path / "acme_training" / "run.py").write_text("from torch import nn\nnet = nn.ReLU()\ntrainer.fit(net)\n")
    for target in ("acme_training.run:net", "acme_training.run.net"):
        assert "run.py trains when it is imported: line 3 calls trainer.fit()." in model_error(target)
