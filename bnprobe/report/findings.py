"""Findings as the formats for programs list them: the place in the user's code, a title, and all that is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

from bnprobe.numbers import count
from bnprobe.records import LintReport, Report, Severity, Verdict
from bnprobe.report.page import clean
from bnprobe.rules import title_of
from bnprobe.rules.findings import UNEXPLAINED

MODEL = "the model"
"""What stands for the layer in a finding about the whole model."""


_WORDS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "remark"}


def counted(severities: Iterable[Severity]) -> list[str]:
    """How many findings there are of each severity, worst first, e.g. ["2 errors", "1 remark"]."""
    found = Counter(severities)
    return [count(found[severity], word) for severity, word in _WORDS.items() if found[severity]]


@dataclass(frozen=True)
class Place:
    """A line of a file, as seen from the root of the repository where that is known."""

    file: str
    line: int


def model_of(report: Report | LintReport) -> str:
    """How the model was named, e.g. "model.py:load_model"."""
    return report.model if isinstance(report, LintReport) else report.scan.model


def place_of(finding: Verdict, report: Report | LintReport, folder: str = "") -> Place | None:
    """Where the layer is built, else the file of the model; None where the model is no file.

    Args:
        finding: Of the report.
        report: Holds files as seen from the folder in which the command was started.
        folder: That folder, as seen from the root of the repository; empty: it is the root.
    """
    file, _, line = (finding.location or "").rpartition(":")
    if file and line.isdecimal():
        return Place(_seen(file, folder), max(int(line), 1))
    file = model_of(report).rpartition(":")[0] or model_of(report)
    return Place(_seen(file, folder), 1) if file.endswith(".py") else None


def _seen(file: str, folder: str) -> str:
    return (PurePath(folder) / file).as_posix()


def title_of_finding(finding: Verdict) -> str:
    """The rule's code and title, e.g. "BN201: small batch"."""
    if finding.rule == UNEXPLAINED:
        return "flagged, and no rule says why"
    return f"{finding.rule}: {title_of(finding.rule, finding.cause)}"


def text_of(finding: Verdict) -> str:
    """The layer, what was found, and what to do, on one line without what a terminal would obey."""
    said = " ".join(filter(None, (finding.message, finding.remedy)))
    return clean(f"{finding.layer or MODEL}: {said}", unicode=True)
