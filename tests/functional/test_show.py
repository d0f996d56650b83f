"""``bnprobe show``: every document that a command writes is shown again, and what is no document is explained."""

from __future__ import annotations

import json

import pytest

from functional.command import CLEAN, FINDINGS, SHIFTED, Workspace


@pytest.fixture
def scanned(workspace: Workspace) -> Workspace:
    """A folder with scan.json, and what the scan printed in scan.txt."""
    workspace.write("model.py", SHIFTED)
    found = workspace.scan("--format", "json", "--format", "terminal", "--output-dir", ".")
    assert found.code == FINDINGS
    return workspace


def test_a_scan_is_shown_as_it_was_printed_without_the_model(scanned: Workspace) -> None:
    (scanned.folder / "model.py").unlink()
    found = scanned.run("show", "scan.json")
    written = (scanned.folder / "scan.txt").read_text(encoding="utf-8")
    assert (found.code, found.stdout, found.stderr) == (CLEAN, written, "")


def test_json_of_json_is_the_same(scanned: Workspace) -> None:
    found = scanned.run("show", "scan.json", "--format", "json")
    assert found.stdout == (scanned.folder / "scan.json").read_text(encoding="utf-8")


def test_files_are_named_after_the_report_and_it_is_not_replaced(scanned: Workspace) -> None:
    found = scanned.run("show", "scan.json", "--format", "json", "--format", "terminal", "--output-dir", "out")
    assert (found.code, found.stderr) == (CLEAN, "Report written to out/scan.json, out/scan.txt.\n")
    message = scanned.run("show", "scan.json", "--format", "json", "--output-dir", ".", "--force").error()
    assert message == "--output-dir scan.json is a file that this command reads; give another name."


def test_a_record_is_shown_with_its_scans(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    printed = workspace.run("recalibrate", "model.py", "--batch-size", "4", "-o", "new.safetensors")
    assert printed.code == CLEAN
    assert workspace.run("show", "new.record.json").stdout == printed.stdout
    (workspace.folder / "new.record.json").rename(workspace.folder / "record.json")
    alone = workspace.run("show", "record.json")
    assert (alone.code, alone.stderr) == (CLEAN, "")
    assert "Mismatch before and after" in printed.stdout
    assert "Mismatch before and after" not in alone.stdout


def test_the_command_of_a_scan_from_python_is_one_that_would_make_it(scanned: Workspace) -> None:
    report = json.loads((scanned.folder / "scan.json").read_text())
    assert report["scan"]["command"].startswith("bnprobe scan model.py --batch-size 2 --format json")
    report["scan"]["command"] = None
    scanned.write("python.json", json.dumps(report))
    assert "bnprobe scan model.py:load_model --batch-size 2 " in scanned.run("show", "python.json").stdout


def test_what_is_incomplete_newer_or_no_report(scanned: Workspace) -> None:
    whole = (scanned.folder / "scan.json").read_text(encoding="utf-8")
    report = json.loads(whole)
    cases = {
        whole[:2000]: "The JSON report is incomplete: it ends in line",
        whole[: whole.index('"schema_version"') + 5]: "The JSON report is incomplete: it ends in line 2",
        "": "This is not a JSON report of bnprobe",
        "[]": "This is not a JSON report of bnprobe: the top level is not an object.",
        whole.replace('"name": "bnprobe"', "name", 1): "This is not a JSON report of bnprobe: Expecting property name",
        '{"schema_version": 1, "name": "x"}': "This is not a JSON report of bnprobe: its keys are those of no document",
        json.dumps({**report, "schema_version": 2}): "The JSON report has schema_version 2, and this bnprobe reads"
        " schema_version 1. Update bnprobe, or use the version that wrote it.",
        json.dumps({**report, "more": 1, "tool": {"name": "bnprobe", "version": "9.9"}}): "The JSON report does not fit"
        " its schema: more is unknown. It was written by bnprobe 9.9, and this is",
        json.dumps({**report, "scan": 3}): "The JSON report does not fit its schema: scan: ",
    }
    for text, said in cases.items():
        scanned.write("other.json", text)
        assert scanned.run("show", "other.json").error().startswith(f"other.json: {said}"), text[:80]
    assert scanned.run("show", "scna.json").error() == "The report scna.json does not exist. Did you mean scan.json?"
