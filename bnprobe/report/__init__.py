"""Reports: the table of formats, each a pure function from the result of a command to text.

A format is one row of `FORMATS`: its name, and one function for each document that it supports. Another package adds
one through the entry-point group ``bnprobe.formats``; see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bnprobe.errors import UsageError
from bnprobe.records import ExportReport, LintReport, Plan, Report, SweepReport, Verification
from bnprobe.registry import Registry
from bnprobe.report import export, json, lint, plan, repair, screen, sweep, verify
from bnprobe.report.page import RenderOptions
from bnprobe.report.repair import RepairReport

Renderer = Callable[[Any, RenderOptions], str]
"""A pure function from a document to text that ends with a newline."""


DOCUMENTS: Mapping[type, str] = {
    Report: "the report of a scan",
    LintReport: "the report of a lint",
    SweepReport: "the report of a sweep",
    Plan: "the plan of a conversion",
    RepairReport: "the record of a repair",
    Verification: "the report of a verification",
    ExportReport: "the report of an export",
}
"""What there is to render, and what messages call it."""


@dataclass(frozen=True)
class Format:
    """A report format.

    Attributes:
        name: As in ``--format``.
        renderers: The function for each type of document that it supports, of `DOCUMENTS`.
    """

    name: str
    renderers: Mapping[type, Renderer]


def _json(document: Any, options: RenderOptions) -> str:
    return json.dump(document, ascii_only=not options.unicode)


FORMATS: Registry[Format] = Registry(
    "bnprobe.formats",
    [
        Format(
            "terminal",
            {
                Report: screen.render,
                LintReport: lint.render,
                SweepReport: sweep.render,
                Plan: plan.render,
                RepairReport: repair.render,
                Verification: verify.render,
                ExportReport: export.render,
            },
        ),
        Format(
            "json",
            {
                **dict.fromkeys(DOCUMENTS, _json),
                RepairReport: repair.render_json,
                ExportReport: export.render_json,
            },
        ),
    ],
    name_of=lambda row: row.name,
    noun="report format",
)
"""The table of formats."""


def renderer(format_: str, document: type) -> Renderer:
    """The function that renders documents of a type in a format; commands ask for it before they measure anything.

    Raises:
        UsageError: There is no such format, or it does not support the document; says which formats do.
    """
    found = FORMATS[format_].renderers.get(document)
    if found is None:
        able = [row.name for row in FORMATS if document in row.renderers]
        raise UsageError(
            f"--format {format_} does not support {DOCUMENTS.get(document, document.__name__)};"
            f" these formats do: {', '.join(able) or 'none'}."
        )
    return found


def render(document: object, format_: str = "terminal", options: RenderOptions | None = None) -> str:
    """A document as text.

    Args:
        document: What a command returned, e.g. a ``bnprobe.Report``.
        format_: Name of a format.
        options: How it is to be written.

    Raises:
        UsageError: There is no such format, or it does not support the document.
    """
    return renderer(format_, type(document))(document, options or RenderOptions())


__all__ = ["DOCUMENTS", "FORMATS", "Format", "RenderOptions", "Renderer", "render", "renderer"]
