"""The installed command on every sample of the repository."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import pytest

from bnprobe.numbers import count
from bnprobe.records import Report
from bnprobe.report import render
from bnprobe.report.json import load_as
from bnprobe.rules import RULES
from functional.command import CLEAN, FINDINGS, REPOSITORY, Result, Workspace

SAMPLES = REPOSITORY / "sample_configs"
NAMES = sorted(path.relative_to(SAMPLES).as_posix() for path in SAMPLES.glob("*/*.yaml"))
SCHEMA = json.loads((REPOSITORY / "bnprobe" / "report" / "report.schema.json").read_text(encoding="utf-8"))
OUTPUT = "report.json"
JSON = ("--format", "json")
Scan = Callable[[str], tuple[Workspace, Result]]


def _not_finite(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} in a report")


def test_there_is_a_sample_of_every_kind() -> None:
    assert {name.partition("/")[0] for name in NAMES} >= {"digits", "gan", "tabular", "volumes"}


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """Scan a sample into a file, once for all tests of what was found; the workspace with the file, and the result."""

    @cache
    def scanned(sample: str) -> tuple[Workspace, Result]:
        workspace = Workspace(tmp_path_factory.mktemp("sample"))
        return workspace, workspace.run("scan", SAMPLES / sample, *JSON, "--output", OUTPUT, "--verbose")

    return scanned


def _report(workspace: Workspace) -> dict[str, Any]:
    text = (workspace.folder / OUTPUT).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text, parse_constant=_not_finite)
    return found


@pytest.mark.parametrize("sample", NAMES)
def test_a_sample_gives_a_report_that_fits_the_schema(scan: Scan, sample: str) -> None:
    workspace, found = scan(sample)
    report = _report(workspace)
    jsonschema.validate(report, SCHEMA)
    summary = report["summary"]
    is_error = any(diagnosis["severity"] == "error" for diagnosis in report["diagnoses"])
    assert (found.code, found.stderr) == (FINDINGS if is_error else CLEAN, f"Report written to {OUTPUT}.\n")
    title = RULES[report["diagnoses"][0]["rule"]].title
    severity = "error" if is_error else "warning"
    number = count(sum(diagnosis["severity"] == severity for diagnosis in report["diagnoses"]), severity)
    undecided = f", {summary['undecided']} undecided" if summary["undecided"] else ""
    counted = f"{summary['flagged']} of {summary['layers']} layers flagged{undecided}, {number}: {title}"
    assert counted in " ".join(found.stdout.split())
    assert report["layers"]
    assert all(layer["train"] and layer["eval"] for layer in report["layers"])
    printed = render(load_as(Report, (workspace.folder / OUTPUT).read_text(encoding="utf-8")))
    assert max(map(len, printed.splitlines())) <= 80


def test_a_sample_prints_its_report(workspace: Workspace) -> None:
    """The smallest one; those that the documentation shows are printed by test_documentation."""
    found = workspace.run("scan", SAMPLES / "tabular" / "spec.yaml")
    assert (found.code, found.stderr) == (CLEAN, "")
    assert max(map(len, found.stdout.splitlines()[3:])) <= 80
    assert "--verbose shows" in found.stdout
    whole = workspace.run("scan", SAMPLES / "tabular" / "spec.yaml", "--verbose")
    assert "Self-check passed" in whole.stdout


def _names_the_layer(location: str, layer: str) -> bool:
    """Whether that line of code assigns the layer, or what it is a part of."""
    file, _, number = location.rpartition(":")
    line = Path(REPOSITORY / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
    return "Norm" in line or any(f"self.{part} = " in line for part in layer.split("."))


@pytest.mark.parametrize(
    ("sample", "cause", "layer", "code"),
    [
        ("digits/batch2.yaml", "small_batch", "blocks.2.shortcut.1", FINDINGS),
        ("digits/sorted.yaml", "composition", "blocks.2.bn2", FINDINGS),
        ("digits/spec.yaml", "small_batch", "blocks.2.bn2", CLEAN),  # inference is better than training at batch size 2
        ("volumes/batch1.yaml", "single_image", "middle.1", FINDINGS),
        ("tabular/spec.yaml", "dropout", "hidden.9", CLEAN),  # loss and metric are no worse: a warning,
        ("gan/spec.yaml", "shared_domains", "discriminator.layers.6", FINDINGS),
    ],
)
def test_the_cause_of_each_sample_is_named_first(scan: Scan, sample: str, cause: str, layer: str, code: int) -> None:
    workspace, result = scan(sample)
    assert result.code == code
    report = _report(workspace)
    first = report["diagnoses"][0]
    assert (first["cause"], layer in first["layers"]) == (cause, True)
    assert first["remedy"]
    found = [verdict for verdict in report["verdicts"] if (verdict["rule"], verdict["layer"]) == (first["rule"], layer)]
    assert [verdict["outcome"] for verdict in found] == ["failed"]
    assert _names_the_layer(found[0]["location"], layer)
    for measured in report["layers"]:
        parts = [value for name, value in measured["shares"].items() if name != "data_shift"]
        assert sum(parts) == pytest.approx(measured["eval"]["mismatch"], rel=1e-9)


def test_the_healthy_sample_is_clean_at_its_batch_size(workspace: Workspace) -> None:
    report = workspace.run("scan", SAMPLES / "digits/spec.yaml", "--batch-size", "64", *JSON).report(CLEAN)
    assert report["diagnoses"] == []
    outcomes = {verdict["rule"]: verdict["outcome"] for verdict in report["verdicts"]}
    assert outcomes["BN202"] == "passed"
    assert outcomes["BN301"] == "skipped"
