"""``bnprobe compare``, and a scan of several checkpoints that ends with the same table."""

from __future__ import annotations

import csv
import json
from io import StringIO

import pytest
import torch

from functional.command import CLEAN, ERROR, FINDINGS, MODEL, SHIFTED, Workspace


@pytest.fixture
def run(workspace: Workspace) -> Workspace:
    """Three checkpoints of a run, of which the running mean comes nearer to the data."""
    workspace.write("model.py", SHIFTED)
    (workspace.folder / "run").mkdir()
    for epoch, mean in ((2, 1.0), (10, 2.0), (100, 3.0)):
        state = {
            "bn.weight": torch.ones(2), "bn.bias": torch.zeros(2), "bn.running_mean": torch.full((2,), mean),
            "bn.running_var": torch.ones(2), "bn.num_batches_tracked": torch.tensor(epoch),
            "head.weight": torch.ones(3, 2), "head.bias": torch.zeros(3),
        }  # fmt: skip
        torch.save(state, workspace.folder / f"run/epoch{epoch}.ckpt")
    return workspace


def test_a_scan_of_several_checkpoints_ends_with_a_table_over_time(run: Workspace) -> None:
    found = run.scan("--checkpoint", "run/*.ckpt")
    assert found.code == FINDINGS
    assert [line.partition(":")[0] for line in found.stderr.splitlines()] == [
        "run/epoch2.ckpt",
        "run/epoch10.ckpt",
        "run/epoch100.ckpt",
    ]
    assert "3 scans of model.py:load_model, from first to last" in found.stdout
    assert "From run/epoch2.ckpt to run/epoch100.ckpt: 1 of 1 layer surely better" in " ".join(found.stdout.split())


def test_every_scan_has_its_files_and_the_table_its_own(run: Workspace) -> None:
    options = ("--checkpoint", "run/epoch2.ckpt", "--checkpoint", "run/epoch100.ckpt", "--output-dir", "out")
    found = run.scan(*options, "--format", "json", "--format", "junit")
    assert found.code == FINDINGS
    names = sorted(path.name for path in (run.folder / "out").iterdir())
    assert names == ["compare.json", "scan-epoch100.json", "scan-epoch100.junit.xml", "scan-epoch2.json",
                     "scan-epoch2.junit.xml"]  # fmt: skip
    assert run.run("show", "out/compare.json").stdout == found.stdout
    assert run.run("compare", "out/scan-epoch2.json", "out/scan-epoch100.json").code == CLEAN
    again = run.scan(*options, "--format", "json")
    assert again.error().startswith("out/scan-epoch2.json already exists")


def test_no_scan_writes_the_file_of_another(run: Workspace) -> None:
    state = (run.folder / "run/epoch2.ckpt").read_bytes()
    for name in ("other/epoch2.ckpt", "other/1-epoch2.ckpt"):
        (run.folder / "other").mkdir(exist_ok=True)
        (run.folder / name).write_bytes(state)
    run.scan(
        "--checkpoint", "run/epoch2.ckpt", "--checkpoint", "other/*.ckpt", "--format", "json", "--output-dir", "out"
    )
    assert len([path for path in (run.folder / "out").iterdir() if path.name.startswith("scan-")]) == 3


def test_what_was_measured_before_a_checkpoint_that_is_damaged_is_not_lost(run: Workspace) -> None:
    run.write("run/epoch50.ckpt", "cut off")
    found = run.scan("--checkpoint", "run/*.ckpt")
    assert found.code == ERROR
    assert "2 scans of model.py:load_model, from first to last" in found.stdout
    assert "The checkpoint run/epoch50.ckpt (7 bytes) could not be read" in found.stderr
    (run.folder / "run/epoch10.ckpt").unlink()
    found = run.scan("--checkpoint", "run/*.ckpt", "--format", "json")
    assert found.code == ERROR
    assert json.loads(found.stdout)["scan"]["checkpoint"] == "run/epoch2.ckpt"


def test_what_several_checkpoints_cannot_have(run: Workspace) -> None:
    several = ("--checkpoint", "run/*.ckpt")
    assert run.scan(*several, "--write-baseline", "b.json").error() == (
        "--write-baseline is for one checkpoint, and --checkpoint names 3."
    )
    assert run.scan("--checkpoint", "no/*.ckpt").error() == "--checkpoint no/*.ckpt fits no file."
    assert run.scan(*several, "--format", "sarif").error().startswith("--format sarif does not support the comparison")
    found = run.scan("--checkpoint", "run/*0.ckpt", "--format", "json")
    assert (found.code, json.loads(found.stdout)["scans"][0]["flagged"]) == (FINDINGS, 1)


def test_a_pattern_that_fits_one_file_is_a_scan_of_it(run: Workspace) -> None:
    report = run.scan("--checkpoint", "run/*2.ckpt", "--format", "json").report(FINDINGS)
    assert report["scan"]["checkpoint"] == "run/epoch2.ckpt"


def test_reports_are_compared_in_every_format(workspace: Workspace) -> None:
    for name, source in (("bad", SHIFTED), ("good", MODEL)):
        workspace.write("model.py", source)
        workspace.scan("--format", "json", "--output", f"{name}.json")
    found = workspace.run("compare", "bad.json", "good.json")
    assert (found.code, found.stderr) == (CLEAN, "")
    assert "1 of 1 layer surely better" in found.stdout
    layer = workspace.run("compare", "bad.json", "good.json", "--format", "json").report(CLEAN)["layers"][0]
    assert (layer["name"], layer["trend"], len(layer["points"])) == ("bn", "better", 2)
    assert layer["ratio_interval"][1] < 1
    table = workspace.run("compare", "bad.json", "good.json", "--format", "csv").stdout
    assert [row["scan"] for row in csv.DictReader(StringIO(table))] == ["bad.json", "good.json"]
    shown = workspace.run("compare", "bad.json", "good.json", "--format", "markdown").stdout
    assert shown.startswith("### bnprobe compare: ✓ From bad.json to good.json: 1 of 1 layer surely better")
    assert workspace.run("compare", "bad.json").error() == "A comparison takes two reports or more."
    assert json.loads((workspace.folder / "bad.json").read_text())["summary"]["flagged"] == 1


def test_two_equal_reports_have_no_change(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    for name in ("one", "two"):
        assert workspace.scan("--format", "json", "--output", f"{name}.json").code == FINDINGS
    found = workspace.run("verify", "one.json", "two.json")
    assert (found.code, found.stderr) == (CLEAN, "")
    assert "✓ No change: both reports have the same figures." in found.stdout
    assert "From one.json to two.json: no change." in workspace.run("compare", "one.json", "two.json").stdout
