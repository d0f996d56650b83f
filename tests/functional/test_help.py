"""Help and version: quick, and the same in the README, like all the output that stands there.

``BNPROBE_UPDATE_GOLDEN=1 pytest tests/functional/test_help.py`` writes both into the README again.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys

import pytest
import yaml

import bnprobe
from bnprobe.rules import RULES
from bnprobe.spec import RenormSpec, RepairSpec, Spec, TrainSpec
from functional import readme
from functional.command import CLEAN, ERROR, FINDINGS, REPOSITORY, Result, Workspace
from functional.readme import README, Block

SAMPLES = sorted((REPOSITORY / "sample_configs").glob("*/*.yaml"))
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


@pytest.mark.parametrize("command", ["scan", "convert"])
def test_the_readme_shows_the_usage_as_it_is(workspace: Workspace, command: str) -> None:
    printed = workspace.run(command, "--help", COLUMNS="80").stdout
    usage = "\n".join(line.rstrip() for line in printed.splitlines()).strip("\n") + "\n"
    assert in_readme(f"{command} --help", usage) == usage


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Who tries the commands of the README; what they write stays out of the repository."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(REPOSITORY / "sample_configs", folder / "sample_configs")
    return Reader(Workspace(folder))


@pytest.mark.parametrize("block", readme.blocks(), ids=lambda block: block.command)
def test_the_readme_shows_real_output(reader: Reader, block: Block) -> None:
    found = reader.run(block)
    assert found.code in (CLEAN, FINDINGS)
    shown = readme.update(block, found.stdout)
    if not block.partial:
        assert readme.words(shown.text) == readme.words(found.stdout)
    start = 0
    for part in shown.parts if block.partial else ():
        place = readme.place(part, found.stdout, start)
        assert place is not None, part
        start = place[1]


def test_the_specs_of_the_readme_are_right() -> None:
    shown = re.findall(r"^```yaml\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    specs = [Spec.model_validate({"model": {"target": "model.py"}} | yaml.safe_load(text)) for text in shown]
    assert [spec.repair.seeds for spec in specs] == [5, 5]
    settings = specs[0]  # every key of these sections is shown
    assert settings.train.model_fields_set == TrainSpec.model_fields.keys() - {"epochs"}
    assert settings.repair.model_fields_set == RepairSpec.model_fields.keys()
    assert settings.repair.renorm.model_fields_set == RenormSpec.model_fields.keys()


def test_the_readme_shows_what_the_benchmark_of_repairs_found() -> None:
    results = (REPOSITORY / "benchmarks" / "repairs" / "RESULTS.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (batch2|sorted)\.yaml(.*?)(?=^##)", results, re.DOTALL | re.MULTILINE))
    shown = re.findall(r"^\| `(batch2|sorted)`[^|]*\|(.*)\|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in shown] == ["batch2", "sorted"]
    for name, row in shown:
        arms = [[cell.strip() for cell in line.split("|")] for line in sections[name].splitlines() if "|" in line]
        column = arms[0].index("held-out accuracy")
        found = [f"{float(arm[column].split()[0]):.2f}" for arm in arms[2:]]
        assert [cell.strip() for cell in row.split("|")] == found


def test_every_sample_is_in_the_readme() -> None:
    text = " ".join(block.command for block in readme.blocks())
    assert {path.parent.name for path in SAMPLES if f"{path.parent.name}/{path.name}" in text} == {
        path.parent.name for path in SAMPLES
    }


def test_every_rule_is_in_the_readme() -> None:
    rows = [line.split(" | ") for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| [BN")]
    expected = [(rule.code, f"`{rule.cause}`") for rule in RULES]
    assert [(re.findall(r"BN\d+", row[0])[0], row[2]) for row in rows] == expected


class Reader:
    """Runs every command once, after those that write what it reads."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._seen: dict[str, Result] = {}

    def run(self, block: Block) -> Result:
        if block.command not in self._seen:
            for maker in readme.makers(block):
                self.run(maker)
            words = shlex.split(block.command)
            self._seen[block.command] = self._workspace.run(*words, COLUMNS="80", PYTHONIOENCODING="utf-8")
        return self._seen[block.command]


def in_readme(marker: str, current: str) -> str:
    """The fenced block right after the marker; rewritten with ``current`` where that is asked for."""
    block = re.compile(rf"(?P<open><!-- {re.escape(marker)} -->\n```(?:text)?\n)(?P<text>.*?)(?=```)", re.DOTALL)
    text = README.read_text(encoding="utf-8")
    assert len(block.findall(text)) == 1, f"README.md needs one fenced block right after <!-- {marker} -->"
    if os.environ.get("BNPROBE_UPDATE_GOLDEN") == "1":
        text = block.sub(lambda match: match["open"] + current, text)
        README.write_text(text, encoding="utf-8")
    return next(block.finditer(text))["text"]
