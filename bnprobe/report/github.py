"""Annotations of GitHub Actions: workflow commands, which a job prints on stdout.

GitHub shows ten annotations of a kind for each step, and drops the rest without a word. So there are at most ten lines:
root causes alone, worst first, one for each line of the user's code, without those that a baseline knows; and if there
are more, the last one counts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bnprobe.numbers import count
from bnprobe.records import LintReport, Report, Severity, Verdict, Verification
from bnprobe.report import lint, scan, verify
from bnprobe.report.findings import Place, counted, place_of, text_of, title_of_finding
from bnprobe.report.page import RenderOptions, clean
from bnprobe.rules.findings import SEVERITIES, UNEXPLAINED, findings

MOST_ANNOTATIONS = 10
"""Of every kind GitHub shows so many for each step of a job."""

LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "notice"}


@dataclass(frozen=True)
class _Annotation:
    severity: Severity
    title: str
    message: str
    place: Place | None = None


def render_scan(report: Report, options: RenderOptions) -> str:
    """The root causes of a scan."""
    return _lines(list(_annotations(report, options.folder)), scan.one_line(report))


def render_lint(report: LintReport, options: RenderOptions) -> str:
    """The root causes of a lint."""
    return _lines(list(_annotations(report, options.folder)), lint.one_line(report))


def render_verify(found: Verification, options: RenderOptions) -> str:
    """Why a repair does not hold."""
    problems = [_Annotation("error", "bnprobe verify", problem) for problem in found.problems]
    return _lines(problems, verify.one_line(found))


def _annotations(report: Report | LintReport, folder: str) -> Iterator[_Annotation]:
    """One for each root cause and line of code, the worst layer's."""
    roots = {(cause.rule, layer) for cause in report.diagnoses for layer in (cause.layers or (None,))}
    groups: dict[tuple[str, Place | None], list[Verdict]] = {}
    known = set() if report.baseline is None else {(each.rule, each.layer) for each in report.baseline.of("known")}
    for finding in findings(report):
        key = (finding.rule, finding.layer)
        if key not in known and (key in roots or finding.rule == UNEXPLAINED):
            groups.setdefault((finding.rule, place_of(finding, report, folder)), []).append(finding)
    for (_, place), (worst, *others) in groups.items():
        more = f" ({count(len(others), 'more layer')} of this line)" if others else ""
        yield _Annotation(worst.severity, title_of_finding(worst), text_of(worst) + more, place)


def _lines(annotations: Sequence[_Annotation], result: str) -> str:
    shown = list(annotations)
    if len(shown) > MOST_ANNOTATIONS:
        left = shown[MOST_ANNOTATIONS - 1 :]
        parts = counted(each.severity for each in left)
        worst = min((each.severity for each in left), key=SEVERITIES.index)
        summary = f"{' and '.join(parts)} more; the report lists them. {result}."
        shown = [*shown[: MOST_ANNOTATIONS - 1], _Annotation(worst, "bnprobe", summary)]
    shown = shown or [_Annotation("info", "bnprobe", f"{result}.")]
    return "".join(f"{_command(each)}\n" for each in shown)


def _command(annotation: _Annotation) -> str:
    """One workflow command, escaped by GitHub's rules, so that no name or message can end it or begin another."""
    properties = {"title": annotation.title}
    if annotation.place is not None:
        properties = {"file": annotation.place.file, "line": str(annotation.place.line), **properties}
    named = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::{LEVELS[annotation.severity]} {named}::{_data(annotation.message)}"


def _data(text: str) -> str:
    return clean(text, unicode=True).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
