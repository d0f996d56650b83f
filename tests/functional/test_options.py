"""Options, spec and pyproject.toml: each does what it says."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from functional.command import CLEAN, FINDINGS, MODEL, SHIFTED, Workspace

TWO = (
    MODEL
    + """
def load_model():
    return nn.Sequential(nn.BatchNorm2d(2), Net())
"""
)
JSON = ("--format", "json")


def _names(report: dict[str, Any]) -> list[str]:
    return [layer["name"] for layer in report["layers"]]


def test_exit_zero_is_for_findings(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    report = workspace.scan(*JSON, "--exit-zero").report(CLEAN)
    assert report["summary"]["flagged"] == 1


def test_a_threshold_decides_what_is_flagged(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    report = workspace.scan(*JSON, "--threshold", "1000").report(FINDINGS)
    assert [layer["threshold"] for layer in report["layers"]] == [1000]


def test_thresholds_by_layer(workspace: Workspace) -> None:
    workspace.write("model.py", TWO)
    workspace.write("spec.yaml", "model: model.py\ndata: {batch_size: 2}\nthresholds: {'*': 1000, '1.*': 8}\n")
    report = workspace.run("scan", "spec.yaml", *JSON).report(FINDINGS)
    assert [(layer["name"], layer["threshold"], layer["flagged"]) for layer in report["layers"]] == [
        ("0", 1000, True),
        ("1.bn", 8, False),
    ]


@pytest.mark.parametrize(
    ("options", "names"),
    [(["--include", "1.*"], ["1.bn"]), (["--exclude", "1.*"], ["0"])],
    ids=["include", "exclude"],
)
def test_layers_are_selected_by_name(workspace: Workspace, options: list[str], names: list[str]) -> None:
    workspace.write("model.py", TWO)
    assert _names(workspace.scan(*JSON, *options).report(CLEAN)) == names


def test_a_selection_that_leaves_nothing_is_explained(workspace: Workspace) -> None:
    workspace.write("model.py", TWO)
    message = workspace.scan("--include", "head*").error(3)
    assert "--include/--exclude exclude every BN layer of Sequential (2 in all); the first is named '0'." in message


def test_batches_and_batch_sizes_are_exact(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    report = workspace.scan(*JSON, "--batches", "11", "--batch-sizes", "4,1,2").report(CLEAN)
    scan = report["scan"]
    assert (scan["batches"], scan["images"], scan["stopped"]) == (11, 22, "requested")
    assert [point["batch_size"] for point in report["layers"][0]["batch_sizes"]] == [1, 2, 4]


def test_real_micro_batches_on_request(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    scan = workspace.scan(*JSON, "--no-emulate").report(CLEAN)["scan"]
    assert (scan["emulated"], scan["physical_batch"]) == (False, 2)


def test_a_seed_repeats_a_scan_bit_for_bit(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    first, again, other = (workspace.scan(*JSON, "--seed", seed).report(CLEAN) for seed in ("5", "5", "6"))
    for report in (first, again, other):
        for measured in (report["scan"], *report["scan"]["passes"]):
            assert measured.pop("seconds") >= 0
    assert first == again
    assert first["layers"] != other["layers"]


def test_made_up_images_without_data(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL + "del load_data\n")
    scan = workspace.scan(*JSON, "--input-shape", "2,8,8").report(CLEAN)["scan"]
    assert scan["synthetic"] is True
    assert scan["data"] == "synthetic inputs of shape 2x8x8"


def test_pyproject_gives_defaults_that_options_override(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    workspace.write("pyproject.toml", "[tool.bnprobe]\nthresholds = 4000\ndata = {batch_size = 4, batches = 3}\n")
    report = workspace.run("scan", "model.py", *JSON, "--batches", "12").report(FINDINGS)
    scan = report["scan"]
    assert (scan["batch_size"], scan["batches"], report["layers"][0]["threshold"]) == (4, 12, 4000)


def test_a_module_of_the_working_directory_and_python_m(workspace: Workspace) -> None:
    workspace.write("nets/__init__.py", "")
    workspace.write("nets/small.py", SHIFTED)
    arguments = ("scan", "nets.small:Net", "--batch-size", "2", *JSON)
    found = workspace.call(sys.executable, "-X", "importtime", "-m", "bnprobe", *arguments)
    report = json.loads(found.stdout)
    assert (found.code, report["scan"]["model"]) == (FINDINGS, "nets.small:Net")
    assert report["layers"][0]["impact"] is not None
    loaded = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "torch" in loaded
    assert not loaded & {"sympy", "torch._dynamo", "scipy.stats", "scipy.optimize"}  # each takes long to import


def test_half_precision(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    assert workspace.scan(*JSON, "--autocast", "bfloat16").report(CLEAN)["scan"]["autocast"] == "bfloat16"
