"""A rule that is not part of bnprobe works everywhere: in a scan, in lint, in reports, in the manual."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

import bnprobe
from bnprobe.analysis.diagnosis import diagnose, judge
from bnprobe.cli.app import app
from bnprobe.config.spec import RulesSpec
from bnprobe.errors import UsageError
from bnprobe.records import Diagnosis, Report, Verdict
from bnprobe.report import render
from bnprobe.report.json import load_as
from bnprobe.rules import RULES, Rule
from bnprobe.rules.docs import pages
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Link
from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_shares, run_rule
from support.networks import Residual, images, unsettled

BATCHES = images(16, 8, 3, 6, 6)
MODEL = """
from torch import nn

def load_model():
    return nn.Sequential(nn.BatchNorm1d(4, eps=0.5))
"""


class LargeEps(Rule):
    """An eps that is not small compared with usual variances.

    What:
        The eps of each layer; more than 0.01 fails.

    Why:
        The layer divides by sqrt(variance + eps).

    Example:
        A model ported from a framework with another default.

    Remedy:
        Use the default.

    Reference:
        PyTorch documentation of torch.nn.BatchNorm2d.
    """

    code = "ACME7"
    title = "eps out of proportion"
    cause = "large_eps"
    severity = "error"
    unit = "eps"
    finding = "eps is large"
    remedy = "Use the default eps."
    explains = (Link("lag"), Link("small_batch"))
    upstream_order = 5
    stops_training = True
    free_remedy = "recalibrated"

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.anatomy:
            judged = self.failed if layer.eps > 0.01 else self.passed
            yield judged(layer.name, f"eps is {layer.eps:g}.", layer.eps, 0.01)


@pytest.fixture(autouse=True)
def rule() -> Iterator[None]:
    with RULES.including(LargeEps()):
        yield


@pytest.fixture
def model() -> nn.Module:
    made = unsettled(Residual())
    next(layer for layer in made.modules() if isinstance(layer, nn.BatchNorm2d)).eps = 0.5
    return made


def scanned(model: nn.Module, **rules: tuple[str, ...]) -> Report:
    return bnprobe.scan(model, BATCHES, 8, num_batches=16, rules=RulesSpec(**rules))


def found(report: Report) -> Diagnosis:
    return next(diagnosis for diagnosis in report.diagnoses if diagnosis.rule == "ACME7")


def test_a_scan_judges_ranks_and_measures_it(model: nn.Module) -> None:
    report = scanned(model)
    assert {verdict.outcome for verdict in report.verdicts if verdict.rule == "ACME7"} == {"failed", "passed"}
    assert report.diagnoses[0] == found(report)  # it stops training, and so comes first
    assert (found(report).cause, found(report).severity, len(found(report).layers)) == ("large_eps", "error", 1)
    assert found(report).impact is not None
    assert found(report).remedy == "Use the default eps."


def test_it_is_selected_and_ignored(model: nn.Module) -> None:
    assert {verdict.rule for verdict in scanned(model, select=("acme",)).verdicts} == {"ACME7"}
    ignoring = scanned(model, ignore=("ACME7",))
    assert "ACME7" not in {verdict.rule for verdict in ignoring.verdicts}
    with pytest.raises(UsageError, match="the nearest code is ACME7"):
        scanned(model, select=("ACME8",))


def test_the_terminal_report_has_its_title_and_the_json_report_reads_back(model: nn.Module) -> None:
    report = scanned(model, select=("ACME7",))
    printed = render(report)
    assert "Eps out of proportion (ACME7): 1 of 2 layers" in printed
    assert "Use the default eps." in printed
    assert "bnprobe explain ACME7" in printed
    assert load_as(Report, render(report, "json")) == report


def test_a_report_names_its_cause_where_the_rule_is_not_installed(model: nn.Module) -> None:
    report = scanned(model, select=("ACME7",))
    other = replace(found(report), rule="ACME6")
    printed = render(replace(report, diagnoses=(other,)))
    assert "Large eps (ACME6): 1 of 2 layers" in printed
    assert "bnprobe explain" not in printed


def test_rules_that_explain_each_other_are_both_named() -> None:
    class Larger(LargeEps):
        code, cause, explains = "ACME8", "larger_eps", (Link("largest_eps"),)

    class Largest(LargeEps):
        code, cause, explains = "ACME9", "largest_eps", (Link("larger_eps"),)

    with RULES.including(Larger()), RULES.including(Largest()):
        facts = make_evidence(anatomy=[make_anatomy("a", eps=0.5)])
        diagnoses = diagnose(judge(facts, RulesSpec(select=("ACME8", "ACME9"))), facts)
    assert [one.rule for one in diagnoses] == ["ACME8", "ACME9"]


def test_other_causes_follow_from_it_and_it_explains_mismatch_in_later_layers() -> None:
    layers = [
        make_layer("a", make_shares(lag=0.5)),
        make_layer("b", make_shares(propagation=0.2)),
        make_layer("c", make_shares(lag=0.5)),
    ]
    anatomy = [make_anatomy("a", eps=0.5), make_anatomy("b"), make_anatomy("c", momentum=0.99, eps=0.5)]
    facts = make_evidence(*layers, anatomy=anatomy)
    diagnoses = diagnose(judge(facts, RulesSpec()), facts)
    # Layer c has an explanation of its own for its stale statistics, which counts first.
    assert [(one.rule, one.layers, one.consequences) for one in diagnoses] == [
        ("ACME7", ("a", "c"), ("lag in 1 layer", "propagation in 1 layer")),
        ("BN101", ("c",), ("lag in 1 layer",)),
    ]


def test_the_command_line_knows_it(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    run = CliRunner().invoke
    assert "ACME7  eps out of proportion" in run(app, ["explain"]).stdout
    assert run(app, ["explain", "large-eps"]).stdout.startswith("ACME7: eps out of proportion\n")
    linted = run(app, ["lint", str(tmp_path / "model.py"), "--select", "ACME7"])
    assert linted.exit_code == 1
    assert "ACME7 error 0: eps is 0.5." in linted.stdout
    assert "fix: Use the default eps." in linted.stdout


def test_the_documentation_has_its_page() -> None:
    assert pages()["ACME7.md"].startswith("# ACME7: eps out of proportion\n\nAn eps that is not small")
    row = "| [ACME7](ACME7.md) | eps out of proportion | `large_eps` | error | the model alone |"
    assert row in pages()["README.md"]


def test_its_author_tests_it_like_any_rule() -> None:
    facts = make_evidence(anatomy=[make_anatomy("bn", eps=0.5)])
    assert [verdict.message for verdict in run_rule("acme7", facts)] == ["eps is 0.5."]


def test_a_rule_of_another_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    start, end = source.index("class LargeEps"), source.index("@pytest.fixture")
    imports = "from bnprobe.rules import Rule\nfrom bnprobe.rules.interface import Link\n\n"
    body = source[start:end].replace("facts: Facts) -> Iterator[Verdict]", "facts)")
    (tmp_path / "acme_rules.py").write_text(imports + body, encoding="utf-8")
    package = tmp_path / "acme-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n", encoding="utf-8")
    (package / "entry_points.txt").write_text("[bnprobe.rules]\nlarge = acme_rules:LargeEps\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "bnprobe", "explain", "large_eps"]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": path}, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ACME7: eps out of proportion\n")


def test_a_rule_must_say_all_that_is_said_about_it() -> None:
    class Nameless(LargeEps):
        code, title = "ACME9", None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="Nameless does not declare title"):
        RULES.add(Nameless)
    with pytest.raises(TypeError, match=r"is not a bnprobe\.rules\.Rule"):
        RULES.add(int)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='already a rule named "ACME7"'):
        RULES.add(LargeEps)
