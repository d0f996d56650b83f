"""The spec: what is accepted, which source wins, and what errors say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnprobe.config.load import build_spec, settings_from
from bnprobe.config.spec import ScanSettings, is_file_target, split_target
from bnprobe.errors import SpecError, UsageError


def write(folder: Path, text: str, name: str = "spec.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def spec_error(folder: Path, text: str) -> str:
    with pytest.raises(SpecError) as caught:
        build_spec(str(write(folder, text)), {})
    return str(caught.value)


def test_full_spec_is_read_with_paths_relative_to_the_file(tmp_path: Path) -> None:
    spec = build_spec(
        str(
            write(
                tmp_path,
                """
model: {target: model.py:Net, args: {depth: 18}}
checkpoint: {path: weights.pt, key: ema, strip_prefix: net, strict: false, unsafe_load: true}
data: {target: "package.data:load", args: {root: x}, batch_size: 2, batches: 50, seed: 7,
  input_shape: [3, 8, 8]}
eval_data: {target: data.py:load_eval, batch_size: 4}
forward: functions.py:forward
loss: loss
thresholds: {"layer4.*": 16, "*": 24}
layers: {include: ["layer*"], exclude: ["*.bn3"]}
scan: {max_batches: 10, device: cpu, autocast: bfloat16, physical_batch: 64, batch_sizes: [4, 1, 4],
  emulate: false}
""",
            )
        ),
        {},
    )
    assert spec.model.target == f"{tmp_path / 'model.py'}:Net"
    assert spec.model.args == {"depth": 18}
    assert spec.checkpoint.path == str(tmp_path / "weights.pt")
    assert (spec.checkpoint.key, spec.checkpoint.strip_prefix) == ("ema", "net")
    assert (spec.checkpoint.strict, spec.checkpoint.unsafe_load) == (False, True)
    assert spec.data.target == "package.data:load"
    assert spec.data.input_shape == ((3, 8, 8),)
    assert spec.eval_data.target == f"{tmp_path / 'data.py'}:load_eval"
    assert spec.forward == f"{tmp_path / 'functions.py'}:forward"
    assert spec.loss == "loss"
    assert spec.settings() == ScanSettings(
        batch_size=2,
        batches=50,
        seed=7,
        max_batches=10,
        device="cpu",
        autocast="bfloat16",
        physical_batch=64,
        batch_sizes=(1, 4),
        emulate=False,
        thresholds={"*": 24, "layer4.*": 16},
        include=("layer*",),
        exclude=("*.bn3",),
    )


def test_short_forms_and_aliases(tmp_path: Path) -> None:
    spec = build_spec(
        str(
            write(
                tmp_path,
                "model: {class_path: nets.Net, init_args: {width: 2}}\n"
                "checkpoint: w.pt\ndata: load_small\nthresholds: 12\nlayers:\n",
            )
        ),
        {},
    )
    assert (spec.model.target, spec.model.args) == ("nets.Net", {"width": 2})
    assert spec.checkpoint.path == str(tmp_path / "w.pt")
    assert spec.data.target == "load_small"
    assert spec.thresholds == {"*": 12.0}
    assert spec.layers.include == ()


@pytest.mark.parametrize("given", ["3,8,8", ["3,8,8"], [3, 8, 8], [[3, 8, 8]], ((3, 8, 8),)])
def test_one_input_shape_in_every_spelling(given: object) -> None:
    assert build_spec("model.py", {"data.input_shape": given}).data.input_shape == ((3, 8, 8),)


def test_several_input_shapes_and_batch_sizes_from_text() -> None:
    spec = build_spec("model.py", {"data.input_shape": ["3,8,8", "10"], "scan.batch_sizes": "8,1,2"})
    assert spec.data.input_shape == ((3, 8, 8), (10,))
    assert spec.scan.batch_sizes == (1, 2, 8)


# ---- thresholds and selection


def test_the_last_matching_glob_wins_and_the_star_is_the_weakest() -> None:
    settings = ScanSettings(thresholds={"layer4.*": 16, "*.bn1": 8, "*": 64})
    assert settings.threshold_of("stem") == 64
    assert settings.threshold_of("layer4.0.bn2") == 16
    assert settings.threshold_of("layer4.0.bn1") == 8
    assert ScanSettings().threshold_of("anything") == 32


def test_selection() -> None:
    settings = ScanSettings(include=("layer*",), exclude=("*.bn3",))
    assert settings.is_selected("layer1.bn1")
    assert not settings.is_selected("layer1.bn3")
    assert not settings.is_selected("Layer1.bn1")  # case counts
    assert ScanSettings(exclude=("x",)).is_selected("y")


def test_a_shared_layer_goes_by_all_its_names() -> None:
    settings = ScanSettings(include=("a.*", "b.*"), exclude=("b.bn",), thresholds={"b.*": 16, "a.*": 8})
    assert settings.is_selected("other", "a.bn")
    assert not settings.is_selected("a.bn", "b.bn")
    assert settings.threshold_of("b.bn", "a.bn") == settings.threshold_of("a.bn", "b.bn") == 8


def test_settings_of_the_python_api_name_the_argument() -> None:
    assert settings_from({"batch_size": 2, "batches": None, "thresholds": 16}).thresholds == {"*": 16}
    with pytest.raises(UsageError, match="at least 1 for batch_size, but got 0"):
        settings_from({"batch_size": 0})
    with pytest.raises(UsageError, match='Unknown argument "batchsize"; the nearest is "batch_size"'):
        settings_from({"batchsize": 2})


# ---- precedence


def test_options_win_over_the_spec_which_wins_over_pyproject(tmp_path: Path) -> None:
    write(
        tmp_path,
        "[tool.bnprobe]\nthresholds = {'*' = 10, 'a*' = 1, 'b*' = 2}\ncheckpoint = 'default.pt'\n"
        "[tool.bnprobe.data]\nbatch_size = 8\nbatches = 9\nseed = 3\n"
        "[tool.bnprobe.layers]\nexclude = ['x']\n",
        "pyproject.toml",
    )
    folder = tmp_path / "configs"
    folder.mkdir()
    path = write(folder, "model: model.py\ndata: {batch_size: 4, batches: 5}\nthresholds: {'a*': 7}\n")
    spec = build_spec(str(path), {"data.batch_size": 2, "data.batches": None, "thresholds": {"*": 16}})
    assert (spec.data.batch_size, spec.data.batches, spec.data.seed) == (2, 5, 3)
    assert list(spec.thresholds.items()) == [("*", 16.0), ("b*", 2.0), ("a*", 7.0)]
    assert spec.checkpoint.path == str(tmp_path / "default.pt")
    assert spec.layers.exclude == ("x",)


def test_pyproject_of_a_bare_file_target_and_of_a_module_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "[tool.bnprobe.data]\nbatch_size = 8\n", "pyproject.toml")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(elsewhere, "[tool.bnprobe.data]\nbatch_size = 3\n", "pyproject.toml")
    monkeypatch.chdir(elsewhere)
    file_spec = build_spec(str(tmp_path / "sub" / "model.py:Net"), {"checkpoint.path": "w.pt"})
    assert file_spec.data.batch_size == 8
    assert file_spec.checkpoint.path == "w.pt"  # relative to the working directory
    for target in ("package.module:Net", "timm:resnet18", "timm:hf_hub:timm/resnet18"):
        spec = build_spec(target, {})
        assert (spec.model.target, spec.data.batch_size) == (target, 3)


def test_args_belong_to_their_target(tmp_path: Path) -> None:
    write(tmp_path, "[tool.bnprobe.model]\ntarget = 'a.py'\nargs = {depth = 1}\n", "pyproject.toml")
    assert build_spec(str(tmp_path / "b.py"), {}).model.args == {}
    assert build_spec(str(tmp_path / "a.py"), {}).model.args == {"depth": 1}


def test_yaml_takes_args_in_place_of_those_of_pyproject(tmp_path: Path) -> None:
    write(tmp_path, "[tool.bnprobe.model]\nargs = {depth = 1}\n", "pyproject.toml")
    path = write(tmp_path, "model: {target: m.py, args: {width: 2}}\n")
    assert build_spec(str(path), {}).model.args == {"width": 2}


# ---- errors: keys


def test_unknown_key_names_line_and_nearest_key(tmp_path: Path) -> None:
    message = spec_error(tmp_path, "model: m.py\ndata:\n  batches: 3\n  bath_size: 2\n")
    assert f'Unknown key "bath_size" in data ({tmp_path / "spec.yaml"}, line 4)' in message
    assert 'the nearest known key is "batch_size"' in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m.py\nmodle: 3\n", '"modle" ({path}, line 2); the nearest known key is "model"'),
        ("model: m.py\nbatch_size: 3\n", 'line 2); the nearest known key is "data.batch_size"'),
        ("model: m.py\nscan:\n  zzz: 1\n", "line 3); the known keys are max_batches, device, autocast"),
        ("model: m.py\neval_data: {input_shape: [3]}\n", '"input_shape" in eval_data ({path}, line 2)'),
        ("model: m.py\nmodel:\n  target: n.py\n", 'The key "model" is given twice in {path}, lines 1 and 2'),
        (
            "model:\n  target: a\n  class_path: b\n",
            'The key "target" is given twice in {path}, lines 2 and 3',
        ),
        ("data: {batch_size: 2}\n", "model is missing"),
        ("model:\n  args: {}\n", "model.target is missing ({path}, line 1)"),
        ("", "model is missing"),
        ("model: m.py\ndata: {1: 2}\n", "Expected text as key for data[1], but got 1"),
    ],
)
def test_wrong_keys(tmp_path: Path, text: str, expected: str) -> None:
    assert expected.format(path=tmp_path / "spec.yaml") in spec_error(tmp_path, text)


def test_arguments_of_the_users_functions_are_free(tmp_path: Path) -> None:
    text = "model: m.py\ndata:\n  target: load\n  args: {target: 1, class_path: 2, nested: {a: [1]}}\n"
    assert build_spec(str(write(tmp_path, text)), {}).data.args == {"target": 1, "class_path": 2, "nested": {"a": [1]}}


# ---- errors: values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:\n  batch_size: two\n", "Expected a whole number for data.batch_size, but got the text 'two'"),
        ("data:\n  batch_size: 0\n", "Expected a whole number of at least 1 for data.batch_size, but got 0"),
        ("data:\n  batch_size: 2.5\n", "but got 2.5"),
        ("data:\n  batch_size: true\n", "but got true"),
        ("data:\n  seed: 4294967296\n", "Expected a number below 4294967296 for data.seed"),
        (
            "data:\n  input_shape: [3, 0]\n",
            "Expected a whole number of at least 1 for data.input_shape[0][1]",
        ),
        ("data:\n  input_shape: large\n", "Expected a list for data.input_shape, but got the text 'large'"),
        ("data:\n  args: 3\n", "Expected a mapping (key: value) for data.args, but got 3"),
        ("checkpoint:\n  strict: 'no'\n", "Expected true or false for checkpoint.strict"),
        ("scan:\n  autocast: fp16\n", "Expected 'bfloat16' or 'float16' for scan.autocast"),
        ("scan:\n  batch_sizes: [1, x]\n", "Expected a whole number for scan.batch_sizes[1]"),
        ("layers:\n  include: bn1\n", "Expected a list for layers.include, but got the text 'bn1'"),
        ("thresholds:\n  layer1: 0\n", "Expected a number above 0.0 for thresholds.layer1, but got 0"),
        ("thresholds:\n  layer1: .inf\n", "Expected a finite number for thresholds.layer1, but got inf"),
    ],
)
def test_wrong_values_name_key_line_and_type(tmp_path: Path, text: str, expected: str) -> None:
    message = spec_error(tmp_path, "model: m.py\n" + text)
    assert expected in message
    assert message.endswith(f"({tmp_path / 'spec.yaml'}, line 3).")


def test_a_broken_section_is_not_hidden_by_an_option(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m.py\ndata: [1, 2]\n")
    with pytest.raises(SpecError, match=r"Expected a mapping .* for data, but got the list \[1, 2\].*line 2"):
        build_spec(str(path), {"data.batch_size": 2})


def test_every_error_is_reported(tmp_path: Path) -> None:
    message = spec_error(tmp_path, "model: m.py\ndata: {batch_size: x, seeds: 1}\n")
    assert "data.batch_size" in message
    assert '"seeds"' in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"data.batch_size": 0}, "Expected a whole number of at least 1 for --batch-size, but got 0."),
        ({"scan.max_batches": 0}, "for --max-batches, but got 0."),
        ({"thresholds": {"*": -1}}, "Expected a number above 0.0 for --threshold, but got -1."),
        (
            {"data.input_shape": ["3,a"]},
            "Expected whole numbers and commas (as in 1,2,4) for --input-shape, but got the text '3,a'.",
        ),
        ({"checkpoint.path": 3}, "Expected text for --checkpoint, but got 3."),
    ],
)
def test_errors_of_options_name_the_option(tmp_path: Path, overrides: dict[str, object], expected: str) -> None:
    path = write(tmp_path, "model: m.py\ndata: {batch_size: 2}\n")
    with pytest.raises(UsageError) as caught:
        build_spec(str(path), overrides)
    assert str(caught.value).endswith(expected)
    assert "line" not in str(caught.value)


def test_errors_of_pyproject_name_it(tmp_path: Path) -> None:
    path = write(tmp_path, "[tool.bnprobe.data]\nbatch_size = 'x'\n", "pyproject.toml")
    with pytest.raises(SpecError) as caught:
        build_spec(str(tmp_path / "model.py"), {})
    assert f"([tool.bnprobe] of {path})" in str(caught.value)
    write(tmp_path, "[tool.bnprobe\n", "pyproject.toml")
    with pytest.raises(SpecError, match=r"is not valid TOML: .*line 1"):
        build_spec(str(tmp_path / "model.py"), {})
    write(tmp_path, "[tool]\nbnprobe = 3\n", "pyproject.toml")
    with pytest.raises(SpecError, match="must be a table, but is 3"):
        build_spec(str(tmp_path / "model.py"), {})


# ---- errors: YAML


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: m.py\ndata: batch_size: 2\n",
            "line 2 is not valid YAML (mapping values are not allowed here)",
        ),
        ("model: m.py\ndata:\n\tbatch_size: 2\n", "line 3 is not valid YAML"),
        ("model: m.py\nthresholds: {*: 3}\n", "Put names that start with * in quotes."),
        (
            "model: !!python/object:os.system {}\n",
            "line 1 is not valid YAML (could not determine a constructor",
        ),
        ("model: [\n", "the end of the file"),
        ("model: m.py\ndata: {args: {day: 2024-13-45}}\n", "is not valid YAML: month must be in 1..12"),
        ("- a\n- b\n", "line 1: a spec file must be a mapping (key: value), but is the list ['a', 'b']"),
        ("model: a\0\n", "is not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, expected: str) -> None:
    message = spec_error(tmp_path, text)
    assert str(tmp_path / "spec.yaml") in message
    assert expected in message


def test_yaml_without_an_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m.py\ndata:\n  args: &a\n    self: *a\n")
    with pytest.raises(SpecError, match=r"spec.yaml is not valid YAML: line 3 has a value that an alias"):
        build_spec(str(path), {})
    bomb = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12))
    for use in ("", "layers: {include: *x11}\n", "data: {args: {a: *x11}}\n", "<<: *x11\n"):
        message = spec_error(tmp_path, f"model: m.py\nx0: &x0 [a]\n{bomb}{use}")
        assert "it holds more than 100,000 values, those that aliases repeat included" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 5000, "it is nested too deeply"),
        ("model: m.py\ndata: {batches: " + "9" * 10**6 + "}", "is larger than 1 MB"),
        ("model: m.py\ndata: {batches: " + "9" * 10**5 + "}", "line 2 has a number of more than 400 characters"),
        ("model: m.py\ndata: {batches: 1" + ":59" * 10**5 + "}", "line 2 has a number of more than 400 characters"),
        (
            "model: m.py\ndata: {batches: " + "9" * 300 + "}",
            "a number of at most 1000000 for data.batches",
        ),
        ("model: m.py\nthresholds: 0x" + "f" * 390, "Expected a"),
        ("model: m.py\nlayers: {include: [1, 2, " + "[3], " * 1000 + "]}", "for layers.include[0], but got 1"),
    ],
    ids=["nested", "large", "digits", "base 60", "huge", "huge float", "list"],
)
def test_what_is_too_large_is_said_shortly(tmp_path: Path, text: str, expected: str) -> None:
    message = spec_error(tmp_path, text)
    assert expected in message
    assert len(message) < 1000 or message.count("\n")


def test_a_pipe_that_nothing_writes_to_is_no_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnprobe.paths.WAIT", 0.05)
    os.mkfifo(tmp_path / "spec.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    with pytest.raises(SpecError, match="is a pipe that nothing writes to"):
        build_spec(str(tmp_path / "spec.yaml"), {})
    with pytest.raises(SpecError, match="is larger than 1 MB"):
        build_spec(str(tmp_path / "zero.yaml"), {})


def test_missing_and_unreadable_spec_files(tmp_path: Path) -> None:
    write(tmp_path, "model: m.py\n")
    with pytest.raises(SpecError, match=rf"The file .*spce\.yaml does not exist\. Did you mean .*{'spec.yaml'}"):
        build_spec(str(tmp_path / "spce.yaml"), {})
    with pytest.raises(SpecError, match=r"The folder .* does not exist"):
        build_spec(str(tmp_path / "none" / "spec.yaml"), {})
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(SpecError, match="could not be read"):
        build_spec(str(tmp_path / "folder.yaml"), {})
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9.py\n")
    with pytest.raises(SpecError, match="could not be read as UTF-8"):
        build_spec(str(tmp_path / "latin.yaml"), {})


# ---- targets


@pytest.mark.parametrize(
    ("target", "parts", "is_file"),
    [
        ("model.py", ("model.py", None), True),
        ("a/b/model.py:Net", ("a/b/model.py", "Net"), True),
        ("model.py:", ("model.py", None), True),
        (r"C:\x\model.py", (r"C:\x\model.py", None), True),
        (r"C:\x\model.py:Net", (r"C:\x\model.py", "Net"), True),
        ("package.module:Net", ("package.module", "Net"), False),
        ("timm:resnet18", ("timm", "resnet18"), False),
        ("load_data", ("load_data", None), False),
    ],
)
def test_targets(target: str, parts: tuple[str, str | None], is_file: bool) -> None:
    assert split_target(target) == parts
    assert is_file_target(target) is is_file


def test_the_spec_needs_no_torch() -> None:
    code = "import sys, bnprobe.config.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_of_tensors_is_data(tmp_path: Path) -> None:
    spec = build_spec("m.py", {"data.target": "rows.npz"})
    assert (spec.data.target, spec.data.tensors) == (None, "rows.npz")
    assert spec.files() == ["m.py", "rows.npz"]
    path = tmp_path / "spec.yaml"
    path.write_text("model: hf:net\ndata: {tensors: rows.pt}\neval_data: {target: more.npy}\n", encoding="utf-8")
    spec = build_spec(str(path), {})
    assert spec.model.target == f"hf:{tmp_path / 'net'}"
    assert (spec.data.tensors, spec.eval_data.tensors) == (str(tmp_path / "rows.pt"), str(tmp_path / "more.npy"))
    path.write_text("model: m.py\ndata: {tensors: rows.pt, target: m.py:loader}\n", encoding="utf-8")
    with pytest.raises(SpecError, match="Expected either tensors or target for data"):
        build_spec(str(path), {})


@pytest.mark.parametrize("held", ["tensors: rows.pt", "target: rows.pt", "target: m.py:load, args: {root: .}"])
@pytest.mark.parametrize("given", ["m.py:loader", "more.pt"])
def test_data_of_an_option_takes_the_place_of_any_other(tmp_path: Path, held: str, given: str) -> None:
    path = write(tmp_path, f"model: m.py\ndata: {{{held}, batch_size: 4}}\n")
    data = build_spec(str(path), {"data.target": given}).data
    assert [each for each in (data.target, data.tensors) if each] == [given]
    assert (data.args, data.batch_size) == ({}, 4)
