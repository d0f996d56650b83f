"""The installed command on every sample of the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import pytest

from bnprobe.numbers import count
from bnprobe.report import render
from bnprobe.report.json import load_report
from bnprobe.rules import RULES
from functional.command import CLEAN, FINDINGS, REPOSITORY, Workspace

SAMPLES = sorted((REPOSITORY / "sample_configs").glob("*/*.yaml"))
SCHEMA = json.loads((REPOSITORY / "bnprobe" / "report" / "report.schema.json").read_text(encoding="utf-8"))
OUTPUT = "report.json"
WEIGHTS = "out.safetensors"


def _not_finite(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} in a report")


def test_there_is_a_sample_of_every_kind() -> None:
    assert {path.parent.name for path in SAMPLES} >= {"digits", "gan", "tabular", "volumes"}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_sample_gives_a_report_that_fits_the_schema(workspace: Workspace, sample: Path) -> None:
    found = workspace.run("scan", sample, "--format", "json", "--output", OUTPUT)
    text = (workspace.folder / OUTPUT).read_text(encoding="utf-8")
    report: dict[str, Any] = json.loads(text, parse_constant=_not_finite)
    jsonschema.validate(report, SCHEMA)
    summary = report["summary"]
    is_error = any(diagnosis["severity"] == "error" for diagnosis in report["diagnoses"])
    assert (found.code, found.stdout) == (FINDINGS if is_error else CLEAN, "")
    title = RULES[report["diagnoses"][0]["rule"]].title
    severity = "error" if is_error else "warning"
    number = count(sum(diagnosis["severity"] == severity for diagnosis in report["diagnoses"]), severity)
    undecided = f", {summary['undecided']} undecided" if summary["undecided"] else ""
    counted = f"{summary['flagged']} of {summary['layers']} layers flagged{undecided}, {number}: {title}"
    assert found.stderr == f"{counted}; report written to {OUTPUT}\n"
    assert report["layers"]
    assert all(layer["train"] and layer["eval"] for layer in report["layers"])
    printed = render(load_report(text))
    assert max(map(len, printed.splitlines())) <= 80


def test_the_demo_prints_its_report(workspace: Workspace) -> None:
    found = workspace.run("scan", REPOSITORY / "sample_configs" / "digits" / "batch2.yaml")
    assert (found.code, found.stderr) == (FINDINGS, "")
    assert max(map(len, found.stdout.splitlines()[3:])) <= 80
    assert "Self-check passed" in found.stdout


def test_a_sample_is_repaired_and_exported(workspace: Workspace) -> None:
    """The way that the tutorial goes, in few steps; its own commands are run by test_documentation."""
    sample = REPOSITORY / "sample_configs" / "digits" / "sorted.yaml"
    repaired = workspace.run("convert", sample, "--finetune", "--steps", "10", "--require", "flagged==0", "-o", WEIGHTS)
    assert (repaired.code, "Flagged layers: 3 → 0." in repaired.stdout) == (CLEAN, True)
    assert workspace.run("verify", "out.before.json", "out.after.json").code == CLEAN
    exported = workspace.run("export", sample, "--checkpoint", WEIGHTS)
    assert (exported.code, (workspace.folder / "out.pt2").is_file()) == (CLEAN, True)
    again = workspace.run("scan", sample, "--checkpoint", WEIGHTS, "--format", "json")
    assert again.report(FINDINGS)["summary"]["flagged"] == 3  # in the original model it is plain BN, on sorted batches
