"""Help and version, and that they are quick."""

from __future__ import annotations

import sys

import pytest

import bnprobe
from functional.command import CLEAN, ERROR, MODEL, Workspace

HEAVY = {"torch", "numpy", "scipy", "safetensors", "yaml", "pydantic", "sysconfig"}
OTHER_REPORTS = {
    *(f"bnprobe.records.{name}" for name in ("comparison", "drift", "lab", "monitor", "sweep", "table")),
    *(f"bnprobe.report.{name}" for name in ("batch_effects", "compare", "csv", "drift", "export", "github", "html")),
    *(f"bnprobe.report.{name}" for name in ("json", "junit", "lab", "markdown", "plan", "repair", "sarif", "sweep")),
    *("bnprobe.report.verify", "bnprobe.report.watch"),
}
IMPORTS = """
import sys

before = set(sys.modules)

from bnprobe.cli.app import main

try:
    main()
except SystemExit as end:
    print("imported", *(sys.modules.keys() - before), file=sys.stderr)
    sys.exit(end.code)
"""

COLLECTIONS = """
import gc
import sys

from bnprobe.__main__ import main

def collections():
    return sum(each["collections"] for each in gc.get_stats())

before = collections()
try:
    main()
except SystemExit as end:
    print(collections() - before, gc.isenabled(), gc.get_freeze_count() > 0, file=sys.stderr)
    sys.exit(end.code)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["scan", "--help"], ["sweep", "--help"], ["init", "-h"]], ids=" ".join
)
def test_help_imports_nothing_slow(workspace: Workspace, arguments: list[str]) -> None:
    found = workspace.call(sys.executable, "-c", IMPORTS, *arguments)
    imported = found.stderr.split()
    assert found.code == CLEAN
    assert "bnprobe.cli.scan" in imported
    assert HEAVY.isdisjoint(imported)


@pytest.mark.parametrize("arguments", [["--help"], ["scan", "--help"], ["--version"]], ids=" ".join)
def test_help_looks_for_no_garbage(workspace: Workspace, arguments: list[str]) -> None:
    found = workspace.call(sys.executable, "-c", COLLECTIONS, *arguments)
    assert (found.code, found.stderr) == (CLEAN, "0 True True\n")


def test_a_lint_imports_little_beside_torch(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    found = workspace.call(sys.executable, "-c", IMPORTS, "lint", "model.py")
    imported = found.stderr.split()
    assert found.code == CLEAN
    assert "torch" in imported
    assert {"scipy", "sympy", "torch._dynamo"}.isdisjoint(imported)
    assert OTHER_REPORTS.isdisjoint(imported)


def test_a_scan_imports_no_other_reports(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    found = workspace.call(sys.executable, "-c", IMPORTS, "scan", "model.py", "--batch-size", "4", "--exit-zero")
    imported = found.stderr.split()
    assert found.code == CLEAN
    assert {"torch", "bnprobe.report.screen"} <= set(imported)
    assert (OTHER_REPORTS | {"bnprobe.report.lint"}).isdisjoint(imported)


@pytest.mark.parametrize("size", ["99999999999999", "x", "-5", "0", "1e9", ""])
def test_an_odd_size_of_the_terminal_is_as_none(workspace: Workspace, size: str) -> None:
    workspace.write("model.py", MODEL)
    for arguments in (("--help",), ("scan", "--no-such-option"), ("lint", "model.py")):
        usual, found = workspace.run(*arguments), workspace.run(*arguments, COLUMNS=size, LINES=size)
        assert found == usual


def test_an_odd_size_that_typer_reads(workspace: Workspace) -> None:
    found = workspace.run_installed("--help", TERMINAL_WIDTH="x")
    assert (found.code, found.stdout) == (CLEAN, workspace.run_installed("--help").stdout)


def test_version(workspace: Workspace) -> None:
    found = workspace.run("--version")
    assert (found.code, found.stdout, found.stderr) == (CLEAN, f"bnprobe {bnprobe.__version__}\n", "")


def test_no_command_shows_the_help(workspace: Workspace) -> None:
    found = workspace.run()
    assert found.code == ERROR
    assert "Usage: bnprobe [OPTIONS] COMMAND" in found.stdout + found.stderr
