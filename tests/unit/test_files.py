"""Files are written whole or not at all, whatever stops the writing."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bnprobe.errors import OutputError
from bnprobe.files import (
    OwnFolder,
    has_mark,
    make_folder,
    require_folder,
    require_new,
    require_writable,
    write_all,
    write_whole,
)
from bnprobe.paths import read_bounded


def test_a_new_file_gets_the_usual_rights(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    before = os.umask(0o027)
    try:
        write_whole(path, "✓ text\n")
    finally:
        os.umask(before)
    assert path.read_text(encoding="utf-8") == "✓ text\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_text_that_cannot_be_encoded_is_escaped(tmp_path: Path) -> None:
    """As a path with bytes that are no text; JSON reads the escape as the same character."""
    path = tmp_path / "report.json"
    write_whole(path, '{"checkpoint": "\udcff.pt"}')
    assert path.read_text() == '{"checkpoint": "\\udcff.pt"}'
    assert json.loads(path.read_text()) == {"checkpoint": "\udcff.pt"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"could not be written: Is a directory\.$"):
        write_whole(tmp_path, "text")


def test_a_folder_for_files_is_checked_before_and_made_after(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    require_folder(folder)
    assert not folder.exists()
    make_folder(folder)
    make_folder(folder)
    require_folder(folder)
    (folder / "file").write_text("")
    for below in (folder / "file", folder / "file" / "c"):
        with pytest.raises(OutputError, match=r"--output-dir .* cannot be a folder: .*file is a file\.$"):
            require_folder(below)
        with pytest.raises(OutputError, match=r"--output-dir .* could not be made: "):
            make_folder(below)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_made_is_refused_before(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(OutputError, match=r"locked of --output-dir is not writable\.$"):
        require_folder(tmp_path / "locked" / "new")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    link.symlink_to(target)
    write_whole(link, "text")
    assert link.is_symlink()
    assert target.read_text() == "text"


@pytest.mark.parametrize("together", [False, True])
def test_a_file_that_is_replaced_keeps_its_rights(tmp_path: Path, together: bool) -> None:
    path = tmp_path / "report.txt"
    path.write_text("old")
    path.chmod(0o604)
    if together:
        write_all({path: "text", tmp_path / "other": "text"}, force=True)
    else:
        write_whole(path, "text")
    assert path.read_text() == "text"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(OutputError, match=r"--output .*a cannot be written: Too many levels of symbolic links"):
        require_writable(tmp_path / "a")


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bounded(tmp_path / "a", 5, OutputError) == b"12345"
    with pytest.raises(OutputError, match="is larger than 4e-06 MB"):
        read_bounded(tmp_path / "a", 4, OutputError)
    with pytest.raises(OutputError, match="is larger than 1 MB"):
        read_bounded(Path("/dev/zero"), 10**6, OutputError)


def test_what_is_no_text_is_not_read_to_its_end() -> None:
    """The limit would not fit into memory."""
    with pytest.raises(UnicodeDecodeError):
        read_bounded(Path("/dev/urandom"), 10**15, OutputError)


def test_a_text_is_read_whole_wherever_its_characters_lie(tmp_path: Path) -> None:
    for start in ("", "a"):
        (tmp_path / "a").write_text(start + "é" * 40_000, encoding="utf-8")
        assert read_bounded(tmp_path / "a", 10**6, OutputError).decode() == start + "é" * 40_000


def test_a_pipe_is_read_if_something_writes_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr("bnprobe.paths.WAIT", 0.05)
    with pytest.raises(OutputError, match="is a pipe that nothing writes to"):
        read_bounded(pipe, 100, OutputError)
    monkeypatch.setattr("bnprobe.paths.WAIT", 60)
    with subprocess.Popen(["sh", "-c", 'exec > "$0"; sleep 0.3; echo one; sleep 0.1; echo two', pipe]):
        assert read_bounded(pipe, 100, OutputError) == b"one\ntwo\n"


def test_a_pipe_that_nothing_reads_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnprobe.paths.WAIT", 0.05)
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda: write_whole(tmp_path / "pipe", "text"), lambda: write_all({tmp_path / "pipe": "text"})):
        with pytest.raises(OutputError, match="could not be written: Nothing reads this pipe"):
            write()


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_several_files_are_written_together(tmp_path: Path) -> None:
    write_all({tmp_path / "a": b"one", tmp_path / "b": "two"})
    assert contents(tmp_path) == {"a": "one", "b": "two"}
    write_all({tmp_path / "b": "new", tmp_path / "c": "three"}, force=True)
    assert contents(tmp_path) == {"a": "one", "b": "new", "c": "three"}


def test_existing_files_are_refused_by_name(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    paths[0].write_text("old")
    with pytest.raises(OutputError, match=r"^\S*a already exists; give another -o, or --force to overwrite\.$"):
        require_new(paths, force=False)
    paths[2].write_text("old")
    with pytest.raises(OutputError, match=r"^\S*a, \S*c already exist"):
        write_all(dict.fromkeys(paths, "new"))
    assert contents(tmp_path) == {"a": "old", "c": "old"}
    require_new(paths, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_missing_folder_is_refused_before(tmp_path: Path, force: bool) -> None:
    with pytest.raises(OutputError, match=r"The folder \S*no of -o does not exist; create it first\."):
        require_new([tmp_path / "a", tmp_path / "no" / "b"], force)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_refused_before(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot be written to"):
            require_new([tmp_path / "a"], force=False)
    finally:
        tmp_path.chmod(0o755)


LIMITED = """
import resource, signal, sys
from pathlib import Path
from bnprobe.files import write_all

sys.dont_write_bytecode = True  # Python would keep the beginning of a module, and fail at it ever after
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
write_all({folder / "a": "small", folder / "b": "x" * 5000, folder / "c": "small"}, force=True)
"""


def test_a_disk_that_is_full_leaves_every_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "could not be written: File too large. No file was changed." in done.stderr
    assert contents(tmp_path) == {"a": "old"}


def test_a_device_that_is_full_leaves_every_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OutputError, match="No space left on device"):
        write_all({tmp_path / "a": "new", Path("/dev/full"): "new"}, force=True)
    assert contents(tmp_path) == {"a": "old"}


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt()])
def test_what_fails_between_renames_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (tmp_path / "a").write_text("old")
    rename = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if target.name == "c" and self.suffix == ".new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_all({tmp_path / name: "new" for name in "abc"}, force=True)
    assert contents(tmp_path) == {"a": "old"}


def own_folder(path: Path) -> OwnFolder:
    """A folder in which bnprobe wrote three files, and somebody else another three."""
    folder = OwnFolder(path, r"a\.txt|run-\d/.*\.own")
    folder.make()
    for name in ("a.txt", "run-1/x.own", "run-2/y.own", "b.txt", "run-1/mine", "other/z.own"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(name)
    return folder


def names(folder: Path) -> set[str]:
    """All files of a folder but its mark, and the empty folders in it."""
    found = [path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())]
    return {path.relative_to(folder).as_posix() for path in found} - {"made-by-bnprobe.txt"}


def test_only_what_was_written_is_removed_from_an_own_folder(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "own")
    folder.clear()
    assert names(folder.path) == {"b.txt", "run-1/mine", "other/z.own"}
    assert has_mark(folder.path)
    folder.remove()
    assert names(folder.path) == {"b.txt", "run-1/mine", "other/z.own"}
    assert not has_mark(folder.path)


def test_an_own_folder_with_nothing_else_in_it_is_removed(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "own")
    for name in ("b.txt", "run-1/mine", "other/z.own"):
        (folder.path / name).unlink()
    (folder.path / "other").rmdir()
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_the_mark_is_left_alone(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "own")
    (folder.path / "made-by-bnprobe.txt").write_text("mine too\n")
    before = names(folder.path)
    for action in (folder.make, folder.clear, folder.remove, lambda: folder.move_to(folder)):
        with pytest.raises(OutputError, match=r"own was not made by bnprobe: move it, or give another -o\.$"):
            action()
    assert names(folder.path) == before


def test_only_what_was_written_moves_to_another_own_folder(tmp_path: Path) -> None:
    source, target = own_folder(tmp_path / "source"), own_folder(tmp_path / "target")
    (source.path / "run-2" / "y.own").rename(source.path / "run-2" / "new.own")
    source.move_to(target)
    assert names(source.path) == {"b.txt", "run-1/mine", "other/z.own"}
    assert names(target.path) == {"a.txt", "run-1/x.own", "run-2/new.own", "b.txt", "run-1/mine", "other/z.own"}
    assert has_mark(target.path)
    assert not has_mark(source.path)


def test_a_link_to_files_of_others_leads_nowhere(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "own")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "x.own").write_text("mine")
    (folder.path / "run-3").symlink_to(mine)
    folder.remove()
    assert (mine / "x.own").read_text() == "mine"
    assert (folder.path / "run-3").is_symlink()


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_name_that_is_taken_is_no_own_folder(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "own")
    with pytest.raises(OutputError, match="not made by bnprobe"):
        OwnFolder(tmp_path / "own", "a").make()
