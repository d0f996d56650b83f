"""An effect whose cause was not found: the judgement and what a report makes of it."""

from __future__ import annotations

from dataclasses import replace

from fabricated_reports import healthy

from bnprobe.analysis.diagnosis import diagnose, has_findings, judge
from bnprobe.config.spec import RulesSpec
from bnprobe.report import render
from bnprobe.testing import make_evidence, make_layer, make_shares
from unit.rules.effects import loss, metric, tried


def test_a_report_tells_an_effect_whose_cause_was_not_found() -> None:
    fine, stale = make_layer("bn"), make_layer("bn", make_shares(lag=0.6))
    for layer, gap, is_unexplained in (
        (fine, metric(0.9, 0.8), True),
        (fine, metric(0.9, 0.9), False),
        (stale, metric(0.9, 0.8), False),
    ):
        facts = make_evidence(layer, gaps=(gap,), remedies=(tried(0.8, 0.8),))
        verdicts = judge(facts, RulesSpec())
        report = replace(healthy(), verdicts=verdicts, diagnoses=diagnose(verdicts, facts))
        assert (report.unexplained is not None) == is_unexplained
        if report.unexplained is not None:
            assert "No cause was found. Ruled out: stale statistics (recalibrated" in report.unexplained.message
            assert has_findings(report, RulesSpec())
            assert "✓ Every layer" not in render(report)


def test_an_effect_that_is_too_little_for_a_finding_is_not_clean() -> None:
    for gap, samples, clean in (
        (metric(0.9, 0.8), 8, False),
        (metric(0.9, 0.9), 8, True),
        (loss(1.0, 1.04), 256, False),
    ):
        gap = replace(gap, samples=samples)
        facts = make_evidence(make_layer("bn"), gaps=(gap,))
        verdicts, known = judge(facts, RulesSpec()), healthy()
        summary = replace(known.summary, gaps=(gap,), chance=())
        report = replace(known, summary=summary, verdicts=verdicts, diagnoses=diagnose(verdicts, facts))
        assert report.diagnoses == ()
        text = " ".join(render(report).split())
        assert ("✓ Every layer" in text) == clean
        assert ("No layer is flagged, but the" in text) != clean
