"""Ctrl-C: what was measured is reported, marked partial."""

from __future__ import annotations

import array
import fcntl
import json
import signal
import termios
import time
from pathlib import Path
from typing import IO

import pytest

from functional.command import CLEAN, FINDINGS, MODEL, NOTHING, SHIFTED, TIMEOUT, Result, Workspace
from functional.processes import start

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
    stalling = ("--batches", "100", "--physical-batch", "4")
    scan = start(workspace, "scan", "model.py", "--batch-size", "2", *stalling, *options)
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
    assert "40 micro-batches × 2 = 80 samples" in found.stdout
    assert "Interrupted after 40 micro-batches: what was to follow is missing." in found.stdout
    assert "To measure to the end:\n    bnprobe scan model.py" in found.stdout


def test_what_was_measured_of_the_first_of_several_checkpoints_is_printed(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED + STALLS_LATE)
    workspace.write("save.py", "import torch\nfrom model import Net\ntorch.save(Net().state_dict(), 'a.pt')\n")
    assert workspace.run_script("save.py").code == CLEAN
    (workspace.folder / "b.pt").symlink_to("a.pt")
    found = _interrupted(workspace, "--checkpoint", "a.pt", "--checkpoint", "b.pt", "--format", "json")
    report = json.loads(found.stdout)
    assert (found.code, report["scan"]["checkpoint"], report["scan"]["partial"]) == (FINDINGS, "a.pt", True)


def test_what_was_measured_is_written(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL + STALLS_LATE)
    found = _interrupted(workspace, "--format", "json", "--output", "report.json", "--verbose")
    assert found.code == CLEAN
    assert "PARTIAL, interrupted: 0 of 1 layer flagged" in found.stdout
    assert found.stderr == "Report written to report.json.\n"
    scan = json.loads((workspace.folder / "report.json").read_text())["scan"]
    assert (scan["partial"], scan["stopped"], scan["batches"]) == (True, "interrupted", 40)


@pytest.mark.parametrize("stalls", [STALLS_AT_ONCE, STALLS_IN_MODEL], ids=["in-the-loader", "in-load_model"])
def test_before_anything_was_measured_there_is_no_report(workspace: Workspace, stalls: str) -> None:
    workspace.write("model.py", MODEL + stalls)
    message = _interrupted(workspace, "--exit-zero").error(NOTHING)
    assert message == "Interrupted before anything was measured; there is no report."


def test_while_the_report_is_written_nothing_is_said_of_the_measurement(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    scan = workspace.start_installed("scan", "model.py", "--batch-size", "2", "--batches", "4", "--format", "json")
    try:
        fcntl.fcntl(scan.stdout, fcntl.F_SETPIPE_SZ, 4096)  # less than the report: writing it waits for a reader
        _wait_for_output(scan.stdout)
        scan.send_signal(signal.SIGINT)
        stdout, stderr = scan.communicate(timeout=TIMEOUT)
    finally:
        scan.kill()
    assert stdout.startswith("{")
    assert (scan.returncode, stderr) == (NOTHING, "bnprobe: error: Interrupted.\n")


def _wait_for_output(stream: IO[str]) -> None:
    waiting, end = array.array("i", [0]), time.monotonic() + TIMEOUT
    while waiting[0] == 0:
        fcntl.ioctl(stream, termios.FIONREAD, waiting)
        assert time.monotonic() < end, "the report was not written"
        time.sleep(0.05)
