"""Two runs that would write the same files: one waits for nobody, the other is told who is there."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path

import pytest

from bnprobe.files import require_new
from functional.command import CLEAN, Workspace
from functional.processes import start
from functional.test_convert import REPAIRABLE, STALLING, wait_for

FINETUNE = ("convert", "model.py", "--batch-size", "4", "--finetune", "--steps", "20", "-o", "cut.safetensors")
RECALIBRATE = ("recalibrate", "model.py", "--batch-size", "4", "-o", "cut.safetensors")


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_second_run_is_refused_while_the_first_works(workspace: Workspace) -> None:
    workspace.write("model.py", REPAIRABLE + STALLING)
    state, stall = workspace.folder / "cut.state", workspace.write("stall", "")
    process = start(workspace, *FINETUNE)
    wait_for(lambda: any(state.glob("batch-renorm*")) or process.poll() is not None)
    here = f"on {socket.gethostname()}, since "
    for more in ((*FINETUNE,), (*FINETUNE, "--force"), (*FINETUNE, "--resume"), (*RECALIBRATE, "--force")):
        message = workspace.run(*more).error()
        assert message.startswith("Another run writes to cut.safetensors: process ")
        assert here in message
        assert message.endswith("Wait for its end, or give another -o.")
    stall.unlink()
    process.communicate()
    assert process.returncode == CLEAN
    assert hidden(workspace.folder) == []


def test_a_run_that_was_killed_is_in_nobodys_way(workspace: Workspace) -> None:
    workspace.write("model.py", REPAIRABLE + STALLING)
    state, stall = workspace.folder / "cut.state", workspace.write("stall", "")
    process = start(workspace, *FINETUNE)
    wait_for(lambda: any(state.glob("batch-renorm*")) or process.poll() is not None)
    process.kill()
    left = workspace.write(".cut.safetensors.0123abcd.new", "half")
    stall.unlink()
    assert workspace.run(*FINETUNE, "--resume").code == CLEAN
    assert not left.exists()
    assert hidden(workspace.folder) == []


def test_what_was_begun_only_is_begun_again(workspace: Workspace) -> None:
    """A run that was killed before it wrote its fingerprint, and one before it had removed its folder."""
    workspace.write("model.py", REPAIRABLE)
    mark = "This folder was made by bnprobe, which removes only the files that it wrote here. Files of your own stay.\n"
    for name in ("cut.state", ".cut.state.0123abcd.new", ".cut.state.0123abce.old"):
        workspace.write(f"{name}/made-by-bnprobe.txt", mark)
    workspace.write(".cut.state.0123abce.old/log.csv", "arm\n")
    assert workspace.run(*FINETUNE).code == CLEAN
    assert hidden(workspace.folder) == []
    assert not (workspace.folder / "cut.state").exists()


def test_what_appears_at_the_last_moment_stays(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last look and the writing: nothing is replaced that was not there to be seen."""
    workspace.write("model.py", REPAIRABLE)

    def looks_too_early(paths: Iterable[Path], force: bool, option: str) -> None:
        require_new(paths, force, option)
        workspace.write("cut.record.json", "mine")

    monkeypatch.setattr("bnprobe.files.require_new", looks_too_early)
    message = workspace.run(*RECALIBRATE).error()
    assert "cut.record.json has appeared since this run began, and no file was changed" in message
    assert (workspace.folder / "cut.record.json").read_text() == "mine"
    assert not (workspace.folder / "cut.safetensors").exists()
