"""Ctrl-C: what was measured is reported, marked partial."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from functional.command import CLEAN, FINDINGS, MODEL, NOTHING, SHIFTED, TIMEOUT, Result, Workspace

STALL = """
import pathlib
import time


def stall():
    pathlib.Path("stalled").touch()
    time.sleep(600)

"""
STALLS_LATE = f"""{STALL}
def load_data(batch_size):
    for number in range(40):
        yield images()[number : number + batch_size]
    stall()
"""
STALLS_AT_ONCE = f"{STALL}\ndef load_data(batch_size):\n    stall()\n    yield images()\n"
STALLS_IN_MODEL = f"{STALL}\ndef load_model():\n    stall()\n"


def _interrupted(workspace: Workspace, *options: str) -> Result:
    """Scan, wait until the user's code stalls, press Ctrl-C."""
    scan = workspace.start(
        "scan", "model.py", "--batch-size", "2", "--batches", "100", "--physical-batch", "4", *options
    )
    try:
        _wait_for(workspace.folder / "stalled")
        scan.send_signal(signal.SIGINT)
        stdout, stderr = scan.communicate(timeout=TIMEOUT)
    finally:
        scan.kill()
    return Result(scan.returncode, stdout, stderr)


def _wait_for(path: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while not path.exists():
        assert time.monotonic() < end, "the scan did not get that far"
        time.sleep(0.05)


@pytest.mark.parametrize(("model", "code"), [(MODEL, CLEAN), (SHIFTED, FINDINGS)], ids=["clean", "findings"])
def test_what_was_measured_is_printed(workspace: Workspace, model: str, code: int) -> None:
    workspace.write("model.py", model + STALLS_LATE)
    found = _interrupted(workspace)
    assert (found.code, found.stderr) == (code, "")
    assert found.stdout.startswith("bnprobe 0.1.0: scan of model.py:load_model (PARTIAL)\n")
    assert "40 micro-batches × 2 = 80 images" in found.stdout
    assert "Interrupted: only 40 micro-batches measured." in found.stdout
    assert "To measure to the end:\n    bnprobe scan model.py" in found.stdout


def test_what_was_measured_is_written(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL + STALLS_LATE)
    found = _interrupted(workspace, "--format", "json", "--output", "report.json")
    assert found.code == CLEAN
    assert found.stderr == "PARTIAL, interrupted: 0 of 1 layer flagged; report written to report.json\n"
    scan = json.loads((workspace.folder / "report.json").read_text())["scan"]
    assert (scan["partial"], scan["stopped"], scan["batches"]) == (True, "interrupted", 40)


@pytest.mark.parametrize("stalls", [STALLS_AT_ONCE, STALLS_IN_MODEL], ids=["in-the-loader", "in-load_model"])
def test_before_anything_was_measured_there_is_no_report(workspace: Workspace, stalls: str) -> None:
    workspace.write("model.py", MODEL + stalls)
    message = _interrupted(workspace, "--exit-zero").error(NOTHING)
    assert message == "Interrupted before anything was measured; there is no report."
