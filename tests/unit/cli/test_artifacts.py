"""The files beside repaired weights: which of an earlier run are removed, and that nothing of the user's is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bnprobe.analysis.comparison import make_arm
from bnprobe.cli.artifacts import Artifacts
from bnprobe.errors import OutputError
from bnprobe.records import Proof, Run, Score
from bnprobe.report.json import dump
from bnprobe.report.repair import Files
from bnprobe.training import StateFolder, StepLog
from support import repairs
from unit.report.fabricated_parts import report

REPORT = report([])
WEIGHTS = {"weight": torch.zeros(1)}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def write(output: Path, trains: bool = False, before: bool = False, after: bool = False) -> Files:
    """Write what a repair with these reports writes, with ``--force``."""
    artifacts = Artifacts(output, force=True, trains=trains)
    if trains:
        StateFolder.open(artifacts.state, {}, resume=False)
    return artifacts.write(repairs.record(), WEIGHTS, REPORT if before else None, REPORT if after else None)[1]


@pytest.mark.parametrize("missing", ["before", "after"])
@pytest.mark.parametrize("trains", [False, True])
def test_the_report_of_an_earlier_run_is_removed(output: Path, missing: str, trains: bool) -> None:
    write(output, before=True, after=True)
    write(output, trains, before=missing == "after", after=missing == "before")
    names = {path.name for path in output.parent.iterdir()}
    assert f"out.{missing}.json" not in names
    assert {"out.after.json" if missing == "before" else "out.before.json", "out.record.json"} <= names


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"",
        b"{}",
        b"[1, 2]",
        b'"bnprobe"',
        b"\xff\xfe",
        b'{"tool": "bnprobe"}',
        b'{"tool": null}',
        b'{"tool": {"name": "another"}}',
        b"[" * 100_000,
        dump(REPORT).encode()[:-20],
    ],
    ids=range(11),
)
@pytest.mark.parametrize("name", ["out.before.json", "out.after.json"])
@pytest.mark.parametrize("trains", [False, True])
def test_a_file_of_the_user_is_kept_and_named(
    output: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, trains: bool
) -> None:
    foreign = output.with_name(name)
    foreign.write_bytes(content)
    write(output, trains, before=name != "out.before.json", after=name != "out.after.json")
    assert foreign.read_bytes() == content
    assert f"{foreign} was kept because bnprobe did not write it.\n" in capsys.readouterr().err


@pytest.mark.parametrize("force", [False, True])
def test_weights_that_score_worse_than_as_loaded_are_written_only_by_force(
    output: Path, capsys: pytest.CaptureFixture[str], force: bool
) -> None:
    scores = [Run(0, 0, 0, Score(None, metric), "finished", "", 0.0) for metric in (0.9, 0.4)]
    arms = [make_arm(name, [run], trained=False) for name, run in zip(("as is", "frozen"), scores, strict=True)]
    proof = Proof("metric", tuple(arms), "frozen", "as is", None, "worse", "", 0, 60, surely_worse=True)
    record = repairs.record(proof=proof, weights=None)
    written, files = Artifacts(output, force).write(record, WEIGHTS, REPORT, REPORT)
    assert (output.exists(), written.weights is not None, files.record is not None) == (force, force, force)
    assert ("Nothing was written: the repaired model scores worse" in capsys.readouterr().err) is not force


def test_a_link_of_the_user_is_kept(output: Path) -> None:
    elsewhere, link = output.with_name("elsewhere.json"), output.with_name("out.before.json")
    elsewhere.write_text(dump(REPORT))
    link.symlink_to(elsewhere)
    write(output, after=True)
    assert link.is_symlink()
    assert elsewhere.exists()


def test_a_log_of_an_earlier_run_is_removed(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = output.with_name("out.log.csv")
    StepLog(log).close()
    assert write(output, trains=True).log is None
    assert not log.exists()
    assert "kept" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "time,loss\n0,1\n", "arm,seed\n"])
def test_a_table_of_the_user_is_kept_and_is_not_shown_as_the_log(
    output: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    log = output.with_name("out.log.csv")
    log.write_text(content)
    assert write(output, trains=True).log is None
    assert log.read_text() == content
    assert f"{log} was kept" in capsys.readouterr().err


def test_a_command_that_does_not_train_leaves_the_log_alone(output: Path) -> None:
    log = output.with_name("out.log.csv")
    StepLog(log).close()
    write(output)
    assert log.exists()


def test_a_folder_in_the_way_is_named_and_not_the_option(output: Path) -> None:
    folder = output.with_name("out.before.json")
    folder.mkdir()
    with pytest.raises(OutputError, match=r"out\.before\.json, which is written beside -o, is a folder: move it"):
        Artifacts(output, force=True).check()
