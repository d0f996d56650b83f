"""What README.md and docs/ show is what a reader gets: output, specs, commands, Python, figures and the picture.

``BNPROBE_UPDATE_GOLDEN=1 pytest tests/functional/test_documentation.py`` writes the output into the pages again.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml

from bnprobe.cli.app import app
from bnprobe.config.spec import RenormSpec, RepairSpec, Spec, TrainSpec
from bnprobe.config.targets import AUTO, TARGETS
from bnprobe.rules import RULES
from functional import documentation
from functional.command import CLEAN, FINDINGS, REPOSITORY
from functional.documentation import PAGES, README, Reader

SAMPLES = sorted((REPOSITORY / "sample_configs").glob("*/*.yaml"))
REPAIRS = REPOSITORY / "docs" / "repairs.md"


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Who tries the commands; what they write stays out of the repository."""
    return Reader(tmp_path_factory.mktemp("reader"))


@pytest.mark.parametrize("chain", documentation.chains(), ids=lambda chain: chain[0])
def test_the_pages_show_real_output(reader: Reader, chain: tuple[str, ...]) -> None:
    for command in chain:
        found = reader.run(command)
        assert found.code in (CLEAN, FINDINGS)
        for block in documentation.blocks():
            if block.command == command:
                _compare(documentation.update(block, found.stdout), found.stdout)
        if command == _module("picture").COMMAND:
            _compare_picture(found.stdout)


def _compare(block: documentation.Block, output: str) -> None:
    if not block.partial:
        assert documentation.words(block.text) == documentation.words(output), block.page
    start = 0
    for part in block.parts if block.partial else ():
        place = documentation.place(part, output, start)
        assert place is not None, f"{block.page}:\n{part}"
        start = place[1]


def _compare_picture(output: str) -> None:
    """``make picture`` makes it again."""
    picture = _module("picture")
    drawn = picture.text_of(picture.PICTURE.read_text(encoding="utf-8"))
    assert documentation.words(drawn) == documentation.words(picture.shown(output))


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200


def test_every_sample_is_shown() -> None:
    text = " ".join(block.command for block in documentation.blocks())
    samples = {path.parent.name for path in SAMPLES}
    assert {path.parent.name for path in SAMPLES if f"{path.parent.name}/{path.name}" in text} == samples


def test_specs_are_right() -> None:
    specs = [Spec.model_validate({"model": {"target": "model.py"}} | yaml.safe_load(text)) for text in _fenced("yaml")]
    assert [spec.repair.seeds for spec in specs] == [5, 5]
    settings = next(spec for spec in specs if spec.train.schedule)  # every key of these sections is shown
    assert settings.train.model_fields_set == TrainSpec.model_fields.keys() - {"epochs"}
    assert settings.repair.model_fields_set == RepairSpec.model_fields.keys()
    assert settings.repair.renorm.model_fields_set == RenormSpec.model_fields.keys()


def test_commands_have_the_options_they_are_shown_with() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = [
        words[words.index("bnprobe") + 1 :]
        for text in _fenced("sh")
        for line in text.replace("\\\n", " ").splitlines()
        if "bnprobe" in (words := shlex.split(line, comments=True))
    ]
    assert len(shown) >= 40
    for name, *arguments in shown:
        known = {flag for parameter in commands[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in arguments if word.startswith("-")} <= known, (name, arguments)


def test_the_python_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(REPOSITORY / "docs" / "examples" / "plates.csv", tmp_path)
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer4 = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.head(self.layer4(x).mean((2, 3)))
            return scores

    def loader() -> DataLoader[Any]:
        images = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 2
        return DataLoader(TensorDataset(images, torch.arange(64) % 2), 2)

    names: dict[str, Any] = {
        "torch": torch,
        "model": Net(),
        "loader": loader(),
        "held_out_loader": loader(),
        "criterion": nn.CrossEntropyLoss(),
        "train": lambda model: model.train(),
    }
    (tmp_path / "run").mkdir()
    shutil.copy(REPOSITORY / "docs" / "examples" / "while_training.jsonl", tmp_path / "run" / "monitor.jsonl")
    shown = list(_fenced("python", REPOSITORY / "docs" / "python.md"))
    assert len(shown) == 9
    for text in shown:
        exec(compile(text.replace('device="cuda"', 'device="cpu"'), "python.md", "exec"), names)
    assert names["report"].scan.batches == 32
    assert names["monitor"].samples > 0
    assert len(names["log"].findings) == 3
    assert (tmp_path / "page.html").is_file()
    assert [batch.name for batch in names["effects"].batches if batch.off] == ["P2", "P4"]
    assert "running_mean" in "".join(names["model"].state_dict())


def test_python_compiles() -> None:
    for page in PAGES:
        for text in _fenced("python", page):
            compile(text, str(page), "exec")


def test_the_figures_of_the_benchmark_of_repairs_are_those_it_found() -> None:
    results = (REPOSITORY / "benchmarks" / "repairs" / "RESULTS.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (batch2|sorted)\.yaml(.*?)(?=^##)", results, re.DOTALL | re.MULTILINE))
    shown = re.findall(r"^\| `(batch2|sorted)`[^|]*\|(.*)\|$", REPAIRS.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in shown] == ["batch2", "sorted"]
    for name, row in shown:
        arms = [[cell.strip() for cell in line.split("|")] for line in sections[name].splitlines() if "|" in line]
        column = arms[0].index("held-out accuracy")
        found = [f"{float(arm[column].split()[0]):.2f}" for arm in arms[2:]]
        assert [cell.strip() for cell in row.split("|")] == found


def test_the_guide_to_repairs_names_every_target() -> None:
    page = REPAIRS.read_text(encoding="utf-8")
    section = page.partition("## What a layer can become")[2].partition("\n## ")[0]
    shown = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    table = _module("hooks").targets()
    if os.environ.get("BNPROBE_UPDATE_GOLDEN") == "1":
        REPAIRS.write_text(page.replace(shown, table), encoding="utf-8")
        shown = table
    assert shown == table
    heading, *named = re.findall(r"^\| `([\w-]+)`.*?\|", shown, re.MULTILINE)
    assert heading == "--to"
    assert tuple(named) == TARGETS.names()
    assert all(f"| {target.summary} |" in shown and f"| {target.advice} |" in shown for target in TARGETS)
    assert all(target.advice for target in TARGETS)
    assert f"`--to {AUTO}`" in section


def test_generated_pages_are_complete() -> None:
    pages = _module("hooks").generated_pages()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        section = pages["reference/command-line.md"].partition(f"\n## bnprobe {name}\n")[2].partition("\n## ")[0]
        assert all(
            f"`{flag}" in section
            for option in command.params
            for flag in (*option.opts, *option.secondary_opts)
            if flag.startswith("-")
        )
    assert all(f"`{key}`" in pages["reference/spec.md"] for key in RepairSpec.model_fields)
    assert all(f"rules/{rule.code}.md" in pages for rule in RULES)
    assert "](docs/" not in pages["index.md"]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.html", '<script src="https://cdn.example/x.js"></script>', ["a.html: https://cdn.example/x.js"]),
        ("a.html", '<link rel="stylesheet" href="//fonts.example/x.css">', ["a.html: //fonts.example/x.css"]),
        ("a.css", "@font-face { src: url('http://x.example/f.woff') }", ["a.css: http://x.example/f.woff"]),
        ("a.html", '<a href="https://arxiv.org/abs/1702.03275">a link is only followed by hand</a>', []),
        ("a.html", '<script src="assets/x.js"></script><img src="images/report.svg">', []),
    ],
)
def test_a_site_that_loads_from_other_hosts_is_refused(tmp_path: Path, name: str, text: str, found: list[str]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert list(_module("hooks").foreign_loads(tmp_path)) == found


def _fenced(language: str, *pages: Path) -> list[str]:
    """The fenced blocks of a language in the pages (none: in all), without the indentation of a list."""
    block = re.compile(rf"^( *)```{language}\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
    texts = [path.read_text(encoding="utf-8") for path in pages or PAGES]
    return [textwrap.dedent(match[2]) for text in texts for match in block.finditer(text)]


def _module(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", REPOSITORY / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
