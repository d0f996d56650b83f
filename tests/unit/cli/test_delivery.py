"""Where reports go: what a terminal does not show is refused there, before anything is measured."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from bnprobe.cli.delivery import Delivery
from bnprobe.cli.streams import own_stdout
from bnprobe.errors import UsageError
from bnprobe.records import Report
from bnprobe.report import FORMATS, Format

PICTURE = Format("picture", {Report: lambda report, options: "picture\n"}, suffix=".svg", opens="a browser")


class Terminal(io.StringIO):
    """A stdout that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_what_a_terminal_does_not_show_is_refused_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Terminal())
    with FORMATS.including(PICTURE), own_stdout():
        with pytest.raises(UsageError, match="--format picture makes a file for a browser, and stdout is a terminal"):
            Delivery("scan", Report, ["picture"]).check()
        Delivery("scan", Report, ["picture"], folder=tmp_path).check()
        Delivery("scan", Report, ["terminal"]).check()
