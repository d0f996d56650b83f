"""docs/extending.md, followed to the letter: its package is installed, its commands print what the page shows.

``BNPROBE_UPDATE_GOLDEN=1 pytest tests/functional/test_extending.py`` writes the output into the page again.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bnprobe.config.exporters import EXPORTERS
from bnprobe.config.frameworks import FRAMEWORKS
from bnprobe.config.targets import TARGETS
from bnprobe.lab import EXPERIMENTS
from bnprobe.measure.accumulators import STATISTICS
from bnprobe.measure.norms import NORMS
from bnprobe.registry import Registry
from bnprobe.report import DOCUMENTS, FORMATS
from bnprobe.rules import RULES
from bnprobe.rules.docs import manual
from bnprobe.rules.interface import SECTIONS
from functional.command import REPOSITORY, Workspace
from functional.documentation import Block, rewritten
from support.imports import as_in_a_new_process

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = REPOSITORY / "docs" / "extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
REGISTRIES: tuple[Registry[Any], ...] = (RULES, FORMATS, TARGETS, EXPORTERS, NORMS, STATISTICS, FRAMEWORKS, EXPERIMENTS)
ADDED = ["ACME1", "gitlab", "filter-response", "core-aten", "ghost", "flat channels", "Acme zoo", "eps"]
"""The row that the page adds to each."""
FENCED = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>.+?)")?\n(?P<text>.*?)^```$', re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
FILES = {block["title"]: block["text"] for block in FENCED.finditer(TEXT) if block["title"]}


def shown(language: str) -> list[str]:
    """The blocks of a language that are no files."""
    return [block["text"] for block in FENCED.finditer(TEXT) if block["language"] == language and not block["title"]]


@dataclass(frozen=True)
class Example:
    """A command of the page and what it prints there."""

    command: str
    output: str


EXAMPLES = [
    Example(command.removeprefix("$ "), output)
    for text in shown("console")
    for command, _, output in [text.partition("\n")]
]


def write_modules(folder: Path) -> None:
    for name, text in FILES.items():
        if name.endswith(".py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


def write_metadata(folder: Path) -> None:
    """What pip makes of the page's pyproject.toml."""
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    rows = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(rows), encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path that holds the page's files, not yet installed."""
    folder = tmp_path_factory.mktemp("site")
    write_modules(folder)
    with as_in_a_new_process(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture
def installed(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's package, installed."""
    folder = tmp_path / "installed"
    folder.mkdir()
    write_metadata(folder)
    monkeypatch.syspath_prepend(folder)
    for registry in REGISTRIES:
        registry.reload()
    yield folder
    monkeypatch.undo()
    for registry in REGISTRIES:
        registry.reload()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.command)
def test_a_command_prints_what_the_page_shows(example: Example, installed: Path, workspace: Workspace) -> None:
    write_modules(workspace.folder)
    name, *arguments = shlex.split(example.command)
    assert name == "bnprobe"
    result = workspace.run(*arguments, COLUMNS="80", PYTHONIOENCODING="utf-8")
    printed = result.stderr + result.stdout
    output = update(example, printed) if os.environ.get("BNPROBE_UPDATE_GOLDEN") == "1" else example.output
    start = 0
    for part in re.split(r"^\.\.\.\n", output, flags=re.MULTILINE):
        start = end_of(part, printed, start)
    if not output.startswith("..."):
        assert NUMBER.sub("#", printed).startswith(NUMBER.sub("#", output.partition("...\n")[0]))


def end_of(part: str, printed: str, start: int) -> int:
    """Where the lines of a part end among those printed, from a line on; figures may differ by their last digits."""
    wanted, lines = part.splitlines(), printed.splitlines()
    for first in range(start, len(lines) - len(wanted) + 1):
        found = lines[first : first + len(wanted)]
        if [NUMBER.sub("#", line) for line in found] == [NUMBER.sub("#", line) for line in wanted]:
            assert figures(found) == pytest.approx(figures(wanted), rel=0.02)
            return first + len(wanted)
    pytest.fail(f"The page shows what is not printed:\n{part}")


def figures(lines: list[str]) -> list[float]:
    return [float(number) for line in lines for number in NUMBER.findall(line)]


def update(example: Example, printed: str) -> str:
    """The output as it stands in the page, after writing it again."""
    text = rewritten(Block(PAGE, example.command, "...\n" in example.output, example.output), printed)
    page = PAGE.read_text(encoding="utf-8")
    fence = f"$ {example.command}\n"
    PAGE.write_text(page.replace(fence + example.output, fence + text, 1), encoding="utf-8")
    return text


def test_every_kind_of_row_is_installed_and_gone_again(installed: Path) -> None:
    assert [registry.names()[-1] for registry in REGISTRIES] == ADDED
    assert tuple(heading for heading, _ in manual(RULES["ACME1"]).sections) == SECTIONS


def test_without_the_package_the_rows_are_not_there(site: Path) -> None:
    assert not any(added in registry.names() for added, registry in zip(ADDED, REGISTRIES, strict=True))


def test_a_rule_is_explained_exempted_and_decides_the_exit_code(installed: Path, workspace: Workspace) -> None:
    write_modules(workspace.folder)
    explained = workspace.run("explain", "house-momentum").stdout
    assert explained.startswith("ACME1: momentum above the limit of the house\n")
    lint = ("lint", "model.py", "--select", "ACME1")
    assert workspace.run(*lint).code == 1
    exempt = '[[tool.bnprobe.rules.exempt]]\nlayers = "*"\nrules = ["ACME1"]\nreason = "tried"\n'
    workspace.write("pyproject.toml", exempt)
    assert workspace.run(*lint).code == 0


def test_a_target_and_its_layer_work_in_python(installed: Path) -> None:
    import torch

    import bnprobe

    model = import_module("model").load_model()
    converted = bnprobe.convert(model, to="filter-response")
    layer = converted.norm
    assert (type(layer).__name__, layer.weight.shape, len(list(layer.buffers()))) == ("FilterResponseNorm", (8,), 0)
    x = torch.randn(4, 8, 6, 6) + 3
    torch.testing.assert_close(layer(x).square().mean((2, 3)), torch.ones(4, 8), rtol=1e-3, atol=0)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_the_help_knows_the_package_without_importing_torch(installed: Path, site: Path) -> None:
    path = os.pathsep.join([str(installed), *sys.path])
    code = (
        "import sys; from bnprobe.cli.app import app; app(['convert', '--help'], standalone_mode=False);"
        "app(['export', '--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "80"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "gitlab" not in done.stdout  # it writes what a scan or a lint finds
    assert "zoo:NAME" in done.stdout
    assert "filter-response*: the mean square of each channel of one sample" in done.stdout
    assert "core-aten (.core.pt2): torch.export, with the core ATen operators only" in done.stdout


def test_a_row_for_the_length_of_a_block(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = shown("python")
    exec(compile(text, "extending.md", "exec"), {})
    (expected,) = re.findall(r"print\(.*\)  # (.*)", text)
    assert capsys.readouterr().out == f"{expected}\n"
    assert "ACME1" not in RULES


def test_the_test_of_the_rule_passes(site: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(FILES["tests/test_momentum.py"], "tests/test_momentum.py", "exec"), names)
    names["test_momentum_above_the_limit"]()


def test_the_tables_of_the_page_are_complete() -> None:
    rows = re.findall(r"\| `([\w.]+)\.(\w+)` \| `([\w.]+)` \|$", TEXT, re.MULTILINE)
    found = {group: getattr(import_module(module), name) for module, name, group in rows}
    assert found == {registry.group: registry for registry in REGISTRIES}
    assert set(tomllib.loads(FILES["pyproject.toml"])["project"]["entry-points"]) == found.keys()
    documents = re.findall(r"^\| `(\w+)` \| `bnprobe ", TEXT, re.MULTILINE)
    assert documents == list(DOCUMENTS)
