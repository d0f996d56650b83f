"""Files are written whole or not at all, whatever stops the writing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from bnprobe.errors import OutputError
from bnprobe.files import write_whole


def test_a_new_file_gets_the_usual_rights(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    before = os.umask(0o027)
    try:
        write_whole(path, "✓ text\n")
    finally:
        os.umask(before)
    assert path.read_text(encoding="utf-8") == "✓ text\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\udcff")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"could not be written: Is a directory\.$"):
        write_whole(tmp_path, "text")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    link.symlink_to(target)
    write_whole(link, "text")
    assert link.is_symlink()
    assert target.read_text() == "text"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
