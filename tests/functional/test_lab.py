"""``bnprobe lab`` as users run it, and its gallery."""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from pathlib import Path

import pytest

from bnprobe.lab.experiments import EXPERIMENTS
from bnprobe.lab.run import concluded
from functional.command import CLEAN, ERROR, NOTHING, TIMEOUT, Result, Workspace
from functional.processes import start

DOCS = Path(__file__).parents[2] / "docs"


RUN = ("lab", "scratch", "--budget", "0.01", "--seeds", "2", "--jobs", "1")


def test_without_a_name_all_experiments_are_listed(workspace: Workspace) -> None:
    listed = workspace.run("lab")
    assert listed.code == CLEAN
    for row in EXPERIMENTS:
        assert f"{row.name}: {row.title}" in " ".join(listed.stdout.split())


def test_a_run_writes_results_and_goes_on(workspace: Workspace) -> None:
    first = workspace.run(*RUN)
    assert first.code == CLEAN
    folder = workspace.folder / "bnprobe-lab" / "scratch"
    names = ["RESULTS.md", "index.html", "results.json", "scratch.svg", "trials.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == names
    kept = (folder / "results.json").read_text()
    again = workspace.run(*RUN)  # no trial runs: they would take other times
    assert again.stdout == first.stdout
    assert (folder / "results.json").read_text() == kept
    shown = workspace.run("show", folder / "results.json")
    assert shown.stdout == first.stdout


def test_after_ctrl_c_it_is_said_that_the_same_command_goes_on(workspace: Workspace) -> None:
    kept = workspace.folder / "bnprobe-lab" / "small-batch" / "trials.jsonl"
    running = start(workspace, "lab", "small-batch", "--seeds", "9", "--jobs", "1")
    try:
        end = time.monotonic() + TIMEOUT
        while not kept.exists() or len(kept.read_text().splitlines()) < 2:
            assert time.monotonic() < end, "no trial was kept"
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=TIMEOUT)
    finally:
        running.kill()
    said = Result(running.returncode, stdout, stderr).error(NOTHING)
    assert said == "Interrupted. What was measured is kept in bnprobe-lab/small-batch: the same command goes on."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("smal-batch",), "did you mean small-batch?"),
        (("small-batch", "--budget", "0"), "budget must be a number above 0"),
        (("small-batch", "--data", "nowhere"), "--data nowhere is no folder"),
        (("small-batch", "--output-dir", "file/x"), "cannot be a folder"),
    ],
)
def test_errors_come_before_any_trial(workspace: Workspace, arguments: tuple[str, ...], said: str) -> None:
    workspace.write("file", "")
    found = workspace.run("lab", *arguments)
    assert said in found.error(ERROR)
    assert not (workspace.folder / "bnprobe-lab").exists()


def test_the_gallery_is_what_the_results_say() -> None:
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    gallery = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = gallery
    spec.loader.exec_module(gallery)
    assert gallery.names() == list(EXPERIMENTS.names())
    for name in gallery.names():
        report = gallery.found(name)
        if not EXPERIMENTS[name].alone:  # its claims name the machine
            assert concluded(report) == report, f"python docs/gallery.py {name} makes its claims anew"
    for path, text in gallery.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"python docs/gallery.py rewrites {path}"
        for picture in path.parent.glob("*.svg"):
            assert "<script" not in picture.read_text(encoding="utf-8")
