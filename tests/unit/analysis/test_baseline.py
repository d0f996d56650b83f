"""Known findings: what is new, worse, known, fixed or stale, and what a baseline is not compared with."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnprobe.analysis.baseline import baseline_of, compare
from bnprobe.analysis.diagnosis import has_findings
from bnprobe.config.spec import RulesSpec
from bnprobe.errors import UsageError
from bnprobe.records import Baseline, LintReport, Report, Severity, ShareIntervals, Tool, Verdict
from bnprobe.report import render
from bnprobe.report.json import dump, load_as, read_as
from bnprobe.rules.findings import failures
from bnprobe.testing import make_layer
from unit.report.fabricated_parts import report as report_of


def failed(layer: str | None, value: float | None = 0.2, severity: Severity = "error", rule: str = "BN203") -> Verdict:
    return Verdict(rule, "lag", layer, "failed", severity, "Stale.", value, 0.05, "D", "Mend it.", None, "m.py:3")


def passed(layer: str | None, rule: str = "BN203") -> Verdict:
    return replace(failed(layer), rule=rule, outcome="passed", message="", remedy="")


def scanned(*verdicts: Verdict, spread: float | None = 0.01, **scan: Any) -> Report:
    """A report in which the share of every layer has an interval of this half width."""
    layers = []
    for verdict in verdicts:
        if verdict.layer is None:
            continue
        value = verdict.value or 0.0
        interval = None if spread is None else (value - spread, value + spread)
        intervals = ShareIntervals(None, None, interval, None, None, None)
        layers.append(replace(make_layer(verdict.layer), share_intervals=intervals))
    return replace(report_of(layers, **scan), verdicts=verdicts)


def linted(*verdicts: Verdict) -> LintReport:
    return LintReport(Tool("bnprobe", "0"), "m.py:net", 3, verdicts, ())


def states(before: Report | LintReport, after: Report | LintReport) -> dict[str | None, str]:
    found = compare(baseline_of(before), after, "b.json")
    return {change.layer: change.state for change in found.changes}


def test_new_worse_known_fixed_and_stale_are_told_apart() -> None:
    before = scanned(failed("a"), failed("b"), failed("c"), failed("d"), failed("e"))
    after = scanned(failed("a", 0.19), failed("b", 0.21), failed("c", 0.4), passed("d"), failed("new"))
    assert states(before, after) == {
        "a": "known",
        "b": "known",
        "c": "worse",
        "d": "fixed",
        "e": "stale",
        "new": "new",
    }


@pytest.mark.parametrize(
    ("value", "spread", "state"),
    [(0.2, 0.01, "known"), (0.219, 0.01, "known"), (0.221, 0.01, "worse"), (0.01, 0.01, "known"),
     (0.2001, None, "known"), (0.201, None, "worse"), (0.1, None, "known")],
)  # fmt: skip
def test_equal_or_better_within_the_interval_is_known(value: float, spread: float | None, state: str) -> None:
    assert states(scanned(failed("a"), spread=spread), scanned(failed("a", value), spread=spread)) == {"a": state}


def test_a_value_below_its_limit_is_worse_if_it_falls() -> None:
    def count(value: float) -> LintReport:
        return linted(replace(failed("a", value), limit=0.5, unit="values"))

    assert states(count(0.2), count(0.1)) == {"a": "worse"}
    assert states(count(0.2), count(0.3)) == {"a": "known"}


def test_a_warning_that_becomes_an_error_is_worse_and_not_the_reverse() -> None:
    warning, error = linted(failed("a", severity="warning")), linted(failed("a"))
    assert states(warning, error) == {"a": "worse"}
    assert states(error, warning) == {"a": "known"}
    assert states(linted(), linted(failed("a", severity="info"))) == {}


def test_only_what_is_new_or_worse_counts() -> None:
    before = scanned(failed("a"), failed("b"))
    for after, expected in (
        (scanned(failed("a"), failed("b", 0.1)), False),
        (scanned(failed("a")), False),
        (scanned(failed("a"), failed("c")), True),
        (scanned(failed("a", 0.9)), True),
    ):
        report = replace(after, baseline=compare(baseline_of(before), after, "b.json"))
        assert has_findings(report, RulesSpec()) is expected
        assert bool(failures(report)) is expected
        assert has_findings(after, RulesSpec())


def test_a_flagged_layer_that_no_rule_explains_is_known_too() -> None:
    layer = make_layer("a", flagged=True)
    report = report_of([layer])
    found = baseline_of(report)
    assert [(known.rule, known.interval is not None) for known in found.findings] == [("flagged", True)]
    assert states(report, report) == {"a": "known"}
    assert states(report, report_of([make_layer("a")])) == {"a": "fixed"}
    assert states(report, report_of([make_layer("b")])) == {"a": "stale"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 4}, "another batch size: 2, and this is 4"),
        ({"data": "other data"}, "another data: "),
        ({"model": "other.py:net"}, "another model: "),
    ],
)
def test_a_baseline_of_something_else_is_refused(change: dict[str, Any], said: str) -> None:
    before = scanned(failed("a"), batch_size=2)
    with pytest.raises(UsageError, match=f"The baseline b.json is of {said}"):
        compare(baseline_of(before), scanned(failed("a"), **{"batch_size": 2, **change}), "b.json")


def test_a_lint_is_not_compared_with_a_scan_nor_a_scan_that_ended_early() -> None:
    with pytest.raises(UsageError, match="another command: scan, and this is lint"):
        compare(baseline_of(scanned(failed("a"))), linted(failed("a")), "b.json")
    partial = scanned(failed("a"), partial=True, stopped="interrupted")
    with pytest.raises(UsageError, match=r"The scan ended early \(interrupted\)"):
        compare(baseline_of(partial), partial, "b.json")


@given(st.randoms(use_true_random=False))
def test_a_file_does_not_depend_on_the_order_of_the_verdicts(order: random.Random) -> None:
    verdicts = [failed(layer, rule=rule) for layer in ("a", "b", None) for rule in ("BN203", "BN101", "BN202")]
    shuffled = order.sample(verdicts, len(verdicts))
    assert dump(baseline_of(linted(*shuffled))) == dump(baseline_of(linted(*verdicts)))


def test_a_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = baseline_of(scanned(failed("a"), failed("b", None)))
    path = tmp_path / "b.json"
    path.write_text(dump(found), encoding="utf-8")
    assert read_as(path, Baseline) == found
    path.write_text(dump(scanned(failed("a"))), encoding="utf-8")
    with pytest.raises(UsageError, match="This is the report of a scan, not a baseline\\."):
        read_as(path, Baseline)


def test_every_format_tells_them_apart() -> None:
    before = scanned(failed("a"), failed("b"), failed("old"))
    after = scanned(failed("a"), failed("b", 0.9), failed("c"))
    report = replace(after, baseline=compare(baseline_of(before), after, "b.json"))
    counts = "Against the baseline b.json: 1 new, 1 worse, 1 known, 0 fixed, 1 stale"
    assert counts in render(report)
    assert counts in render(report, "markdown")
    assert counts in render(linted_with(report))
    results = json.loads(render(report, "sarif"))["runs"][0]["results"]
    kept = {each["locations"][0]["logicalLocations"][0]["name"]: each["baselineState"] for each in results}
    assert kept == {"a": "unchanged", "b": "updated", "c": "new"}
    assert render(report, "junit").count("<failure") == 2
    assert load_as(Report, dump(report)) == report
    assert '"baseline"' not in dump(after)


def linted_with(report: Report) -> LintReport:
    return replace(linted(), baseline=report.baseline)
