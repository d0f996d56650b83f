"""``bnprobe sweep`` as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from functional.command import CLEAN, ERROR, FINDINGS, MODEL, REPOSITORY, SHIFTED, Result, Workspace

DIGITS = REPOSITORY / "sample_configs" / "digits"
SIGNS = ("✗", "✓", "?")


@pytest.fixture
def model(workspace: Workspace) -> Workspace:
    workspace.write("model.py", MODEL)
    return workspace


def _sweep(workspace: Workspace, *arguments: str | Path) -> Result:
    return workspace.run("sweep", "model.py", "--batch-size", "4", *arguments)


def _strict(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    return found


def test_the_demo_finds_the_smallest_batch_size(workspace: Workspace) -> None:
    found = workspace.run("sweep", DIGITS / "batch2.yaml", "--train-sizes", "8", "--momentum", "--shift", "1")
    assert (found.code, found.stderr) == (FINDINGS, "")
    lines = found.stdout.splitlines()
    assert max(map(len, lines[3:])) <= 80
    assert any(line.startswith("✗ ") and line.endswith(" layers flagged at batch size 2.") for line in lines)
    assert "  At inference every layer passes from batch size 4 on, significantly (95%) from" in lines
    assert any(line.startswith("Training, one measurement for each size") for line in lines)
    assert any(line.startswith("Running average replayed on 256 micro-batches of 2") for line in lines)


@pytest.mark.parametrize(("text", "code"), [(MODEL, CLEAN), (SHIFTED, FINDINGS)], ids=["clean", "flagged"])
def test_the_exit_code_is_that_of_the_scanned_batch_size(workspace: Workspace, text: str, code: int) -> None:
    workspace.write("model.py", text)
    found = _sweep(workspace, "--batch-sizes", "2,8")
    assert found.code == code
    assert _sweep(workspace, "--batch-sizes", "2,8", "--exit-zero").code == CLEAN


def test_json(model: Workspace) -> None:
    found = _sweep(
        model, "--batch-sizes", "2,8", "--train-sizes", "2", "--momentum", "0.1,cumulative", "--format", "json"
    )
    report = _strict(found.stdout)
    assert (found.code, found.stderr, report["schema_version"]) == (CLEAN, "", 1)
    (layer,) = report["layers"]
    assert [point["batch_size"] for point in layer["eval"]] == [2, 4, 8]
    assert [point["batch_size"] for point in layer["train"]] == [2, 4]
    assert layer["smallest"] == report["smallest"] == {"surely": 2, "likely": 2}
    assert [point["rate"] for point in report["momentum"]["model"]["points"]] == [0.1, None]
    assert report["momentum"]["batches"] == 16
    assert report["momentum"]["shift"] is None


def test_a_file_is_written_whole_and_told_of(model: Workspace) -> None:
    found = _sweep(model, "--format", "json", "--output", "sweep.json")
    assert (found.code, found.stderr) == (CLEAN, "Report written to sweep.json.\n")
    assert "0 of 1 layer flagged at batch size 4." in found.stdout
    assert _strict((model.folder / "sweep.json").read_text(encoding="utf-8"))["layers"]
    failed = _sweep(model, "--batch-sizes", "40", "--output", "sweep.json", "--force")
    assert "more than half of the 64 samples" in failed.error(ERROR)
    assert _strict((model.folder / "sweep.json").read_text(encoding="utf-8"))["layers"]


@pytest.mark.parametrize(
    "arguments",
    [("--momentum",), ("--momentum", "--shift", "-1.5"), ("--momentum", "--scale", "0.5"), ("--momentum", "1e-1")],
    ids=" ".join,
)
def test_momentum_stands_with_and_without_rates(model: Workspace, arguments: tuple[str, ...]) -> None:
    found = _sweep(model, "--batch-sizes", "2", *arguments)
    assert found.code == CLEAN
    assert "every layer passes at inference is 2, the\n  smallest measured" in found.stdout
    assert "Starting from the loaded statistics, " in found.stdout
    assert ("When the data changes" in found.stdout) == (len(arguments) == 3)
    rates = re.findall(r"^ {7}(0\.\d+) ", found.stdout, re.MULTILINE)
    assert rates == ([] if arguments[-1] == "1e-1" else ["0.3", "0.03", "0.01", "0.003", "0.001"])
    assert _first_word_after(found.stdout, "own") == "0.1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-sizes", "2,x"), "--batch-sizes"),
        (("--batch-sizes", "33"), "--batch-sizes 33 is more than half of the 64 samples"),
        (("--train-sizes", "8;16"), "--train-sizes 8;16 is not a list of batch sizes"),
        (("--train-sizes", "33"), "--train-sizes 33 is more than half of the 64 samples"),
        (("--momentum", "0.1,fast"), "--momentum 0.1,fast is not a list of momentum values"),
        (("--momentum", "0.99,2"), "TensorFlow's 0.99 is 0.01 here"),
        (("--shift", "1"), "give --momentum too"),
        (("--momentum", "--scale", "0"), "--scale 0 is out of range"),
        (("--momentum", "--batches", "8"), "needs at least 16 micro-batches"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_cannot_work(model: Workspace, arguments: tuple[str, ...], message: str) -> None:
    assert message in _sweep(model, *arguments).error(ERROR)


def _first_word_after(text: str, word: str) -> str:
    words = next(line.split() for line in text.splitlines() if line.split()[:1] == [word])
    return words[1]
