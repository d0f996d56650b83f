"""The end of the terminal report: what is wrong, and what to do first."""

from __future__ import annotations

from rich.text import Text

from bnprobe.records import Report
from bnprobe.reports.causes import SEVERITY_STYLES, SIGNS
from bnprobe.reports.command import broken
from bnprobe.reports.findings import findings, rules
from bnprobe.reports.layout import Page
from bnprobe.reports.nextstep import Step
from bnprobe.reports.standing import STYLES
from bnprobe.reports.verdict import verdict

_STYLES = {SIGNS[severity]: style for severity, style in SEVERITY_STYLES.items()} | STYLES


def closing(report: Report, page: Page, command: str, show_all: bool) -> list[Text]:
    """The verdict, the diagnoses, the rules that found nothing, and the next command."""
    end = verdict(report, command)
    lines = page.paragraph(end.headline, style="bold", first=f"{page.clean(end.sign)} ")
    for line in lines:
        line.stylize(_STYLES[end.sign], 0, 1)
    for sentence in end.sentences:
        lines += page.paragraph(sentence, first="  ")
    lines += findings(report, page, show_all)
    lines += rules(report.verdicts, page, show_all)
    return lines + _next(end.step, page)


def _next(step: Step, page: Page) -> list[Text]:
    lines = page.paragraph(step.why, first="  ")
    if step.command is not None:
        parts = [page.clean(part) for part in broken(step.command, page.width - 6)]
        indents = ["    "] + ["      "] * (len(parts) - 1)
        lines += [Text(indent + part, "bold") for indent, part in zip(indents, parts, strict=True)]
    return lines
