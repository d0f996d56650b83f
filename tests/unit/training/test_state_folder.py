"""The folder of a repair in progress: begun, resumed, refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bnprobe.files
from bnprobe.errors import OutputError, StateError, UsageError
from bnprobe.records import Run, Score
from bnprobe.training import StateFolder, StepLog
from support.finetuning import network, same_bits

MARKS = {"model": "model.py", "weights": "ab12", "train": {"steps": 10, "optimizer": "SGD"}, "processes": 1}
RUN = Run(1, 500, 450, Score(0.1, None), "diverged", "Diverged in step 3.", 1 / 3, 0.25, None)


def begun(path: Path) -> StateFolder:
    return StateFolder.open(path, MARKS, resume=False)


def test_runs_come_back_as_they_were(tmp_path: Path) -> None:
    folder = begun(tmp_path / "state")
    weights = network().to(memory_format=torch.preserve_format).state_dict()
    weights["conv"] = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert folder.finished("BN fine-tuned", 1) is None
    folder.finish("BN fine-tuned", 1, RUN, weights)
    again = StateFolder.open(tmp_path / "state", MARKS, resume=True).finished("BN fine-tuned", 1)
    assert again is not None
    assert again[0] == RUN
    assert same_bits(dict(sorted(again[1].items())), dict(sorted(weights.items())))
    assert folder.finished("BN fine-tuned", 2) is None
    assert folder.finished("BN, fine-tuned", 1) is None


def test_a_finished_run_needs_no_state(tmp_path: Path) -> None:
    folder = begun(tmp_path / "state")
    folder.running("group-norm", 0).write_bytes(b"state")
    folder.running("group-norm", 1).write_bytes(b"state")
    folder.finish("group-norm", 0, RUN, {})
    assert not folder.running("group-norm", 0).exists()
    assert folder.running("group-norm", 1).exists()


def test_remove(tmp_path: Path) -> None:
    folder = begun(tmp_path / "state")
    folder.log.write_text("log")
    folder.remove()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="was not made by bnprobe"):
        folder.remove()


@pytest.mark.parametrize("inside", [".", "log"])
def test_files_of_others_survive_the_end(tmp_path: Path, inside: str) -> None:
    folder = begun(tmp_path / "state")
    folder.finish("BN", 0, RUN, network().state_dict())
    StepLog(folder.log, tensorboard=True).close()
    mine = [folder.path / inside / name for name in ("notes.txt", "best.safetensors", "log.csv.bak")]
    for path in mine:
        path.write_text("mine")
    folder.remove()
    assert sorted(path for path in folder.path.rglob("*") if path.is_file()) == sorted(mine)
    with pytest.raises(OutputError, match=r"state was not made by bnprobe"):  # it is the user's now
        StateFolder.open(folder.path, MARKS, resume=False, force=True)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = begun(tmp_path / "state")
    running = folder.running("BN", 0)
    running.with_name(f".{running.name}.0123abcd.new").write_bytes(b"half")
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_dropped_by_force(tmp_path: Path) -> None:
    folder = begun(tmp_path / "state")
    folder.finish("BN", 0, RUN, network().state_dict())
    (folder.path / "notes.txt").write_text("mine")
    other = {**MARKS, "processes": 2}
    again = StateFolder.open(folder.path, other, resume=False, force=True)
    assert again.finished("BN", 0) is None
    assert (folder.path / "notes.txt").read_text() == "mine"
    StateFolder.open(folder.path, other, resume=True)


@pytest.mark.parametrize("options", [{"resume": False}, {"resume": False, "force": True}, {"resume": True}])
def test_a_folder_of_others_is_no_state(tmp_path: Path, options: dict[str, bool]) -> None:
    mine = tmp_path / "state"
    mine.mkdir()
    for name in ("fingerprint.json", "log.csv"):
        (mine / name).write_text(json.dumps(MARKS))
    with pytest.raises(OutputError, match=r"state was not made by bnprobe: move it, or give another -o"):
        StateFolder.open(mine, MARKS, **options)
    with pytest.raises(OutputError, match="not made by bnprobe"):
        StateFolder(mine).remove()
    assert sorted(path.name for path in mine.iterdir()) == ["fingerprint.json", "log.csv"]


def test_a_folder_that_is_there_already(tmp_path: Path) -> None:
    begun(tmp_path / "state")
    with pytest.raises(UsageError, match=r"Continue it with --resume, or .* start over with --force"):
        begun(tmp_path / "state")


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--resume: there is no saved state at .*Start without --resume"):
        StateFolder.open(tmp_path / "state", MARKS, resume=True)


def test_the_state_of_another_repair(tmp_path: Path) -> None:
    begun(tmp_path / "state")
    other = {**MARKS, "weights": "cd34", "train": {"steps": 20, "optimizer": "SGD"}, "device": "cpu"}
    with pytest.raises(StateError) as caught:
        StateFolder.open(tmp_path / "state", other, resume=True)
    assert (
        'weights was "ab12" and is now "cd34"; train.steps was 10 and is now 20; device was null and is now "cpu".'
    ) in str(caught.value)


def test_tuples_are_lists_in_json(tmp_path: Path) -> None:
    StateFolder.open(tmp_path / "state", {"layers": ("a", "b")}, resume=False)
    StateFolder.open(tmp_path / "state", {"layers": ("a", "b")}, resume=True)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "3"])
def test_a_damaged_fingerprint(tmp_path: Path, content: str) -> None:
    begun(tmp_path / "state")
    (tmp_path / "state" / "fingerprint.json").write_text(content)
    with pytest.raises(StateError, match=r"fingerprint\.json is damaged .*--force"):
        StateFolder.open(tmp_path / "state", MARKS, resume=True)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:50], lambda data: b"", lambda data: data.replace(b"seed", b"sead")]
)
def test_a_damaged_run(tmp_path: Path, damage: Any) -> None:
    folder = begun(tmp_path / "state")
    folder.finish("BN", 0, RUN, network().state_dict())
    (path,) = folder.path.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StateError, match=r"is damaged .*--force"):
        folder.finished("BN", 0)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = begun(tmp_path / "state")
    monkeypatch.setattr(bnprobe.files.os, "fsync", full)
    folder.running("BN", 0).write_bytes(b"state")
    with pytest.raises(OutputError, match="No space left on device"):
        folder.finish("BN", 0, RUN, network().state_dict())
    assert folder.finished("BN", 0) is None
    assert folder.running("BN", 0).exists()
    assert sorted(path.suffix for path in folder.path.iterdir()) == [".json", ".running", ".txt"]
    with pytest.raises(OutputError, match="No space left on device"):
        begun(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_parent_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="could not be written: No such file"):
        begun(tmp_path / "missing" / "state")


def test_the_fingerprint_can_be_read(tmp_path: Path) -> None:
    begun(tmp_path / "state")
    assert json.loads((tmp_path / "state" / "fingerprint.json").read_text()) == MARKS
