"""Every option of ``scan`` sets one field of the spec: none is accepted and then ignored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bnprobe.analysis.diagnosis import has_findings, judge
from bnprobe.cli.app import app
from bnprobe.config.spec import RuleExemption, RulesSpec, Spec
from bnprobe.errors import BnprobeError
from bnprobe.testing import make_evidence, make_layer, make_shares
from unit.report.fabricated_parts import report

FIELDS: dict[str, tuple[list[str], str, Any]] = {
    "--checkpoint": (["weights.pt"], "checkpoint.path", "weights.pt"),
    "--key": (["model_ema"], "checkpoint.key", "model_ema"),
    "--strip-prefix": (["net."], "checkpoint.strip_prefix", "net."),
    "--model-arg": (["depth=50"], "model.args", {"depth": 50}),
    "--unsafe-load": ([], "checkpoint.unsafe_load", True),
    "--batch-size": (["3"], "data.batch_size", 3),
    "--data": (["data.py:loader"], "data.target", "data.py:loader"),
    "--eval-data": (["data.py:held_out"], "eval_data.target", "data.py:held_out"),
    "--input-shape": (["3,8,8"], "data.input_shape", ((3, 8, 8),)),
    "--seed": (["7"], "data.seed", 7),
    "--batches": (["5"], "data.batches", 5),
    "--max-batches": (["9"], "scan.max_batches", 9),
    "--batch-sizes": (["4,2"], "scan.batch_sizes", (2, 4)),
    "--device": (["cuda:1"], "scan.device", "cuda:1"),
    "--autocast": (["bfloat16"], "scan.autocast", "bfloat16"),
    "--physical-batch": (["12"], "scan.physical_batch", 12),
    "--no-emulate": ([], "scan.emulate", False),
    "--what-if": ([], "scan.what_if", True),
    "--no-what-if": ([], "scan.what_if", False),
    "--train-steps": (["4"], "scan.train_steps", 4),
    "--gradients": ([], "scan.gradients", True),
    "--thorough": ([], "scan.thorough", True),
    "--select": (["BN2"], "rules.select", ("BN2",)),
    "--ignore": (["BN107"], "rules.ignore", ("BN107",)),
    "--goal": (["min"], "repair.goal", "min"),
    "--threshold": (["8"], "thresholds", {"*": 8.0}),
    "--include": (["a.*"], "layers.include", ("a.*",)),
    "--exclude": (["b.*"], "layers.exclude", ("b.*",)),
}
REPORT = {
    "--format",
    "--output",
    "--output-dir",
    "--baseline",
    "--write-baseline",
    "--force",
    "--verbose",
    "--all",
    "--exit-zero",
}
"""These say what becomes of the report; the functional tests use each."""


class SeenEnoughError(BnprobeError):
    """Ends the command where the scan would begin."""


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[Spec]:
    """The specs that the command line hands to the pipeline."""
    seen: list[Spec] = []

    def stop(spec: Spec, progress: object, world: object, announce: object) -> None:
        seen.append(spec)
        raise SeenEnoughError

    monkeypatch.setattr("bnprobe.commands.scan.scan_spec", stop)
    return seen


def fields(spec: Spec) -> dict[str, Any]:
    """``{"data.seed": 0, ...}``."""
    flat: dict[str, Any] = {}
    for section, value in spec.model_dump().items():
        nested = isinstance(value, dict) and section != "thresholds"
        flat |= {f"{section}.{name}": entry for name, entry in value.items()} if nested else {section: value}
    return flat


def test_no_option_is_missing_here() -> None:
    scan = typer.main.get_command(app).commands["scan"]  # type: ignore[attr-defined]
    options = {
        name
        for parameter in scan.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--")
    }
    assert options - {"--help"} == FIELDS.keys() | REPORT


@pytest.mark.parametrize("option", FIELDS)
def test_an_option_sets_its_field_and_no_other(option: str, specs: list[Spec]) -> None:
    values, path, expected = FIELDS[option]
    for arguments in ([], [option, *values]):
        ended = CliRunner().invoke(app, ["scan", "model.py", *arguments])
        assert isinstance(ended.exception, SeenEnoughError), ended.output
    default, given = map(fields, specs)
    assert {name: value for name, value in given.items() if value != default[name]} == {path: expected}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (RulesSpec(), True),
        (RulesSpec(exempt=(RuleExemption(layers="bn", rules=("BN2",), reason="known"),)), False),
        (RulesSpec(exempt=(RuleExemption(layers="other", rules=("BN2",), reason="known"),)), True),
        (RulesSpec(ignore=("BN3",)), False),
    ],
    ids=["all rules", "exempt", "another layer exempt", "rules ignored"],
)
def test_a_flagged_layer_is_accepted_only_where_the_user_says_so(rules: RulesSpec, expected: bool) -> None:
    """Rules are skipped here, since its mismatch could not be taken apart: that alone excuses nothing."""
    flagged = replace(make_layer("bn", make_shares(lag=0.3)), shares=None, share_intervals=None)
    verdicts = judge(make_evidence(flagged), rules)
    assert {verdict.outcome for verdict in verdicts} == {"passed", "skipped"}
    assert has_findings(replace(report([flagged]), verdicts=verdicts, diagnoses=()), rules) is expected
