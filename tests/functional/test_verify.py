"""``bnprobe verify``: exit codes that CI can use, and files that are no reports."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from functional.command import CLEAN, FINDINGS, MODEL, SHIFTED, Workspace

TWO = SHIFTED.replace(
    "self.bn = nn.BatchNorm2d(2)", "self.bn, self.fine = nn.BatchNorm2d(2), nn.BatchNorm2d(2)"
).replace("self.bn(x)", "(self.bn(x) + self.fine(x - SHIFT))")
"""Two BN layers, of which a scan flags the first."""


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bad.json of a flagged model, good.json of a clean one, other.json of another model."""
    workspace = Workspace(tmp_path_factory.mktemp("scanned"))
    other = MODEL.replace("self.bn", "self.norm")
    for name, source in (("bad", SHIFTED), ("good", MODEL), ("other", other)):
        workspace.write("model.py", source)
        workspace.scan("--format", "json", "--output", f"{name}.json")
    return workspace.folder


@pytest.fixture
def reports(workspace: Workspace, scanned: Path) -> Workspace:
    """The three reports in a folder of the test's own."""
    for path in scanned.glob("*.json"):
        shutil.copy(path, workspace.folder)
    return workspace


def test_a_repair_that_holds_and_one_that_does_not(reports: Workspace) -> None:
    found = reports.run("verify", "bad.json", "good.json")
    assert (found.code, found.stderr) == (CLEAN, "")
    assert "1 of 1 layer flagged before, none after" in found.stdout
    found = reports.run("verify", "good.json", "bad.json")
    assert (found.code, found.stderr) == (FINDINGS, "")
    assert "Newly flagged: bn." in found.stdout


def test_json(reports: Workspace) -> None:
    reports.write("model.py", SHIFTED)
    reports.scan("--seed", "1", "--format", "json", "--output", "worse.json")
    found = reports.run("verify", "bad.json", "worse.json", "--format", "json", "--output", "found.json")
    assert (found.code, found.stderr) == (FINDINGS, "Report written to found.json.\n")
    assert "1 of 1 layer flagged before, 1 after" in found.stdout
    written = json.loads((reports.folder / "found.json").read_text())
    assert (written["passed"], written["unchanged"], written["problems"]) == (False, False, ["Still flagged: bn."])


def test_a_bad_layer_left_out_of_the_second_scan_is_not_repaired(workspace: Workspace) -> None:
    workspace.write("model.py", TWO)
    for name, options in (("before", ()), ("after", ("--exclude", "bn")), ("other", ("--include", "bn"))):
        workspace.scan("--format", "json", "--output", f"{name}.json", *options)
    reports = {name: json.loads((workspace.folder / f"{name}.json").read_text()) for name in ("before", "after")}
    assert [layer["name"] for layer in reports["before"]["layers"] if layer["flagged"]] == ["bn"]
    assert [reports[name]["scan"]["unselected"] for name in reports] == [[], ["bn"]]
    found = workspace.run("verify", "before.json", "after.json", "--format", "json")
    assert found.report(FINDINGS)["problems"] == [
        "Flagged before, and left out of the second scan by --include/--exclude: bn."
    ]
    refused = workspace.run("verify", "after.json", "other.json").error()
    assert refused.startswith("The reports have no layer in common: --include/--exclude selected different layers")


def test_a_larger_batch_is_no_repair(reports: Workspace) -> None:
    reports.write("model.py", MODEL)
    reports.scan("--batch-size", "16", "--format", "json", "--output", "larger.json")
    found = reports.run("verify", "good.json", "larger.json")
    assert (found.code, found.stderr) == (FINDINGS, "")
    assert "Scan again with --batch-size 2." in found.stdout


def test_reports_of_different_models(reports: Workspace) -> None:
    message = reports.run("verify", "bad.json", "other.json").error()
    assert message.startswith("The reports are of different models: they have no layer in common.")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "after.json: This is not a JSON report of bnprobe"),
        (b"[]", "after.json: This is not a JSON report of bnprobe: the top level is not an object."),
        (b'{"schema_version": 99}', "after.json: The JSON report has schema_version 99, and this bnprobe reads"),
        (b'{"schema_version": 1}', "after.json: The JSON report does not fit its schema"),
        (b"[" * 200_000, "after.json: This is not a JSON report of bnprobe: it is nested too deeply."),
        (b'{"schema_version": %s}' % (b"9" * 10**6), "after.json: This is not a JSON report of bnprobe: Exceeds"),
        (b"\xff\xfe", "after.json is not a JSON report of bnprobe: it is not text."),
    ],
)
def test_a_file_that_is_no_report(reports: Workspace, content: bytes, said: str) -> None:
    (reports.folder / "after.json").write_bytes(content)
    assert reports.run("verify", "bad.json", "after.json").error().startswith(said)
    reports.write("before.json", "{")
    assert "before.json" in reports.run("verify", "before.json", "good.json").error()


def test_a_pipe_that_nothing_writes_to(reports: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnprobe.paths.WAIT", 0.05)
    os.mkfifo(reports.folder / "pipe.json")
    message = reports.run("verify", "bad.json", "pipe.json").error()
    assert message == "pipe.json is a pipe that nothing writes to: it is no report."
    os.mkfifo(reports.folder / "pipe.py")
    assert reports.run("lint", "pipe.py").error() == "pipe.py is a pipe or a device. Name a Python file."


def test_a_file_that_is_not_there(reports: Workspace) -> None:
    assert (
        reports.run("verify", "bda.json", "good.json").error()
        == "The report bda.json does not exist. Did you mean bad.json?"
    )
    assert reports.run("verify", "good.json", ".").error() == "The report . could not be read: Is a directory."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(reports: Workspace) -> None:
    (reports.folder / "good.json").chmod(0)
    assert "could not be read: Permission denied" in reports.run("verify", "bad.json", "good.json").error()


def test_a_bad_output_is_known_first(workspace: Workspace) -> None:
    found = workspace.run("verify", "none.json", "none.json", "--output", str(Path("no") / "found.json"))
    assert found.error() == "The folder no of --output does not exist; create it first."
