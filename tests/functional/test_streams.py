"""stdout holds the report and nothing else, whatever the user's code writes; and streams that cannot be written to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from functional.command import CLEAN, COMMAND, ERROR, MODEL, Result, Workspace

CHATTY = (
    """
import atexit, ctypes, os, sys

print("at import")
sys.__stdout__.write("to the stream\\n")
os.write(1, b"to the descriptor\\n")
C = ctypes.CDLL(None)
C.printf(b"outside Python\\n")  # buffered until the process ends
atexit.register(print, "at exit")
sys.argv = ["other"]
"""
    + MODEL
    + """
class Net(Net):
    def forward(self, x):
        print("forward")
        os.write(1, b"forward\\n")
        return super().forward(x)
"""
)
SAID = {"at import", "to the stream", "to the descriptor", "outside Python", "at exit", "forward"}


def _shell(workspace: Workspace, redirection: str, *arguments: str, **environment: str) -> Result:
    return workspace.call("bash", "-c", f'"$0" "$@" {redirection}', COMMAND, *arguments, **environment)


def test_what_user_code_writes_to_stdout_goes_to_stderr(workspace: Workspace) -> None:
    workspace.write("model.py", CHATTY)
    found = workspace.run_installed("scan", "model.py", "--batch-size", "2", "--format", "json")
    assert found.code == CLEAN
    assert json.loads(found.stdout)["tool"]["name"] == "bnprobe"
    assert set(found.stderr.splitlines()) == SAID


def test_a_file_that_user_code_left_open_is_written_at_the_end(workspace: Workspace) -> None:
    workspace.write("model.py", 'log = open("log.txt", "w")\nlog.write("begun")\n' + MODEL)
    assert workspace.run_installed("scan", "model.py", "--batch-size", "2").code == CLEAN
    assert (workspace.folder / "log.txt").read_text() == "begun"


def test_user_code_that_replaces_or_closes_the_streams(workspace: Workspace) -> None:
    replaced = 'import sys, io, os\nsys.stdout = io.StringIO()\nsys.stderr.close()\nos.environ["COLUMNS"] = "x"\n'
    workspace.write("model.py", replaced + MODEL)
    found = workspace.run_installed("lint", "model.py", "--format", "json")
    assert (found.code, json.loads(found.stdout)["layers"]) == (CLEAN, 1)
    assert workspace.run_installed("lint", "model.py:no").error().startswith('model.py has no "no".')


def test_stdout_by_the_name_of_a_file(workspace: Workspace) -> None:
    workspace.write("model.py", CHATTY)
    found = _shell(workspace, "> all.txt", "lint", "model.py", "--format", "json", "--output", "/dev/stdout")
    assert (found.code, found.stdout) == (CLEAN, "")
    assert json.loads((workspace.folder / "all.txt").read_text())["layers"] == 1
    assert "Report written to /dev/stdout." in found.stderr


@pytest.mark.parametrize("argument", ["explain", "--help"])
@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        (">&-", "closed"),
        ("> /dev/full", "stdout could not be written to: No space left on device."),
        ("| true; exit ${PIPESTATUS[0]}", None),
        ("2>&- | cat > all.txt; exit ${PIPESTATUS[0]}", None),
        ("2> /dev/full > all.txt", None),
    ],
    ids=["closed", "full", "pipe", "no-stderr", "full-stderr"],
)
def test_a_stream_that_cannot_be_written_to(
    workspace: Workspace, redirection: str, said: str | None, argument: str
) -> None:
    found = _shell(workspace, redirection, argument)
    if said is None:
        assert (found.code, found.stderr) == (CLEAN, "")
    else:
        assert said in found.error()


def test_an_error_that_cannot_be_said_is_an_error(workspace: Workspace) -> None:
    for redirection in ("2> /dev/full", "2>&-"):
        assert _shell(workspace, redirection, "explain", "BN999") == Result(ERROR, "", "")


@pytest.mark.parametrize(
    ("format_", "environment"),
    [("terminal", {"PYTHONIOENCODING": "ascii"}), ("json", {"LC_ALL": "C", "PYTHONUTF8": "0"})],
    ids=["terminal", "json"],
)
def test_names_that_stdout_cannot_encode(workspace: Workspace, format_: str, environment: dict[str, str]) -> None:
    workspace.write("model.py", MODEL.replace("self.bn", "self.名"))
    environment = {"PYTHONCOERCECLOCALE": "0", **environment}
    found = workspace.run_installed("scan", "model.py", "--batch-size", "2", "--format", format_, **environment)
    assert (found.code, found.stderr) == (CLEAN, "")
    assert found.stdout.isascii()
    if format_ == "json":
        assert json.loads(found.stdout)["layers"][0]["name"] == "名"
    else:
        assert "\\u540d" in found.stdout


@pytest.mark.parametrize(
    "arguments", [("explain", "BN201"), ("--help",), ("lint", "model.py"), ("lint", "model.py", "--key")], ids=" ".join
)
def test_optimized_python_says_the_same(workspace: Workspace, arguments: tuple[str, ...]) -> None:
    """Without assertions (-O), and without docstrings too."""
    workspace.write("model.py", MODEL)
    optimized = workspace.call(sys.executable, "-OO", "-m", "bnprobe", *arguments)
    assert optimized == workspace.run(*arguments)


def test_a_working_directory_that_has_been_removed(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    (workspace.folder / "gone").mkdir()
    command = f'cd gone && rmdir ../gone && "$0" lint {Path(workspace.folder, "model.py")}'
    assert workspace.call("bash", "-c", command, COMMAND).code in (CLEAN, ERROR)
