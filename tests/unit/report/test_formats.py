"""A report format is one row of one table: rows from outside the package, and pairs that are not supported."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fabricated_documents import CASES, document
from typer.testing import CliRunner

from bnprobe.cli.app import app
from bnprobe.errors import UsageError
from bnprobe.records import ExportReport, LintReport, Plan, Report, SweepReport, Verification
from bnprobe.report import DOCUMENTS, FORMATS, OF_COMMANDS, Format, RenderOptions, formats_of, render, renderer
from bnprobe.report.repair import RepairReport

MODEL = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def load_model():
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

def load_data(batch_size):
    images = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images), batch_size=batch_size)
"""


def scanned(report: Report, options: RenderOptions) -> str:
    """A row for each layer."""
    return "".join(f"{layer.name},{layer.flagged}\n" for layer in report.layers)


def linted(report: LintReport, options: RenderOptions) -> str:
    """A row for each diagnosis."""
    return "".join(f"{diagnosis.rule},{diagnosis.severity}\n" for diagnosis in report.diagnoses)


OWN = FORMATS.names()
ROWS = Format("rows", {Report: scanned, LintReport: linted}, suffix=".txt")


def test_the_page_on_formats_says_what_each_of_them_shows() -> None:
    page = (Path(__file__).parents[3] / "docs" / "ci" / "formats.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| `(\w+)` \| `scan(\S+)` \|.*\| ([^|]+) \|$", page, re.MULTILINE)
    shows = {row.name: [command for command in OF_COMMANDS if row.name in formats_of(command)] for row in FORMATS}
    every = list(OF_COMMANDS)
    assert said == [
        (row.name, row.ending, "every command" if shows[row.name] == every else ", ".join(shows[row.name]))
        for row in FORMATS
    ]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model file with data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    return "model.py"


def run(*arguments: str) -> tuple[int, str, BaseException | None]:
    """Exit code, stdout and what was raised."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.exception


def test_a_format_from_outside_works_for_scan_and_lint(model: str) -> None:
    with FORMATS.including(ROWS):
        code, text, _ = run("scan", model, "--batch-size", "8", "--format", "rows", "--exit-zero")
        assert (code, text) == (0, "0,True\n") or (code, text) == (0, "0,False\n")
        code, text, _ = run("lint", model, "--format", "rows", "--output", "found.txt")
        assert (code, "model.py:7: BN102 info" in text) == (0, True)
        assert Path("found.txt").read_text(encoding="utf-8") == "BN102,info\n"


@pytest.mark.parametrize("location", ["bnprobe.report.screen:no_such_function", "no_such_module:render", "no_colon"])
def test_a_format_whose_function_is_missing(model: str, location: str) -> None:
    with FORMATS.including(Format("lost", {"LintReport": location})):
        _, _, error = run("lint", model, "--format", "lost")
    assert isinstance(error, UsageError)
    assert str(error).startswith(f'What renders the report of a lint as "lost" ({location}) cannot be loaded: ')


@pytest.mark.parametrize("command", [*OF_COMMANDS, "show"])
def test_help_names_every_format_that_the_command_supports(command: str) -> None:
    def named() -> str:
        return " ".join(run(command, "--help")[1].replace("│", " ").split())

    with FORMATS.including(ROWS):
        assert ("rows" in named()) == (command in ("scan", "lint", "show"))
    for name in formats_of(command):
        assert re.search(rf"\b{name}( \(default\))?[,;]", named())
    assert "rows" not in named()


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["sweep", "model.py"], SweepReport),
        (["convert", "model.py", "--check"], Plan),
        (["convert", "model.py", "-o", "out.safetensors"], RepairReport),
        (["recalibrate", "model.py", "-o", "out.safetensors"], RepairReport),
        (["verify", "no.json", "no.json"], Verification),
        (["export", "model.py", "-o", "out.pt2"], ExportReport),
    ],
)
def test_a_document_that_a_format_does_not_support_is_refused_before_anything_runs(
    arguments: list[str], kind: type, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("model.py").write_text("raise RuntimeError('the model was loaded')", encoding="utf-8")
    with FORMATS.including(ROWS):
        _, text, error = run(*arguments, "--format", "rows")
    able = [row.name for row in FORMATS if kind.__name__ in row.documents]
    assert isinstance(error, UsageError)
    assert (
        str(error) == f"--format rows does not support {DOCUMENTS[kind.__name__]}; these formats do: {', '.join(able)}."
    )
    assert text == ""
    assert not Path("out.safetensors").exists()


def test_an_unknown_format_is_a_usage_error_that_lists_the_formats(model: str) -> None:
    result = CliRunner().invoke(app, ["scan", model, "--format", "xml"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert 'There is no report format named "xml" (known: ' + ", ".join(OWN) + ")" in result.stderr


def test_another_package_adds_a_format_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "tables-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tables\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bnprobe.formats]\nrows = tables_module:ROWS\n")
    (tmp_path / "tables_module.py").write_text(
        "from bnprobe.records import Report\n"
        "from bnprobe.report import Format\n"
        "ROWS = Format('rows', {Report: lambda report, options: report.scan.model})\n"
    )
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        FORMATS.reload()
        assert FORMATS.names() == (*OWN, "rows")
        assert render(document("scan", "healthy"), "rows") == "sample_configs/digits/model.py:load_model"
    FORMATS.reload()
    assert FORMATS.names() == OWN
    sys.modules.pop("tables_module")


def test_the_formats_for_people_and_for_programs_support_every_document() -> None:
    for name in ("terminal", "json"):
        assert list(FORMATS[name].documents) == list(DOCUMENTS), name


def test_files_of_different_formats_have_different_names() -> None:
    assert len({row.ending for row in FORMATS}) == len(FORMATS)


def test_a_format_whose_package_is_missing_says_how_to_get_it_where_it_supports_the_document() -> None:
    with FORMATS.including(replace(ROWS, package="no_such_package", extra="tables")):
        with pytest.raises(
            UsageError, match=r"--format rows needs no_such_package: pip install \"bnprobe\[tables\]\"\."
        ):
            renderer("rows", Report)
        with pytest.raises(UsageError, match="--format rows does not support"):
            renderer("rows", SweepReport)


def test_what_is_no_document_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--format json does not support Tensor; these formats do: none\."):
        renderer("json", torch.Tensor)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_document_is_json_of_finite_numbers_that_begins_with_its_version(case: tuple[str, str]) -> None:
    text = render(document(*case), "json")
    parsed = json.loads(text, parse_constant=pytest.fail)
    assert next(iter(parsed.items())) == ("schema_version", 1)
    assert text == json.dumps(parsed, indent=2, ensure_ascii=False) + "\n"
