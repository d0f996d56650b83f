"""JUnit XML, which every CI server reads: a test case for each verdict, or for each layer of a verification.

A case fails if its finding makes the command exit with 1; it is skipped, with the reason, where the rule could not
judge. Warnings and remarks that count for nothing are printed by a case that passes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bnprobe.records import LayerComparison, LintReport, Report, Verdict, Verification
from bnprobe.report import verify
from bnprobe.report.findings import MODEL, model_of, text_of, title_of_finding
from bnprobe.report.page import ARROW, RenderOptions, clean
from bnprobe.rules.findings import UNEXPLAINED, failures, findings

if TYPE_CHECKING:
    from junitparser import TestCase


def render(report: Report | LintReport, options: RenderOptions) -> str:
    """The verdicts of a scan or a lint, and a failed case for each flagged layer that no rule explains."""
    verdicts = [*report.verdicts, *(found for found in findings(report) if found.rule == UNEXPLAINED)]
    scan = None if isinstance(report, LintReport) else report.scan
    facts = {"model": model_of(report), "version": report.tool.version}
    if scan is not None:
        facts |= {"data": scan.data, "batch_size": str(scan.batch_size), "seed": str(scan.seed)}
    name = f"bnprobe {'lint' if scan is None else 'scan'} {model_of(report)}"
    failing = {(found.rule, found.layer) for found in failures(report)}
    cases = [_case(verdict, (verdict.rule, verdict.layer) in failing) for verdict in verdicts]
    return _document(name, cases, facts, options, seconds=0.0 if scan is None else scan.seconds)


def render_verify(found: Verification, options: RenderOptions) -> str:
    """A case for each layer, and one for the outputs and all else."""
    cases = [_layer_case(layer) for layer in found.layers]
    whole = _named("the repair holds", "verify")
    if not found.passed:
        _fail(whole, verify.one_line(found), "verify", "\n".join(found.problems))
    return _document("bnprobe verify", [*cases, whole], {}, options)


def _case(verdict: Verdict, counts: bool) -> TestCase:
    from junitparser import Skipped

    case = _named(f"{verdict.layer or MODEL} ({title_of_finding(verdict)})", verdict.rule)
    if verdict.outcome == "skipped":
        case.result = [Skipped(_safe(verdict.reason or verdict.message))]
    elif verdict.outcome == "failed" and counts:
        where = f"{verdict.location}: " if verdict.location else ""
        _fail(case, verdict.message, verdict.cause, f"{where}{text_of(verdict)}")
    elif verdict.outcome == "failed":
        case.system_out = _safe(f"{verdict.severity}: {text_of(verdict)}")
    return case


def _layer_case(layer: LayerComparison) -> TestCase:
    from junitparser import Skipped

    case = _named(layer.name, "verify")
    change = f"D {f' {ARROW} '.join(verify.mismatches_of(layer))}"
    if layer.flagged_after:
        _fail(case, f"{'still' if layer.flagged_before else 'newly'} flagged: {change}", "flagged", "")
    elif layer.lost:
        _fail(case, "flagged before, and not measured again", "lost", "")
    elif layer.undecided_after:
        case.result = [Skipped(f"undecided: {change}")]
    elif layer.after is None:
        case.result = [Skipped("not measured")]
    else:
        case.system_out = change
    return case


def _named(name: str, group: str) -> TestCase:
    from junitparser import TestCase

    # CI servers take what stands before the last dot for the package.
    return TestCase(_safe(name), classname=f"bnprobe.{_safe(group)}")


def _fail(case: TestCase, message: str, kind: str, text: str) -> None:
    from junitparser import Failure

    failure = Failure(_safe(message), _safe(kind))
    failure.text = "\n".join(map(_safe, text.split("\n")))
    case.result = [failure]


def _safe(text: str) -> str:
    """Text without the characters that XML 1.0 cannot hold: they are shown as escapes."""
    return clean(text, unicode=True)


def _document(
    name: str, cases: Iterable[TestCase], facts: dict[str, str], options: RenderOptions, seconds: float = 0.0
) -> str:
    from junitparser import JUnitXml, TestSuite

    suite: Any = TestSuite(_safe(name))
    for fact, value in facts.items():
        suite.add_property(fact, _safe(value))
    suite.add_testcases(cases)
    suite.time = seconds
    document: Any = JUnitXml("bnprobe")
    document.add_testsuite(suite)
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n{document.tostring().decode()}\n'
    return text if options.unicode else text.encode("ascii", "xmlcharrefreplace").decode()
