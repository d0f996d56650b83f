"""Help and version: quick, and the same in the README, like the report that stands there.

``BNPROBE_UPDATE_GOLDEN=1 pytest tests/functional/test_help.py`` writes both into the README again.
"""

from __future__ import annotations

import os
import re
import sys

import pytest

import bnprobe
from functional.command import CLEAN, ERROR, FINDINGS, REPOSITORY, Workspace

README = REPOSITORY / "README.md"
HEAVY = {"torch", "numpy", "scipy", "safetensors", "yaml"}  # pydantic is imported by typer itself
IMPORTS = """
import sys

from bnprobe.cli.app import main

try:
    main()
except SystemExit as end:
    print("imported", *sys.modules, file=sys.stderr)
    sys.exit(end.code)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["scan", "--help"], ["init", "-h"]], ids=" ".join)
def test_help_imports_nothing_slow(workspace: Workspace, arguments: list[str]) -> None:
    found = workspace.call(sys.executable, "-c", IMPORTS, *arguments)
    imported = found.stderr.split()
    assert found.code == CLEAN
    assert "bnprobe.cli.scan" in imported
    assert HEAVY.isdisjoint(imported)


def test_version(workspace: Workspace) -> None:
    found = workspace.run("--version")
    assert (found.code, found.stdout, found.stderr) == (CLEAN, f"bnprobe {bnprobe.__version__}\n", "")


def test_no_command_shows_the_help(workspace: Workspace) -> None:
    found = workspace.run()
    assert found.code == ERROR
    assert "Usage: bnprobe [OPTIONS] COMMAND" in found.stdout + found.stderr


def test_the_readme_shows_the_usage_as_it_is(workspace: Workspace) -> None:
    printed = workspace.run("scan", "--help", COLUMNS="80").stdout
    usage = "\n".join(line.rstrip() for line in printed.splitlines()).strip("\n") + "\n"
    assert in_readme("scan --help", usage) == usage


def test_the_readme_shows_a_real_report() -> None:
    command = "scan sample_configs/digits/sorted.yaml"
    found = Workspace(REPOSITORY).run(*command.split(), COLUMNS="80", PYTHONIOENCODING="utf-8")
    assert found.code == FINDINGS
    shown = in_readme(f"bnprobe {command}", found.stdout)
    # Times differ from run to run, and last digits from processor to processor: the words and rows must not.
    assert without_figures(shown) == without_figures(found.stdout)


def in_readme(marker: str, current: str) -> str:
    """The fenced block right after the marker; rewritten with ``current`` where that is asked for."""
    block = re.compile(rf"(?P<open><!-- {re.escape(marker)} -->\n```(?:text)?\n)(?P<text>.*?)(?=```)", re.DOTALL)
    readme = README.read_text(encoding="utf-8")
    assert len(block.findall(readme)) == 1, f"README.md needs one fenced block right after <!-- {marker} -->"
    if os.environ.get("BNPROBE_UPDATE_GOLDEN") == "1":
        readme = block.sub(lambda match: match["open"] + current, readme)
        README.write_text(readme, encoding="utf-8")
    return next(block.finditer(readme))["text"]


def without_figures(report: str) -> list[str]:
    """The words of each line but the header's."""
    lines = [line for line in report.splitlines() if not line.startswith(("device", "measured", " " * 11))]
    return [" ".join(re.findall(r"[a-z][a-z_]+", line)) for line in lines]
