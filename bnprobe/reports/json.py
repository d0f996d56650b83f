"""The JSON report: the records as they are, and back.

``render`` and ``load`` are inverses; the format is described by ``report.schema.json``.
"""

from __future__ import annotations

from bnprobe.records import Report
from bnprobe.reports.documents import DocumentKind, dump
from bnprobe.reports.interface import RenderOptions

_REPORT = DocumentKind(Report, "JSON report", "Scan again")


def render(report: Report, options: RenderOptions | None = None) -> str:
    """The report as JSON: two spaces of indent, keys in the order of the records, a newline at the end.

    Raises:
        ValueError: If a figure is NaN or infinite, which the records do not allow.
    """
    return dump(report)


def load(text: str) -> Report:
    """Read a JSON report back.

    Raises:
        UsageError: If the text is no JSON report of this schema version; only fields with a default may be missing.
    """
    return _REPORT.load(text)
