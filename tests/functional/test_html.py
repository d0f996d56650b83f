"""``--format html``: a page from every command that has one, in a file or a pipe, and never on a terminal."""

from __future__ import annotations

import pytest
import torch

import bnprobe
from benchmarks.networks import settled
from bnprobe.report import render
from functional.command import CLEAN, FINDINGS, MODEL, SHIFTED, Workspace
from functional.pseudoterminal import run_in_terminal
from support.pages import Page, said

TRAINABLE = SHIFTED + (
    """
import torch.nn.functional as F


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), torch.zeros(len(batch[0]), dtype=torch.long))


def load_eval_data(batch_size):
    return load_data(batch_size)
"""
)
SCAN = ("scan", "model.py", "--batch-size", "8", "--format", "html")
LEAVES_A_TRACE = "import pathlib\n\npathlib.Path('loaded').touch()\n"


def page(workspace: Workspace, name: str) -> Page:
    """The page in a file."""
    return Page((workspace.folder / name).read_text(encoding="ascii"))


def test_a_scan_writes_a_page_with_the_command_that_made_it(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    found = workspace.scan("--format", "html", "--output", "report.html")
    assert found.code == FINDINGS
    shown = page(workspace, "report.html")
    assert "1 of 1 layer" in said(shown.all("h1")[0])
    assert "--format html --output report.html" in said(shown.by_id("how"))


def test_a_sweep_a_repair_and_a_verification_write_pages(workspace: Workspace) -> None:
    workspace.write("model.py", TRAINABLE)
    workspace.run("sweep", "model.py", "--batch-size", "8", "--format", "html", "--output", "sweep.html")
    assert "flagged at batch size 8" in said(page(workspace, "sweep.html").all("h1")[0])
    repaired = workspace.run(
        *("convert", "model.py", "--batch-size", "8", "--finetune", "--steps", "6", "-o", "w.safetensors"),
        *("--format", "html"),
    )
    shown = Page(repaired.stdout)
    assert {"arms", "training", "layers", "use"} <= set(shown.sections)
    steps = [row["x"] for row in shown.data["curves-1/rows"] if row["name"] == "batch-renorm"]
    assert steps == [1, 2, 3, 4, 5, 6]
    workspace.run("verify", "w.before.json", "w.after.json", "--format", "html", "--output", "verify.html")
    assert page(workspace, "verify.html").table("D is the larger")[0]["Layer"].endswith("bn")


def test_a_page_in_a_pipe_of_another_encoding_is_the_same(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    found = workspace.run_installed(*SCAN, PYTHONIOENCODING="latin-1", LC_ALL="C")
    assert found.code == CLEAN
    assert found.stdout.isascii()
    assert "\N{CHECK MARK}" in Page(found.stdout).words


@pytest.mark.parametrize(
    "command",
    [
        ["scan", "model.py"],
        ["sweep", "model.py"],
        ["verify", "a.json", "b.json"],
        ["convert", "model.py", "-o", "w.safetensors"],
        ["recalibrate", "model.py", "-o", "w.safetensors"],
    ],
    ids=lambda value: value[0],
)
def test_a_terminal_is_refused_before_anything_is_loaded(workspace: Workspace, command: list[str]) -> None:
    workspace.write("model.py", MODEL + LEAVES_A_TRACE)
    found = run_in_terminal(workspace, *command, "--format", "html", stream="stdout")
    assert (found.code, found.stdout) == (2, "")
    assert found.stderr == (
        "bnprobe: error: --format html makes a file for a browser, and stdout is a terminal: give --output-dir DIR.\n"
    )
    assert not (workspace.folder / "loaded").exists()


def test_a_page_in_a_file_is_written_from_a_terminal(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    assert run_in_terminal(workspace, *SCAN, "--output", "report.html", stream="stdout").code == CLEAN
    assert page(workspace, "report.html").sections


def test_the_page_of_a_resnet_50_takes_less_than_two_megabytes() -> None:
    model = settled("resnet50", 32, torch.device("cpu"))
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    report = bnprobe.scan(model, images.split(4), batch_size=4, batch_sizes=(2, 4, 8))
    text = render(report, "html")
    assert len(report.layers) == 53
    assert len(text.encode()) < 2_000_000
    assert len(Page(text).table("53 layers")) == 53
