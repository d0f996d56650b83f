"""Checkpoints: every container and prefix, and what is said when one does not fit."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bnprobe.config.spec import CheckpointSpec
from bnprobe.errors import CheckpointError, UserCodeError
from bnprobe.loading.checkpoint import LoadedWeights, load_checkpoint
from bnprobe.loading.weights import Stub, read_weights, state_of

State = dict[str, Any]


def net(classes: int = 3, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, classes))


def trained(seed: int = 0) -> nn.Module:
    """A network whose every value differs from those of a fresh one."""
    model = net()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.rand(value.shape, generator=generator) * 100 + 1)
    return model


@pytest.fixture
def state() -> State:
    return dict(trained().state_dict())


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def save(folder: Path, saved: Any, name: str = "weights.pt") -> str:
    path = folder / name
    torch.save(saved, path)
    return str(path)


def load(model: nn.Module, path: str, **options: Any) -> tuple[str, ...]:
    return load_checkpoint(model, CheckpointSpec(path=path, **options)).notes


def assert_loaded(model: nn.Module, state: State) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], value) for key, value in state.items())


def checkpoint_error(path: str, model: nn.Module | None = None, **options: Any) -> str:
    """The message; the model must be as it was."""
    model = model or net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load(model, path, **options)
    assert_loaded(model, before)
    return str(caught.value)


# ---- containers


def test_no_path_does_nothing() -> None:
    assert load_checkpoint(net(), CheckpointSpec()) == LoadedWeights()


def test_plain_state_dict(tmp_path: Path, state: State) -> None:
    model = net()
    assert load(model, save(tmp_path, state)) == ()
    assert_loaded(model, state)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_safetensors_under_any_name(tmp_path: Path, state: State, name: str) -> None:
    save_file(state, tmp_path / name)
    model = net()
    assert load(model, str(tmp_path / name)) == ()
    assert_loaded(model, state)


def test_files_before_the_zip_format(tmp_path: Path, state: State) -> None:
    path = tmp_path / "old.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    model = net()
    load(model, str(path))
    assert_loaded(model, state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_common_wrappers_are_looked_into(tmp_path: Path, state: State, wrapper: str) -> None:
    model = net()
    notes = load(model, save(tmp_path, {"epoch": 3, "loss": torch.tensor(0.5), wrapper: state}))
    assert_loaded(model, state)
    assert notes == (f'The weights were taken from the key "{wrapper}" of weights.pt.',)


@pytest.mark.parametrize("key", ["ema.net", "ema"])
def test_a_key_names_a_nested_state_dict(tmp_path: Path, state: State, key: str) -> None:
    inner = {"net": state} if key == "ema.net" else state
    path = save(tmp_path, {"model": prefixed(state, "other."), "ema": inner})
    model = net()
    assert load(model, path, key=key)[0] == f'The weights were taken from the key "{key}" of weights.pt.'
    assert_loaded(model, state)


def test_a_key_that_holds_a_dot(tmp_path: Path, state: State) -> None:
    model = net()
    load(model, save(tmp_path, {"ema.net": state}), key="ema.net")
    assert_loaded(model, state)


def test_a_key_that_is_not_there(tmp_path: Path, state: State) -> None:
    path = save(tmp_path, {"modle": state, "epoch": 3})
    message = checkpoint_error(path, key="model")
    assert 'has no key "model". Did you mean "modle"? Its keys are modle, epoch.' in message
    assert "it holds an int there, not a mapping" in checkpoint_error(path, key="epoch.x")
    other = save(tmp_path, {"epoch": 3, "optimizer": {"lr": 0.1}})
    assert "holds no state dict. Its keys are epoch, optimizer." in checkpoint_error(other)
    assert "holds an int under the key epoch, not a state dict" in checkpoint_error(path, key="epoch")


@pytest.mark.parametrize(("saved", "kind"), [(3, "an int"), ([1], "a list of int"), ({}, "a dict")])
def test_what_is_no_state_dict(tmp_path: Path, saved: Any, kind: str) -> None:
    assert f"holds {kind}, not a state dict" in checkpoint_error(save(tmp_path, saved))


# ---- prefixes


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_prefixes_of_wrappers_are_stripped(tmp_path: Path, state: State, prefix: str) -> None:
    model = net()
    notes = load(model, save(tmp_path, prefixed(state, prefix)))
    assert_loaded(model, state)
    names = [name for name in ("module.", "_orig_mod.") if name in prefix]
    assert notes == (f"The prefixes {' and '.join(names)} were stripped from the keys of weights.pt.",)


def test_prefixes_on_some_keys_and_inside_of_them(tmp_path: Path, state: State) -> None:
    mixed = {key.replace("1.", "module.1.", 1) if key[0] == "1" else key: state[key] for key in state}
    model = net()
    load(model, save(tmp_path, mixed))
    assert_loaded(model, state)
    inside = {key.replace(".", "._orig_mod.", 1): value for key, value in state.items()}
    model = net()
    load(model, save(tmp_path, inside))
    assert_loaded(model, state)


def test_a_model_with_a_wrapped_submodule_takes_plain_keys(tmp_path: Path, state: State) -> None:
    model = nn.Sequential(*[nn.DataParallel(child) for child in net()])
    load(model, save(tmp_path, state))
    assert_loaded(model, {key.replace(".", ".module."): value for key, value in state.items()})


def test_a_submodule_that_is_called_module_keeps_its_name(tmp_path: Path, state: State) -> None:
    model = nn.ModuleDict({"module": net()})
    own = prefixed(state, "module.")
    assert load(model, save(tmp_path, own)) == ()
    assert_loaded(model, own)
    model = nn.ModuleDict({"module": net()})
    load(model, save(tmp_path, prefixed(own, "module.")))
    assert_loaded(model, own)


@pytest.mark.parametrize("strip", ["net.", "net"])
def test_strip_prefix(tmp_path: Path, state: State, strip: str) -> None:
    path = save(tmp_path, prefixed(state, "module.net."))
    assert 'match without the prefix "module.net."' in checkpoint_error(path)
    path = save(tmp_path, prefixed(state, "net.module."))
    model = net()
    load(model, path, strip_prefix=strip)
    assert_loaded(model, state)
    assert 'starts with "ent."' in checkpoint_error(path, strip_prefix="ent")


# ---- damage and refusal


def truncated(path: str, share: float) -> str:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated_files(tmp_path: Path, state: State, kind: str, share: float) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    message = checkpoint_error(truncated(str(path), share))
    assert f"({path.stat().st_size:,} bytes) could not be read: it is truncated, damaged" in message


@pytest.mark.parametrize("content", [b"x", b"<html>not found</html>", b"\x80\x04garbage"])
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    message = checkpoint_error(str(path))
    assert "neither safetensors nor a torch.save file" in message
    assert ("(1 byte)" in message) == (len(content) == 1)


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "w.pt is a pointer of Git LFS, not the file that it stands for. Run: git lfs pull" in checkpoint_error(
        str(path)
    )


def test_missing_empty_and_folder(tmp_path: Path, state: State) -> None:
    save(tmp_path, state)
    assert "Did you mean" in checkpoint_error(str(tmp_path / "wieghts.pt"))
    (tmp_path / "more.pt").write_bytes((tmp_path / "weights.pt").read_bytes())
    assert "is a folder with 2 weights files: more.pt, weights.pt. Name one" in checkpoint_error(str(tmp_path))
    (tmp_path / "none").mkdir()
    assert "is a folder without a weights file" in checkpoint_error(str(tmp_path / "none"))
    (tmp_path / "empty.pt").touch()
    assert "is empty (0 bytes)" in checkpoint_error(str(tmp_path / "empty.pt"))


class Recorder:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_only_tensors_are_read_and_nothing_runs(tmp_path: Path, state: State, new_format: bool) -> None:
    saved = {
        "state_dict": state,
        "args": argparse.Namespace(lr=1, folder=tmp_path),
        "score": numpy.float64(0.5),
        "history": collections.defaultdict(list, {"loss": [1.0]}),
        "when": datetime.datetime(2026, 1, 2),
        "trace": Recorder(tmp_path / "ran"),
    }
    path = tmp_path / "w.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=new_format)
    model = net()
    notes = load(model, str(path))
    assert_loaded(model, state)
    assert not (tmp_path / "ran").exists()
    assert notes[0] == 'The weights were taken from the key "state_dict" of w.pt.'
    assert "argparse.Namespace, collections.defaultdict" in notes[1]
    assert "they were left out, and none of their code was run" in notes[1]
    load(net(), str(path), unsafe_load=True)
    assert (tmp_path / "ran").exists()


def test_a_class_that_cannot_be_imported(tmp_path: Path, state: State) -> None:
    module = types.ModuleType("project_that_is_gone")
    module.Config = type("Config", (dict,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    try:
        path = save(tmp_path, {"model": state, "config": module.Config(depth=50)})
    finally:
        del sys.modules[module.__name__]
    model = net()
    assert "project_that_is_gone.Config" in load(model, path)[-1]
    assert_loaded(model, state)


@pytest.mark.parametrize("unsafe", [False, True])
def test_a_whole_pickled_model(tmp_path: Path, state: State, unsafe: bool) -> None:
    path = save(tmp_path, {"epoch": 3, "ema": nn.DataParallel(trained())})
    model = net()
    notes = load(model, path, unsafe_load=unsafe)
    assert_loaded(model, state)
    assert notes[0] == 'weights.pt holds a whole DataParallel under the key "ema"; its state dict was used.'


def test_what_a_file_can_import_makes_tensors_and_containers(tmp_path: Path, state: State) -> None:
    parameter = nn.Parameter(torch.arange(3.0))
    saved = {
        "args": argparse.Namespace(),
        "net": {"a": parameter, "b": torch.ones(2).half(), "c": torch.eye(2).to_sparse()},
    }
    read, _ = read_weights(Path(save(tmp_path, saved)))
    assert torch.equal(read["net"]["a"], parameter.detach())
    assert read["net"]["b"].dtype == torch.float16
    assert torch.equal(read["net"]["c"].to_dense(), torch.eye(2))
    assert isinstance(read["args"], Stub)


# ---- several states in a file, and folders


def test_the_state_that_fits_is_taken_wherever_it_is(tmp_path: Path, state: State) -> None:
    model = net()
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []}
    notes = load(
        model,
        save(tmp_path, {"optimizer": optimizer, "generator": {"weights_of_it": prefixed(state, "net.")}}),
        strip_prefix="net",
    )
    assert_loaded(model, state)
    assert notes == ('The weights were taken from the key "generator.weights_of_it" of weights.pt.',)


def test_averaged_weights_are_mentioned_and_not_taken(tmp_path: Path, state: State) -> None:
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    model = net()
    notes = load(model, save(tmp_path, {"model_ema": other, "state_dict": state}))
    assert_loaded(model, state)
    assert notes[1] == 'weights.pt also holds averaged weights (EMA) under "model_ema": --key model_ema.'
    assert "also holds weights that fit under b" in load(net(), save(tmp_path, {"a": state, "b": other}))[1]


def test_what_the_file_shows_of_averaged_weights(tmp_path: Path, state: State) -> None:
    statistics = {name for name in state if "running" in name}
    moved = {name: value if name in statistics else value + 1.0 for name, value in state.items()}
    other = {name: value + 1 for name, value in state.items()}
    parameters = {name: value for name, value in state.items() if name not in statistics and "tracked" not in name}
    belong = "which belong to other weights"

    def told(saved: dict[str, State], **options: Any) -> tuple[str | None, str | None]:
        found = load_checkpoint(net(), CheckpointSpec(path=save(tmp_path, saved), **options))
        return found.averaged, found.beside

    of_model = 'the weights under "ema" of weights.pt are an average, their running statistics are those under "model"'
    assert told({"model": state, "ema": moved}, key="ema") == (f"{of_model}, {belong}", None)
    must = "their statistics must be taken with the average"
    assert (
        told({"model": state, "ema": other}, key="ema")[0]
        == f'averaged weights, by the key "ema" of weights.pt: {must}'
    )
    beside = 'weights.pt also holds averaged weights, under "ema"'
    assert told({"model": state, "ema": other}) == told({"model": state, "ema": moved}) == (None, beside)
    swapped = {name: value + 1.0 if name in statistics else value for name, value in state.items()}
    assert told({"model": state, "ema": swapped}) == (
        'the weights are the average under "ema" of weights.pt, their statistics are not',
        None,
    )
    assert told({"model": swapped, "ema": {name: value + 1.0 for name, value in parameters.items()}}) == (None, beside)
    assert told({"model": state}) == (None, None)
    for name, averaged in (
        ("model_ema.pt", f"averaged weights, by the name of model_ema.pt: {must}"),
        ("schema.pt", None),
    ):
        assert load_checkpoint(net(), CheckpointSpec(path=save(tmp_path, state, name))).averaged == averaged


def test_several_states_of_other_models(tmp_path: Path) -> None:
    message = checkpoint_error(save(tmp_path, {"a": {"x": torch.ones(1)}, "b": {"y": torch.ones(1)}}))
    assert "holds several state dicts, and the names in none of them are those of the model: a, b." in message


def test_other_values_beside_the_weights(tmp_path: Path, state: State) -> None:
    model = net()
    load(model, save(tmp_path, {**state, "epoch": 3}))
    assert_loaded(model, state)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "last.ckpt"])
def test_a_folder_with_one_file_of_weights(tmp_path: Path, state: State, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    model = net()
    assert load(model, str(tmp_path)) == (f"The weights were read from {tmp_path / name}.",)
    assert_loaded(model, state)


def test_weights_in_several_files(tmp_path: Path, state: State) -> None:
    halves = [dict(list(state.items())[:3]), dict(list(state.items())[3:])]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for half, name in zip(halves, names, strict=True):
        save_file(half, tmp_path / name)
    where = {key: name for half, name in zip(halves, names, strict=True) for key in half}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    model = net()
    load(model, str(tmp_path))
    assert_loaded(model, state)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "is not a name in its folder" in checkpoint_error(str(tmp_path))


def fail() -> None:
    raise RuntimeError("no such class any more")


class Failing:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return fail, ()


def test_an_exception_while_unpickling_is_the_users(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match=r"RuntimeError while unpickling .*: no such class any more"):
        load(net(), save(tmp_path, {"x": Failing()}), unsafe_load=True)


def test_a_plain_pickle(tmp_path: Path, state: State) -> None:
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(state))
    assert "w.pkl was written by pickle, not by torch.save. If you trust it, read it" in checkpoint_error(str(path))


class Tracked(torch.Tensor):
    """A subclass that the one who reads the file does not have."""


@pytest.mark.parametrize("key", ["", "net"])
def test_tensors_of_a_subclass_are_taken_as_plain_ones(tmp_path: Path, state: State, key: str) -> None:
    own = {name: value.as_subclass(Tracked) for name, value in state.items()}
    model = net()
    notes = load(model, save(tmp_path, {key: own} if key else own))
    assert_loaded(model, state)
    assert "Tracked" in notes[-1]


def test_arrays_are_taken_as_tensors(tmp_path: Path, state: State) -> None:
    model = net()
    load(model, save(tmp_path, {name: value.numpy() for name, value in state.items()}))
    assert_loaded(model, state)


def test_arrays_of_objects_run_nothing(tmp_path: Path, state: State) -> None:
    objects = numpy.array([Recorder(tmp_path / "ran")], dtype=object)
    model = net()
    load(model, save(tmp_path, {"model": state, "objects": objects}))
    assert_loaded(model, state)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_averaged_model_of_torch(tmp_path: Path, state: State, use_buffers: bool) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(trained(), use_buffers=use_buffers)
    model = net()
    found = load_checkpoint(model, CheckpointSpec(path=save(tmp_path, averaged.state_dict())))
    assert_loaded(model, state)
    assert found.notes[0] == "weights.pt holds torch's AveragedModel: the weights are an average."
    assert found.averaged == (
        "averaged weights, by the n_averaged of weights.pt: their statistics must be taken with the average"
    )


# ---- fit


def test_another_model(tmp_path: Path) -> None:
    other = nn.ModuleDict({f"layer{index}": nn.Linear(2, 2) for index in range(6)})
    message = checkpoint_error(save(tmp_path, other.state_dict()))
    assert "Missing (9): 0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean, 1.running_var" in message
    assert "Unexpected (12): layer0.weight," in message
    assert "layer4.bias, ..." in message  # the first ten, then an ellipsis
    assert "layer5" not in message
    assert "These look like the weights of a different model." in message


def test_another_number_of_classes_and_another_width(tmp_path: Path, state: State) -> None:
    path = save(tmp_path, state)
    message = checkpoint_error(path, net(classes=5))
    assert "Different shape (2): 2.weight (file 3x4, model 5x4), 2.bias (file 3, model 5)." in message
    assert (
        "Only 2 differs: this looks like the same model with a different number of classes. Build the model with"
        in message
    )
    message = checkpoint_error(path, net(width=8), strict=False)
    assert "with other sizes: check model.args" in message


OTHER_KINDS: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda weight: weight.to(torch.complex64), "a tensor of complex numbers"),
    (lambda weight: weight.to_sparse(), "a sparse tensor"),
    (lambda weight: torch.nested.nested_tensor([weight, weight]), "a nested tensor"),
]


@pytest.mark.parametrize(("change", "kind"), OTHER_KINDS)
@pytest.mark.filterwarnings("ignore:.*PyTorch API of nested tensors:UserWarning")
def test_what_is_no_plain_tensor_of_real_numbers(
    tmp_path: Path, state: State, change: Callable[[Tensor], Any], kind: str
) -> None:
    """A copy of complex numbers would lose their imaginary parts without a word."""
    state = state | {"0.weight": change(state["0.weight"])}
    message = checkpoint_error(save(tmp_path, {"state_dict": state}))
    assert f"Of another kind (1): 0.weight ({kind}).\nSave plain tensors" in message


@pytest.mark.filterwarnings("ignore:.*quantized:UserWarning")
def test_quantized_weights(tmp_path: Path, state: State) -> None:
    state["0.weight"] = torch.quantize_per_tensor(state["0.weight"], 0.1, 0, torch.qint8)
    assert "0.weight (a quantized tensor)" in checkpoint_error(save(tmp_path, state))


def test_a_complex_model_takes_complex_weights(tmp_path: Path) -> None:
    saved, model = (nn.Linear(2, 3, dtype=torch.complex64) for _ in range(2))
    load_checkpoint(model, CheckpointSpec(path=save(tmp_path, saved.state_dict())))
    assert torch.equal(saved.weight, model.weight)


def test_missing_statistics_are_an_error_even_if_not_strict(tmp_path: Path, state: State) -> None:
    parameters = {key: value for key, value in state.items() if "running" not in key}
    for strict in (True, False):
        message = checkpoint_error(save(tmp_path, parameters), strict=strict)
        assert "Missing (2): 1.running_mean, 1.running_var." in message
        assert "parameters saved without buffers" in message
    del state["1.running_var"]
    message = checkpoint_error(save(tmp_path, state), strict=False)
    assert "Missing (1): 1.running_var." in message
    assert "The file holds only one of running_mean and running_var for 1, so it is not whole: save" in message
    assert "accepts this file" not in message


def test_files_from_before_update_counters(tmp_path: Path, state: State) -> None:
    count = net().state_dict()["1.num_batches_tracked"]
    del state["1.num_batches_tracked"]
    model = net()
    notes = load(model, save(tmp_path, state))
    assert_loaded(model, {**model.state_dict(), **state, "1.num_batches_tracked": count})
    assert "has no update counters (num_batches_tracked)" in notes[0]


def test_one_of_two_counters_missing_is_an_error(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
    state = dict(model.state_dict())
    del state["1.num_batches_tracked"]
    assert "Missing (1): 1.num_batches_tracked." in checkpoint_error(save(tmp_path, state), model, strict=False)


def test_not_strict_loads_what_matches_and_says_so(tmp_path: Path, state: State) -> None:
    head = state.pop("2.bias")
    path = save(tmp_path, {**state, "extra.weight": head})
    assert "Unexpected (1): extra.weight." in checkpoint_error(path)
    model = net()
    bias = model.state_dict()["2.bias"].clone()
    notes = load(model, path, strict=False)
    own = model.state_dict()
    assert torch.equal(own["2.bias"], bias)
    assert all(torch.equal(own[key], value) for key, value in state.items())
    assert notes == (
        "weights.pt lacks 1 keys; they keep the values of the model: 2.bias.",
        "1 keys of weights.pt were not used: extra.weight.",
    )


def test_shared_modules_need_one_of_their_names(tmp_path: Path) -> None:
    shared = nn.BatchNorm1d(2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    state = {key: torch.full_like(value, 5) for key, value in shared.state_dict(prefix="0.").items()}
    save_file(state, tmp_path / "w.safetensors")
    load(model, str(tmp_path / "w.safetensors"))
    assert torch.equal(shared.state_dict()["running_mean"], torch.full((2,), 5.0))


def test_lazy_modules_are_materialised(tmp_path: Path, state: State) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 3))
    load(model, save(tmp_path, state))
    assert_loaded(model, state)


def test_other_dtypes_are_converted(tmp_path: Path, state: State) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    model = net()
    load(model, save(tmp_path, half))
    weight: Tensor = model.state_dict()["0.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, half["0.weight"].float())


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


@pytest.mark.parametrize("function", [bytes, bytearray])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_many_bytes_gets_none(tmp_path: Path, function: Any, zipped: bool) -> None:
    saved = {"a": torch.ones(2), "bomb": Calls(function, 2**50)}
    torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    read, _ = read_weights(tmp_path / "w.pt")
    assert torch.equal(read["a"], torch.ones(2))
    assert not read["bomb"]


def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"w/data/{number}", bytes(2**27))
    with pytest.raises(CheckpointError, match=r"w\.pt \([\d,]+ bytes\) unpacks to 402,653,184 bytes, so it holds no"):
        read_weights(tmp_path / "w.pt")


def test_what_is_no_file_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pt")
    for path in (tmp_path / "w.pt", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match=r"is a pipe or a device\. Save or copy it as a file"):
            read_weights(path)


def test_an_index_that_names_itself_ends(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(CheckpointError, match="which is not a name in its folder"):
        read_weights(index)


def test_what_a_file_holds_in_billions_of_places_is_looked_at_once(tmp_path: Path) -> None:
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    saved: dict[str, Any] = {"deep": weights}
    for _ in range(3):
        saved = dict.fromkeys(map(str, range(300)), saved)
    torch.save(saved, tmp_path / "w.pt")
    model = nn.Linear(2, 2)
    load_checkpoint(model, CheckpointSpec(path=str(tmp_path / "w.pt")))
    assert torch.equal(model.bias, torch.ones(2))


def test_a_pickled_model_of_modules_that_are_shared_without_end_holds_no_state() -> None:
    module = Stub()
    module.__dict__.update(_modules={}, _parameters={})
    for _ in range(60):
        outer = Stub()
        outer.__dict__.update(_modules={"a": module, "b": module}, _parameters={})
        module = outer
    assert state_of(module) is None
