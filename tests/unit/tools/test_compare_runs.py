"""The script that compares two recordings: it finds what changed, and passes over what may change."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save

SCRIPT = Path(__file__).parents[3] / "tools" / "compare_runs.py"

RECORDED: dict[str, Any] = {
    "steps": [
        {
            "command": "bnprobe scan spec.yaml",
            "exit": 1,
            "seconds": 2.5,
            "stderr": "3 of 9 layers flagged",
            "output": {
                "tool": {"name": "bnprobe", "version": "0.1.0"},
                "environment": {"torch": "2.6.0", "threads": 1},
                "scan": {
                    "data": "load_data (1408 samples)",
                    "notes": ["One."],
                    "passes": [{"name": "impact", "images": 16}],
                },
                "layers": [
                    {"name": "bn", "location": "/tmp/a/model.py:25", "mismatch": 0.1, "flagged": True, "note": None}
                ],
                "diagnoses": [{"rule": "BN201", "cause": "small_batch", "message": "Batches are small.", "impact": 2}],
            },
        }
    ],
    "files": {"out.record.json": {"seconds": 1.0, "weights_sha256": "ab", "notes": []}},
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """The recording with another value at one place."""
    recorded = copy.deepcopy(RECORDED)
    place: Any = recorded
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return recorded


OUTPUT = ("steps", 0, "output")
LAYER = (*OUTPUT, "layers", 0)
DIAGNOSIS = (*OUTPUT, "diagnoses", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("steps", 0, "seconds"), 3.0),
        (("steps", 0, "stderr"), "other words"),
        ((*OUTPUT, "tool", "version"), "0.2.0"),
        ((*OUTPUT, "environment", "torch"), "2.7.0"),
        ((*OUTPUT, "scan", "data"), "load_data (1408 samples)"),
        ((*OUTPUT, "scan", "notes"), ["Another."]),
        ((*OUTPUT, "scan", "passes", 0, "name"), "effect on the output"),
        ((*LAYER, "location"), "/tmp/b/model.py:25"),
        ((*DIAGNOSIS, "message"), "Batches hold few values."),
        ((*DIAGNOSIS, "impact"), 2.0),
        (("files", "out.record.json", "weights_sha256"), "cd"),
    ],
)
def test_words_versions_times_and_folders_may_change(script: ModuleType, path: tuple[Any, ...], value: Any) -> None:
    assert list(script.differences(RECORDED, changed(*path, to=value))) == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("steps", 0, "exit"), 0, "steps[0].exit: 1 -> 0"),
        ((*LAYER, "mismatch"), 0.1 + 2e-17, "steps[0].output.layers[0].mismatch: 0.1 -> 0.10000000000000002"),
        ((*LAYER, "flagged"), 1, "steps[0].output.layers[0].flagged: true -> 1"),
        ((*LAYER, "name"), "norm", 'steps[0].output.layers[0].name: "bn" -> "norm"'),
        (
            (*LAYER, "location"),
            "/tmp/a/model.py:26",
            'steps[0].output.layers[0].location: "/tmp/a/model.py:25" -> "/tmp/a/model.py:26"',
        ),
        ((*LAYER, "note"), "New.", 'steps[0].output.layers[0].note: null -> "New."'),
        ((*LAYER, "extra"), 1, "steps[0].output.layers[0].extra: (absent) -> 1"),
        ((*DIAGNOSIS, "cause"), "lag", 'steps[0].output.diagnoses[0].cause: "small_batch" -> "lag"'),
        ((*OUTPUT, "scan", "notes"), [], "steps[0].output.scan.notes: 1 entries -> 0 entries"),
        (("files",), {}, 'files.out.record.json: {"seconds": 1.0, "weights_sha256": "ab", "notes": []} -> (absent)'),
        (("files", "out.record.json"), {}, None),
    ],
)
def test_figures_flags_causes_and_codes_may_not(
    script: ModuleType, path: tuple[Any, ...], value: Any, told: str | None
) -> None:
    found = [str(difference) for difference in script.differences(RECORDED, changed(*path, to=value))]
    if told is None:  # each field that is gone is a difference, of those that are not compared too
        assert len(found) == 3
    else:
        assert found == [told]


def test_a_relative_difference_is_allowed_to_numbers_alone(script: ModuleType) -> None:
    near, far = changed(*LAYER, "mismatch", to=0.1 * (1 + 1e-10)), changed(*LAYER, "mismatch", to=0.1 * (1 + 1e-8))
    assert list(script.differences(RECORDED, near, 1e-9)) == []
    assert len(list(script.differences(RECORDED, far, 1e-9))) == 1
    assert len(list(script.differences(RECORDED, changed("steps", 0, "exit", to=2), 1e-9))) == 1


def test_folders_are_compared_case_by_case(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, recorded in (("before", RECORDED), ("after", changed(*LAYER, "mismatch", to=0.2))):
        (tmp_path / folder / "scan").mkdir(parents=True)
        (tmp_path / folder / "scan" / "digits.json").write_text(json.dumps(recorded))
    (tmp_path / "before" / "lint.json").write_text(json.dumps(RECORDED))
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    assert script.main(["compare", before, before]) == 0
    assert capsys.readouterr().out == "2 cases, no differences\n"
    assert script.main(["compare", before, after]) == 1
    lint, digits, count = capsys.readouterr().out.splitlines()
    assert lint.startswith("lint  (the whole case): {")
    assert lint.endswith("-> (absent)")
    assert digits == "scan/digits  steps[0].output.layers[0].mismatch: 0.1 -> 0.2"
    assert count == "2 cases, 2 differences"
    assert script.main(["compare", before, after, "--only", "scan/*"]) == 1
    with pytest.raises(SystemExit, match="nothing"):
        script.main(["compare", before, after, "--only", "nothing"])


def test_a_changed_weight_changes_one_hash(script: ModuleType) -> None:
    state = {"weight": torch.arange(6.0).reshape(2, 3), "tracked": torch.tensor(3)}
    one = script.read_tensors(save(state, {"to": "frozen"}))
    state["weight"][1, 2] += 1e-6
    other = script.read_tensors(save(state, {"to": "frozen"}))
    assert one["metadata"] == {"to": "frozen"}
    assert one["tensors"]["weight"]["shape"] == [2, 3]
    assert [difference.path for difference in script.differences(one, other)] == ["tensors.weight.sha256"]


def test_rules_and_figures_are_read_off_text(script: ModuleType) -> None:
    table = "Code   Finds              Cause        Needs\nBN201  batches too small  small_batch  data\n"
    assert script.explained(table) == [["BN201", "small_batch"]]
    assert script.explained("BN201: batches too small\nCompare BN202.") == [["BN201"], ["BN202"]]
    text = "largest difference  1.5e-06 (of 2)\nchecked on          5 batches of 8, 1 images\nwritten to x.pt: 3\n"
    assert script.table_figures(text) == [[1.5e-06, 2], [5, 8, 1]]


def test_cells_of_a_log_are_numbers_where_they_can_be(script: ModuleType) -> None:
    assert script.read_table("arm,loss\nfrozen,0.5\nfrozen,\n") == {"arm": ["frozen", "frozen"], "loss": [0.5, ""]}


def test_the_table_covers_every_sample(script: ModuleType) -> None:
    commands = " ".join(command for case in script.CASES.values() for command in case)
    samples = SCRIPT.parents[1] / "sample_configs"
    for spec in samples.glob("*/*.yaml"):
        assert f"scan {spec.relative_to(samples).as_posix()}" in commands
