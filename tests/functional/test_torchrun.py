"""A scan on several processes gives the report of one, fails as one, and ends with one exit code."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.command import (
    CLEAN,
    ERROR,
    FINDINGS,
    MODEL,
    NOTHING,
    REPOSITORY,
    SHIFTED,
    TIMEOUT,
    Result,
    Workspace,
)
from functional.processes import Launch, launch
from support.processes import free_port

DIGITS = REPOSITORY / "sample_configs" / "digits"

HOW_IT_RAN = ("command", "seconds", "physical_batch", "notes", "threads")
"""Fields that tell how a scan ran, not what it found."""

TINY = 1e-15
"""Smaller differences are rounding of what cancels to nothing, or in the tails of a distribution."""

SINGLE = (1e-5, 1e-8)
"""Relative and absolute bounds in float32: physical batches of other sizes round differently, and nine layers multiply
that; 3e-7 is usual, and a mean of d, of values near 1, may cancel to 1e-6.
"""

DOUBLE = MODEL.replace("nn.Linear(2, 3)", "nn.Linear(2, 3).double()").replace(
    "nn.BatchNorm2d(2)", "nn.BatchNorm2d(2).double()"
)
DOUBLE = DOUBLE.replace("+ SHIFT\n", "+ SHIFT + torch.arange(IMAGES).view(-1, 1, 1, 1) / IMAGES\n").replace(
    "TensorDataset(images())", "TensorDataset(images().double())"
)
"""All in float64, on images that are brighter and brighter; evaluation data too."""
DOUBLE += """

def load_eval_data(batch_size):
    return DataLoader(TensorDataset(images().double() + 1), batch_size=batch_size)


def loss(model, batch):
    return model(batch[0]).square().mean()
"""


def differences(one: Any, other: Any, bound: float, floor: float = TINY, path: str = "") -> Iterator[str]:
    """Where two reports differ: in anything but floats, or in floats by more than ``bound`` and ``floor``."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if key not in HOW_IT_RAN:
                yield from differences(one.get(key), other.get(key), bound, floor, f"{path}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, bound, floor, f"{path}[{index}]")
    elif isinstance(one, float) and isinstance(other, float):
        if abs(one - other) > max(bound * max(abs(one), abs(other)), floor):
            yield f"{path}: {one} and {other}"
    elif one != other:
        yield f"{path}: {one} and {other}"


def assert_same(one: dict[str, Any], several: dict[str, Any]) -> None:
    """Of a model in float64: what is summed agrees to its rounding; shares come from images kept in float32 too."""
    assert list(differences(one, several, 1e-8)) == []
    paths = ("train", "eval", "batch_sizes")
    for layer, other in zip(one["layers"], several["layers"], strict=True):
        assert [each for path in paths for each in differences(layer[path], other[path], 1e-12, path=path)] == []
    assert list(differences(one["summary"]["output"], several["summary"]["output"], 1e-12)) == []


def read(file: Path) -> dict[str, Any]:
    """A report, without the verdict on what only several processes can differ in."""
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    report["verdicts"] = [verdict for verdict in report["verdicts"] if verdict["rule"] != "BN302"]
    return report


def together(workspace: Workspace, size: int, *arguments: str | Path, code: int = FINDINGS) -> dict[str, Any]:
    """The report of several processes, which end alike: only the first one speaks."""
    file = workspace.folder / f"of-{size}.json"
    first, *others = launch(workspace, size, *arguments, "--format", "json", "--output", file).results()
    assert (first.code, first.stderr) == (code, f"Report written to {file}.\n")
    assert others == [Result(code, "", "")] * (size - 1)
    assert f"{size} processes each measured" in " ".join(json.loads(file.read_text(encoding="utf-8"))["scan"]["notes"])
    return read(file)


def alone(workspace: Workspace, *arguments: str | Path, code: int = FINDINGS) -> dict[str, Any]:
    """The report of one process."""
    file = workspace.folder / "of-1.json"
    assert workspace.run(*arguments, "--format", "json", "--output", file).code == code
    return read(file)


def said(results: list[Result], code: int = ERROR) -> str:
    """The message of processes that all failed, which one of them has printed."""
    assert [result.code for result in results] == [code] * len(results)
    (spoken,) = [result for result in results if result.stderr]
    return spoken.error(code)


def test_sums_of_shares_are_those_of_one_process(workspace: Workspace) -> None:
    """In float64, with shares of 4, 4 and 3 micro-batches, and 3 images left out."""
    workspace.write("model.py", DOUBLE.replace("IMAGES = 64", "IMAGES = 47"))
    arguments = ("scan", "model.py", "--batch-size", "4", "--batch-sizes", "2,8", "--threshold", "2000")
    one, several = alone(workspace, *arguments), together(workspace, 3, *arguments)
    assert one["scan"]["batches"] == 11
    assert (one["scan"]["stopped"], one["scan"]["left_out"]) == ("data_exhausted", 3)
    assert_same(one, several)


def test_a_sample(workspace: Workspace) -> None:
    arguments = ("scan", DIGITS / "sorted.yaml", "--batches", "24", "--batch-sizes", "4,12")
    one, several = alone(workspace, *arguments), together(workspace, 2, *arguments)
    assert one["scan"]["batches"] == 24
    assert list(differences(one, several, *SINGLE)) == []


def test_looks_are_taken_together(workspace: Workspace) -> None:
    """Without --batches several processes stop where one does."""
    workspace.write("model.py", DOUBLE.replace("IMAGES = 64", "IMAGES = 512"))
    arguments = ("scan", "model.py", "--batch-size", "2", "--threshold", "8")
    one, several = alone(workspace, *arguments), together(workspace, 2, *arguments)
    assert one["scan"]["stopped"] == "decided"
    assert_same(one, several)


def test_looks_tell_batches_that_are_not_iid_as_one_process_does(workspace: Workspace) -> None:
    """The limit that decides depends on it, and half of the batches say less than all."""
    arguments = ("scan", DIGITS / "sorted.yaml")
    one, several = alone(workspace, *arguments), together(workspace, 2, *arguments)
    assert (one["scan"]["stopped"], one["scan"]["batches"]) == ("decided", 32)
    for report in (one, several):  # rounding by itself, in float32, of the first physical batches of each process
        check = report["scan"]["self_check"]
        assert max(check.pop("output_error"), check.pop("statistic_error")) <= check["tolerance"]
    assert list(differences(one, several, *SINGLE)) == []


def test_torchrun_itself(workspace: Workspace) -> None:
    """Fewer micro-batches than processes: the third measures nothing."""
    workspace.write("model.py", MODEL)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "3",
        "--master_port",
        str(free_port()),
    ]
    scan = ["-m", "bnprobe", "scan", "model.py", "--batch-size", "32", "--format", "json"]
    result = workspace.call(*torchrun, *scan)
    assert result.code == CLEAN
    report = json.loads(result.stdout)
    assert (report["scan"]["batches"], report["scan"]["images"]) == (2, 64)


DIVERGED = """
import os

def load_model():
    net = Net()
    net.bn.running_mean += float(os.environ.get("RANK", "0"))
    net.bn.num_batches_tracked += 5
    net.head.weight.data += float(os.environ.get("RANK", "0"))
    return net
"""


def test_processes_that_disagree_are_a_finding(workspace: Workspace) -> None:
    """And what is measured is process 0's model: two processes give the report of one."""
    workspace.write("model.py", MODEL + DIVERGED)
    arguments = ("scan", "model.py", "--batch-size", "16", "--batches", "4")
    one = alone(workspace, *arguments, code=CLEAN)
    several = together(workspace, 2, *arguments)
    assert list(differences(one["layers"], several["layers"], *SINGLE)) == []
    report = json.loads((workspace.folder / "of-2.json").read_text(encoding="utf-8"))
    (verdict,) = [verdict for verdict in report["verdicts"] if verdict["rule"] == "BN302"]
    assert (verdict["outcome"], verdict["layer"]) == ("failed", "bn")
    assert verdict["value"] == pytest.approx(1 / (1 + 1e-5))  # means 1 apart, variance 1
    assert "rank_divergence" in [diagnosis["cause"] for diagnosis in report["diagnoses"]]
    assert "measured the model of process 0" in " ".join(report["scan"]["notes"])


def test_dropout_draws_other_numbers_but_the_eval_path_is_the_same(workspace: Workspace) -> None:
    dropout = DOUBLE.replace("self.bn(x)", "self.bn(nn.functional.dropout(x, 0.5, self.training))")
    workspace.write("model.py", dropout)
    arguments = ("scan", "model.py", "--batch-size", "4", "--batches", "16")
    one, several = alone(workspace, *arguments), together(workspace, 2, *arguments)
    (layer,), (other,) = one["layers"], several["layers"]
    assert list(differences(layer["eval"], other["eval"], 1e-12)) == []
    assert layer["train"]["mismatch"] != other["train"]["mismatch"]
    assert layer["train"]["mismatch"] == pytest.approx(other["train"]["mismatch"], rel=0.2)


FAILS_LOADING = """
import os, time

def load_model():
    if os.environ["RANK"] == "1":
        raise OSError("no such mount")
    time.sleep(600)
"""

FAILS_LATE = """
import os, time

def forward(model, batch):
    forward.calls = getattr(forward, "calls", 0) + 1
    if os.environ["RANK"] == "1" and forward.calls == 30:
        raise ValueError("the second GPU is on fire")
    time.sleep(0.01)
    return model(batch[0])
"""


@pytest.mark.parametrize(("late", "message"), [(False, "no such mount"), (True, "the second GPU is on fire")])
def test_one_that_fails_ends_all(workspace: Workspace, late: bool, message: str) -> None:
    """In the middle of a scan what was measured is reported all the same."""
    workspace.write(
        "model.py", SHIFTED.replace("IMAGES = 64", "IMAGES = 20000") + (FAILS_LATE if late else FAILS_LOADING)
    )
    file = workspace.folder / "report.json"
    scan = ("scan", "model.py", "--batch-size", "2", "--batches", "10000", "--no-emulate", "--format", "json")
    results = launch(workspace, 2, *scan, "--output", file).results()
    assert [result.code for result in results] == [ERROR, ERROR]
    spoken = "".join(result.stderr for result in results)
    assert spoken.count("bnprobe: error: ") == 1
    assert message in spoken
    assert "model.py" in spoken  # the user's own frames
    assert file.exists() == late
    if late:
        scan_ = json.loads(file.read_text(encoding="utf-8"))["scan"]
        assert (scan_["partial"], scan_["stopped"]) == (True, "failed")


def test_one_that_is_killed_ends_all(workspace: Workspace) -> None:
    kills = FAILS_LATE.replace("raise ValueError", "os.kill(os.getpid(), 9); raise ValueError")
    workspace.write("model.py", MODEL + kills)
    scan = ("scan", "model.py", "--batch-size", "2", "--batches", "32", "--no-emulate")
    first, second = launch(workspace, 2, *scan).results()
    assert second.code == -signal.SIGKILL
    assert "Another process of the launch has ended" in first.error(ERROR)


def test_an_output_that_fails_ends_all(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    results = launch(workspace, 2, "scan", "model.py", "--batch-size", "2", "--output", "/dev/full").results()
    assert "/dev/full could not be written" in said(results)


def test_other_commands_are_refused_and_it_is_said_once(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    assert "bnprobe lint runs in one process only" in said(launch(workspace, 2, "lint", "model.py").results())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_all_have_measured(workspace: Workspace, number: int) -> None:
    """Sent to one of them only."""
    slow = FAILS_LATE.replace("forward.calls == 30", "forward.calls == -1").replace(
        "    time", "    print('x', file=open('begun', 'a'))\n    time"
    )
    workspace.write("model.py", MODEL.replace("IMAGES = 64", "IMAGES = 20000") + slow)
    file = workspace.folder / "report.json"
    scan = ("scan", "model.py", "--batch-size", "2", "--batches", "10000", "--no-emulate", "--format", "json")
    running = launch(workspace, 2, *scan, "--output", file)
    begun, deadline = workspace.folder / "begun", time.monotonic() + 60
    while (not begun.exists() or begun.stat().st_size < 200) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.processes[1].send_signal(number)
    assert {result.code for result in running.results()} == {CLEAN}
    report = json.loads(file.read_text(encoding="utf-8"))["scan"]
    assert (report["partial"], report["stopped"]) == (True, "interrupted")
    assert report["batches"] > 0


def test_an_interrupt_before_anything_was_measured(workspace: Workspace) -> None:
    begun = "import os, time\n    open(f'begun-{os.getpid()}', 'w').close()\n    time.sleep(600)\n"
    workspace.write("model.py", f"{MODEL}\ndef load_model():\n    {begun}")
    running = launch(workspace, 2, "scan", "model.py", "--batch-size", "2")
    deadline = time.monotonic() + 60
    while (
        len(list(workspace.folder.glob("begun-*"))) < 2 and time.monotonic() < deadline
    ):  # both are in the user's code
        time.sleep(0.05)
    running.processes[0].send_signal(signal.SIGINT)
    assert "Interrupted before anything was measured" in said(running.results(), NOTHING)


HANGS = """
import os, time

def forward(model, batch):
    forward.calls = getattr(forward, "calls", 0) + 1
    if os.environ["RANK"] == HANGING and forward.calls == 8:
        time.sleep(600)
    time.sleep(0.05)  # the other one has not finished when this one is missed
    return model(batch[0])
"""


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Launch]]:
    """Launches in which the process of this rank hangs; their time runs out together."""
    scan = ("scan", "model.py", "--batch-size", "2", "--batches", "1000", "--no-emulate")
    launches = {}
    for rank in ("0", "1"):
        workspace = Workspace(tmp_path_factory.mktemp("hanging"))
        hangs = HANGS.replace("HANGING", repr(rank))
        workspace.write("model.py", SHIFTED.replace("IMAGES = 64", "IMAGES = 2000") + hangs)
        launches[rank] = launch(workspace, 2, *scan, BNPROBE_TIMEOUT="8")
    yield launches
    for each in launches.values():
        for process in each.processes:
            process.kill()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_that_hangs_ends_all(hanging: dict[str, Launch], rank: str) -> None:
    message = said(hanging[rank].results())
    assert message.startswith(f"Process {rank} has given no sign of life for 8 seconds")
    assert "set BNPROBE_TIMEOUT to more seconds (default 1800)" in message


def test_a_timeout_that_is_none(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    results = launch(workspace, 2, "scan", "model.py", BNPROBE_TIMEOUT="soon").results()
    assert {result.code for result in results} == {ERROR}
    assert "BNPROBE_TIMEOUT is 'soon', but must be a number of seconds above 0." in results[0].stderr


SPEAKS_SLOWLY = """
import os, time

class Slow(Exception):
    def __str__(self):
        time.sleep(1.0)
        return "the second GPU is on fire"

def load_model():
    if os.environ["RANK"] == "1":
        raise Slow
    time.sleep(600)
"""


def test_what_failed_is_said_though_the_launcher_ends_all(workspace: Workspace) -> None:
    """A launcher sends SIGTERM to the others as soon as one has ended, also to the one that has the reason to tell."""
    workspace.write("model.py", MODEL + SPEAKS_SLOWLY)
    running = launch(workspace, 2, "scan", "model.py", "--batch-size", "2")
    deadline = time.monotonic() + TIMEOUT
    while running.processes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if running.processes[1].poll() is None:
        running.processes[1].send_signal(signal.SIGTERM)
    assert "Slow while calling model.py:load_model(): the second GPU is on fire" in said(running.results())


SHARDED = """
import os

def load_data(batch_size):
    kept = IMAGES - 16 * int(os.environ.get("RANK", "0"))
    return DataLoader(TensorDataset(images()[:kept]), batch_size=batch_size)
"""


def test_processes_that_have_other_data_are_refused(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL + SHARDED)
    message = said(launch(workspace, 2, "scan", "model.py", "--batch-size", "2").results())
    assert message.startswith("The processes do not have the same data: process 0 has 64 samples in batches of 2")
    assert "process 1 has 48 samples in batches of 2" in message


OTHER = """
import os

def load_data(batch_size):
    return DataLoader(TensorDataset(images() + float(os.environ.get("RANK", "0"))), batch_size=batch_size)
"""


def test_other_samples_in_another_process_are_noted(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL + OTHER)
    report = together(workspace, 2, "scan", "model.py", "--batch-size", "4", "--batches", "8")
    (note,) = [note for note in report["scan"]["notes"] if "first micro-batch" in note]
    assert note.startswith("The first micro-batch of process 1 is not that of process 0")
