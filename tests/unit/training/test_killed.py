"""A run that is killed at any moment leaves what can be gone on with, or cleaned up, by the next one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bnprobe.errors import OutputError, UsageError
from bnprobe.files import only_run, write_all, write_whole
from bnprobe.records import Run, Score
from bnprobe.training import StateFolder

MARKS = {"model": "model.py", "processes": 1}
RUN = Run(1, 5, 5, Score(0.1, None), "finished", "", 0.1, None, None)
STEPS = ("mkdir", "rename", "replace", "hardlink_to", "unlink", "rmdir", "open", "write_text")


def killed_before(step: int, work: Callable[[], object]) -> bool:
    """Do some work in a process that dies before its n-th step in the file system; whether it came so far."""
    child = os.fork()
    if child == 0:
        left = step

        def counting(original: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return original(*arguments, **options)

            return counted

        for name in STEPS:
            setattr(Path, name, counting(getattr(Path, name)))
        os.rmdir, os.unlink = counting(os.rmdir), counting(os.unlink)  # those of shutil.rmtree
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


def every_death(work: Callable[[Path], object], folder: Path) -> list[Path]:
    """Folders in which the work was cut off before its first, its second, ... step."""
    found: list[Path] = []
    while True:
        place = folder / str(len(found))
        place.mkdir()
        if not killed_before(len(found) + 1, lambda place=place: work(place)):
            return found
        found.append(place)


def left_in(folder: Path) -> list[str]:
    """What is there after the next run has begun and ended."""
    with only_run(folder / "out.safetensors", [folder / "out.state"]):
        pass
    return sorted(path.name for path in folder.iterdir())


def test_between_the_folder_and_its_fingerprint(tmp_path: Path) -> None:
    deaths = every_death(lambda place: StateFolder.open(place / "out.state", MARKS, resume=False), tmp_path)
    assert len(deaths) > 4
    for place in deaths:
        state = place / "out.state"
        begun = (state / "fingerprint.json").exists()
        if begun:
            with pytest.raises(UsageError, match="--resume"):
                StateFolder.open(state, MARKS, resume=False)
        StateFolder.open(state, MARKS, resume=state.is_dir()).remove()
        assert left_in(place) == []


def whole_state(place: Path) -> StateFolder:
    """A state with a run that is finished, one in progress, and what TensorBoard was told."""
    state = StateFolder.open(place / "out.state", MARKS, resume=False)
    state.finish("a", 1, RUN, {"w": torch.zeros(2)})
    state.running("b", 1).write_bytes(b"x")
    state.log.write_text("arm\n")
    state._events.make()
    events = state._events.path / "a-seed-1" / "events.out.tfevents.1.bnprobe"
    events.parent.mkdir()
    events.write_bytes(b"x")
    return state


@pytest.mark.parametrize("mine", [False, True], ids=["all-ours", "with-a-file-of-the-user"])
def test_before_the_last_file_of_a_state_is_gone(tmp_path: Path, mine: bool) -> None:
    def work(place: Path) -> None:
        StateFolder(place / "out.state").remove()

    made: list[Path] = []
    while True:
        place = tmp_path / str(len(made))
        place.mkdir()
        whole_state(place)
        if mine:
            (place / "out.state" / "notes.txt").write_text("mine")
        if not killed_before(len(made) + 1, lambda place=place: work(place)):
            break
        made.append(place)
    assert len(made) > 2
    for place in made:
        assert not mine or (place / "out.state" / "notes.txt").read_text() == "mine"
        if not mine:
            assert left_in(place) in ([], ["out.state"])
            if (place / "out.state").exists():  # whole, as before
                assert StateFolder.open(place / "out.state", MARKS, resume=True).finished("a", 1) is not None
    assert [path.name for path in place.iterdir()] == (["out.state"] if mine else [])


def test_temporary_files_of_a_killed_run_are_removed_by_the_next(tmp_path: Path) -> None:
    def work(place: Path) -> None:
        write_all({place / "out.safetensors": b"new"})

    for place in every_death(work, tmp_path):
        with only_run(place / "out.safetensors"):
            names = {path.name for path in place.iterdir()} - {".out.safetensors.lock"}
            assert names in (set(), {"out.safetensors"})


def test_so_are_those_of_a_report(tmp_path: Path) -> None:
    for place in every_death(lambda place: write_whole(place / "report.json", "new"), tmp_path):
        write_whole(place / "report.json", "newer")
        assert [path.name for path in place.iterdir()] == ["report.json"]


def test_what_is_being_written_is_not_taken_for_left(tmp_path: Path) -> None:
    """Two processes write one report at once: neither removes the other's temporary file."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        replace = Path.replace

        def slow(self: Path, target: Path) -> Path:
            os.write(writing, b"x")
            os.read(paused, 1)
            return replace(self, target)

        Path.replace = slow  # type: ignore[method-assign]
        try:
            write_whole(tmp_path / "report.json", "of the child")
        except OutputError:
            os._exit(1)
        os._exit(0)
    os.read(reading, 1)
    write_whole(tmp_path / "report.json", "of the parent")
    assert len(list(tmp_path.iterdir())) == 2
    os.write(going_on, b"x")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "report.json").read_text() == "of the child"


paused, going_on = os.pipe()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with only_run(tmp_path / "out.safetensors"):
            os.write(writing, b"x")
            os.read(paused, 1)
            os.kill(os.getpid(), 9)
    os.read(reading, 1)
    other = rf"Another run writes to .*out.safetensors: process {child} on \S+, since .*give another -o"
    with pytest.raises(OutputError, match=other), only_run(tmp_path / "out.safetensors"):
        pass
    with only_run(tmp_path / "other.safetensors"):  # is another output
        pass
    os.write(going_on, b"x")
    os.waitpid(child, 0)
    with only_run(tmp_path / "out.safetensors"):  # of a dead process nothing is left to wait for
        pass
    assert list(tmp_path.iterdir()) == []
