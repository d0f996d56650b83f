"""``bnprobe config``: what is in force, and where each setting comes from."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import typer
import yaml

from bnprobe.cli.app import app
from functional.command import CLEAN, MODEL, Workspace

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SPEC = """\
model:
  class_path: model.py:Net
checkpoint: weights.pt
data:
  batch_size: 8
  seed: 3
thresholds: {"head.*": 8}
"""


@pytest.fixture
def project(workspace: Workspace) -> Workspace:
    """A spec file, and a pyproject.toml that it overrides in part."""
    workspace.write("spec.yaml", SPEC)
    workspace.write("pyproject.toml", "[tool.bnprobe]\nthresholds = 64\ndata = {batch_size = 4, batches = 9}\n")
    return workspace


def origins(workspace: Workspace, *arguments: str) -> dict[str, Any]:
    """Every setting as ``{"data.seed": (3, "spec.yaml, line 6"), ...}``."""
    found = workspace.run("config", *arguments, "--format", "json").report(CLEAN)
    flat: dict[str, Any] = {}
    for section, parts in found.items():
        alone = parts.keys() == {"value", "from"}
        entries = {section: parts} if alone else {f"{section}.{key}": part for key, part in parts.items()}
        flat |= {name: (entry["value"], entry["from"]) for name, entry in entries.items()}
    return flat


def test_every_setting_says_where_it_comes_from(project: Workspace) -> None:
    found = origins(project, "spec.yaml", "--seed", "5", "--exclude", "a.*")
    assert found["model.target"] == ("model.py:Net", "spec.yaml, line 2")
    assert found["checkpoint.path"] == ("weights.pt", "spec.yaml, line 3")
    assert found["data.batch_size"] == (8, "spec.yaml, line 5")
    assert found["data.seed"] == (5, "option --seed")
    assert found["layers.exclude"] == (["a.*"], "option --exclude")
    assert found["data.batches"][0] == 9
    assert found["data.batches"][1].startswith("[tool.bnprobe] of ")
    assert found["thresholds.head.*"] == (8, "spec.yaml, line 7")
    assert found["thresholds.*"][0] == 64
    assert found["scan.max_batches"] == (256, "default")
    assert found["loss"] == (None, "default")


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("--data", "data.py:loader", "data.target"),
        ("--data", "rows.pt", "data.tensors"),
        ("--eval-data", "rows.pt", "eval_data.tensors"),
        ("--model-arg", "depth=3", "model.args"),
        ("--no-emulate", None, "scan.emulate"),
    ],
)
def test_an_option_is_called_by_its_name(project: Workspace, option: str, value: str | None, key: str) -> None:
    found = origins(project, "spec.yaml", option, *([] if value is None else [value]))
    assert found[key][1] == f"option {option}"


def test_a_model_and_no_target_at_all(project: Workspace) -> None:
    project.write("model.py", MODEL)
    assert origins(project, "model.py", "--batch-size", "2")["model.target"] == ("model.py", "TARGET")
    found = origins(project)
    assert "model.target" not in found
    assert found["data.batch_size"][0] == 4


def test_yaml_is_a_spec_file_and_toml_a_pyproject_with_the_same_settings(project: Workspace) -> None:
    values = {name: value for name, (value, _) in origins(project, "spec.yaml").items()}
    written = project.run("config", "spec.yaml").stdout
    project.write("again.yaml", written)
    assert {name: value for name, (value, _) in origins(project, "again.yaml").items()} == values
    assert yaml.safe_load(written)["data"]["batch_size"] == 8
    text = project.run("config", "spec.yaml", "--format", "toml").stdout
    table = tomllib.loads(text)["tool"]["bnprobe"]
    assert (table["data"]["batch_size"], table["thresholds"]["head.*"]) == (8, 8)
    project.write("pyproject.toml", text)
    assert {name: value for name, (value, _) in origins(project).items()} == values


def test_paths_are_as_short_as_one_would_write_them(project: Workspace) -> None:
    """Of a spec in another folder, and where a link makes a shorter one another file."""
    (project.folder / "specs").mkdir()
    project.write("specs/spec.yaml", SPEC.replace("model.py", "../model.py").replace("weights.pt", "../weights.pt"))
    found = {name: value for name, (value, _) in origins(project, "specs/spec.yaml").items()}
    assert (found["model.target"], found["checkpoint.path"]) == ("model.py:Net", "weights.pt")
    (project.folder / "elsewhere" / "deep").mkdir(parents=True)
    (project.folder / "link").symlink_to(project.folder / "elsewhere" / "deep", target_is_directory=True)
    project.write("linked.yaml", SPEC.replace("model.py", "link/../model.py"))
    assert origins(project, "linked.yaml")["model.target"][0] == "link/../model.py:Net"


def test_it_takes_what_a_scan_takes_and_loads_nothing(project: Workspace) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        name: {each for parameter in commands[name].params for each in parameter.opts} for name in ("scan", "config")
    }
    assert {"--what-if", "--batch-sizes", "--checkpoint", "--goal"} <= options["config"]
    assert options["config"] - {"--format", "target"} <= options["scan"]
    project.write("model.py", "raise RuntimeError('loaded')")
    assert project.run("config", "model.py").code == CLEAN


def test_errors_are_those_of_a_scan(project: Workspace) -> None:
    project.write("spec.yaml", SPEC + "dta: 3\n")
    assert 'Unknown key "dta" (spec.yaml, line 8)' in project.run("config", "spec.yaml").error()
    assert (
        "Expected a whole number of at least 1 for --batch-size" in project.run("config", "--batch-size", "0").error()
    )
    assert json.loads(project.run("config", "--format", "json").stdout)["data"]["batches"]["value"] == 9
