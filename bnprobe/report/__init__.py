"""Reports: the table of formats, each a pure function from the result of a command to text.

A format is one row of `FORMATS`: its name, and one function for each document that it supports. Another package adds
one through the entry-point group ``bnprobe.formats``; see docs/extending.md.

Functions and documents are named here, and imported when they are called for: a command needs one or two of forty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bnprobe.errors import UsageError
from bnprobe.registry import Registry, load_code, require
from bnprobe.report.page import RenderOptions

Renderer = Callable[[Any, RenderOptions], str]
"""A pure function from a document to text that ends with a newline."""


DOCUMENTS: Mapping[str, str] = {
    "Report": "the report of a scan",
    "LintReport": "the report of a lint",
    "SweepReport": "the report of a sweep",
    "Plan": "the plan of a conversion",
    "RepairReport": "the record of a repair",
    "Verification": "the report of a verification",
    "ExportReport": "the report of an export",
    "Comparison": "the comparison of scans",
    "Profile": "a profile",
    "DriftReport": "the report of drift",
    "MonitorLog": "the log of a monitor",
    "TableReport": "the report of a table",
    "LabReport": "the results of an experiment",
}
"""What there is to render, by the name of its type, and what messages call it."""

OF_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "scan": ("Report",),
    "lint": ("LintReport",),
    "sweep": ("SweepReport",),
    "convert": ("Plan", "RepairReport"),
    "recalibrate": ("RepairReport",),
    "verify": ("Verification",),
    "export": ("ExportReport",),
    "compare": ("Comparison",),
    "drift": ("DriftReport",),
    "table": ("TableReport",),
}
"""What the commands give to render; ``bnprobe show`` renders all."""


@dataclass(frozen=True)
class Format:
    """A report format.

    Attributes:
        name: As in ``--format``.
        renderers: The function for each type of document that it supports, of `DOCUMENTS`; or, by the name of the type,
            where the function is, as ``"package.module:FUNCTION"``.
        package: What must be installed for it, as it is imported; empty: nothing beyond bnprobe.
        extra: The extra of bnprobe that installs the package.
        opens: What opens its files, e.g. "a browser"; empty: they are text, which a terminal shows.
        suffix: How the names of its files end where they are not named; empty: in a dot and the format's name.
    """

    name: str
    renderers: Mapping[type, Renderer] | Mapping[str, str]
    package: str = ""
    extra: str = ""
    opens: str = ""
    suffix: str = ""

    @property
    def ending(self) -> str:
        """How the names of its files end."""
        return self.suffix or f".{self.name}"

    @cached_property
    def documents(self) -> Mapping[str, Renderer | str]:
        """What renders each document that it supports, by the name of its type."""
        return {kind if isinstance(kind, str) else kind.__name__: each for kind, each in self.renderers.items()}

    def renderer(self, document: str) -> Renderer:
        """Its function for the documents of a type that it supports.

        Raises:
            UsageError: The function cannot be loaded.
        """
        found: Any = self.documents[document]
        if isinstance(found, str):
            found = load_code(
                found, f'What renders {DOCUMENTS.get(document, document)} as "{self.name}"', UsageError, call=False
            )
        renderer: Renderer = found
        return renderer


def _own(**functions: str) -> dict[str, str]:
    """Functions of this package for documents."""
    return {document: f"{__name__}.{function}" for document, function in functions.items()}


FORMATS: Registry[Format] = Registry(
    "bnprobe.formats",
    [
        Format(
            "terminal",
            _own(
                Report="screen:render",
                LintReport="lint:render",
                SweepReport="sweep:render",
                Plan="plan:render",
                RepairReport="repair:render",
                Verification="verify:render",
                ExportReport="export:render",
                Comparison="compare:render",
                Profile="drift:render_profile",
                DriftReport="drift:render",
                MonitorLog="watch:render",
                TableReport="batch_effects:render",
                LabReport="lab:render",
            ),
            suffix=".txt",
        ),
        Format(
            "json",
            _own(
                **dict.fromkeys(DOCUMENTS, "json:render")
                | {
                    "RepairReport": "repair:render_json",
                    "ExportReport": "export:render_json",
                    "MonitorLog": "watch:render_json",
                }
            ),
        ),
        Format(
            "html",
            _own(
                Report="html:render_scan",
                SweepReport="html:render_sweep",
                RepairReport="html:render_repair",
                Verification="html:render_verification",
                MonitorLog="html:render_log",
                TableReport="html:render_table",
                LabReport="html:render_lab",
            ),
            package="vl_convert",
            extra="html",
            opens="a browser",
        ),
        Format(
            "junit",
            _own(Report="junit:render", LintReport="junit:render", Verification="junit:render_verify"),
            suffix=".junit.xml",
            package="junitparser",
            extra="ci",
        ),
        Format("sarif", _own(Report="sarif:render", LintReport="sarif:render")),
        Format(
            "github",
            _own(Report="github:render_scan", LintReport="github:render_lint", Verification="github:render_verify"),
            suffix=".github.txt",
        ),
        Format(
            "markdown",
            _own(
                Report="markdown:render_scan",
                LintReport="markdown:render_lint",
                Verification="markdown:render_verify",
                Comparison="markdown:render_compare",
                TableReport="markdown:render_table",
                LabReport="lab:render_markdown",
            ),
            suffix=".md",
        ),
        Format(
            "csv",
            _own(
                Report="csv:render_layers",
                SweepReport="csv:render_layers",
                Verification="csv:render_layers",
                Comparison="csv:render_compare",
                TableReport="csv:render_table",
            ),
        ),
    ],
    name_of=lambda row: row.name,
    noun="report format",
)
"""The table of formats."""


def formats_of(command: str) -> list[str]:
    """Names of the formats that support a document of a command."""
    documents = set(OF_COMMANDS.get(command, DOCUMENTS))
    return [row.name for row in FORMATS if not documents.isdisjoint(row.documents)]


def renderer(format_: str, document: type) -> Renderer:
    """The function that renders documents of a type in a format; commands ask for it before they measure anything.

    Raises:
        UsageError: There is no such format, or it does not support the document; says which formats do. Or a package
            that it needs is not installed.
    """
    row, name = FORMATS[format_], document.__name__
    if name not in row.documents:
        able = [row.name for row in FORMATS if name in row.documents]
        raise UsageError(
            f"--format {format_} does not support {DOCUMENTS.get(name, name)};"
            f" these formats do: {', '.join(able) or 'none'}."
        )
    if row.package:
        require(row.package, row.extra, f"--format {format_}")
    return row.renderer(name)


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


__all__ = ["DOCUMENTS", "FORMATS", "Format", "RenderOptions", "Renderer", "formats_of", "render", "renderer"]
