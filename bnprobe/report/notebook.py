"""Documents in Python: as text of this terminal, in one line, as a fragment of a page, and in files.

A fragment is for notebooks: without scripts and style sheets, in the colours of the notebook, light or dark.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from rich.text import Text

from bnprobe.errors import UsageError
from bnprobe.files import write_all
from bnprobe.numbers import count
from bnprobe.printable import escaped, escaped_lines
from bnprobe.records import (
    Comparison,
    Document,
    DriftReport,
    ExportReport,
    LabReport,
    LintReport,
    MonitorLog,
    Plan,
    Profile,
    RepairRecord,
    Report,
    SweepReport,
    TableReport,
    Verification,
)
from bnprobe.report import (
    FORMATS,
    RenderOptions,
    batch_effects,
    compare,
    drift,
    json,
    lab,
    lint,
    render,
    repair,
    scan,
    screen,
    sweep,
    verify,
    watch,
)
from bnprobe.report.diagnoses import closing, findings_in_words
from bnprobe.report.page import SEVERITY_SIGNS, as_call, can_show_signs

_Document = TypeVar("_Document", bound=Document)


def text(document: Document, verbose: bool, width: int | None) -> str:
    """The document as on the terminal, without colours.

    Args:
        document: What a command returned.
        verbose: The whole, not what fits a screen.
        width: Columns; None: those of the terminal.
    """
    columns = shutil.get_terminal_size().columns if width is None else width
    unicode = can_show_signs(getattr(sys.stdout, "encoding", None))
    options = RenderOptions(columns, show_all=verbose, verbose=verbose, unicode=unicode, command=_COMMAND, python=True)
    return render(document, "terminal", options).rstrip("\n")


_COMMAND = "bnprobe scan model.py"
"""What suggestions are variants of; as calls they name no file."""


def one_line(document: Document) -> str:
    """What the document is of, and its result."""
    return escaped(" ".join(_one_line(document).split()))


def _one_line(document: Document) -> str:
    match document:
        case Report():
            return f"{document.scan.model}, {scan.one_line(document)}"
        case SweepReport():
            return f"{document.scan.model}, {sweep.one_line(document)}"
        case LintReport():
            return lint.one_line(document)
        case Verification():
            return verify.one_line(document)
        case Comparison():
            return compare.one_line(document)
        case Profile():
            return f"{document.model}, {drift.one_line_of_profile(document)}"
        case DriftReport():
            return f"{document.model}, {drift.one_line(document)}"
        case MonitorLog():
            return f"{document.model or document.path}, {watch.one_line(document)}"
        case TableReport():
            return f"{document.data}, {batch_effects.one_line(document)}"
        case LabReport():
            return f"{document.experiment}, {lab.one_line(document)}"
        case Plan():
            refused = f", {len(document.refused)} refused" if document.refused else ""
            return f"{count(len(document.changes), 'layer')} to {document.to}{refused}"
        case ExportReport():
            written = "not written, the outputs differ" if document.output is None else document.output
            return f"{document.model} as {document.format}: {written}"
        case repair.RepairReport():
            return repair.title(document.record)
    return type(document).__name__


# --- Files ------------------------------------------------------------------------------------------------------------


def save(document: Document, path: str | PathLike[str], format_: str | None) -> None:
    """Write the document to a file; see ``Document.save``."""
    written = render(document, format_ or _format_of(Path(path)))
    write_all({Path(path): escaped_lines(written)}, force=True, option="path")


def _format_of(path: Path) -> str:
    """The format that the ending of a file says; without one it is JSON, which can be loaded.

    Raises:
        UsageError: No format has this ending.
    """
    by_ending = {ending: row.name for row in FORMATS for ending in (row.ending, f".{row.name}")}
    found = [ending for ending in by_ending if path.name.lower().endswith(ending)]
    if not found and path.suffix:
        raise UsageError(f'No format has the ending "{path.suffix}" ({", ".join(by_ending)}): give format=...')
    return by_ending[max(found, key=len)] if found else "json"


def load(path: str | PathLike[str], record: type[_Document]) -> _Document:
    """Read a document of one kind from its JSON.

    Raises:
        UsageError: The file cannot be read, or is no such document.
    """
    if issubclass(record, repair.RepairReport):
        return record(json.read_as(Path(path), RepairRecord))
    return json.read_as(Path(path), record)


# --- Fragments of a page ----------------------------------------------------------------------------------------------

_NUMBERS = "text-align: right; font-variant-numeric: tabular-nums"
_CODE = "white-space: pre; overflow-x: auto; font-size: 0.85em; line-height: 1.2"


def fragment(document: Document) -> str:
    """The document as HTML: a scan as on a screen, with the whole report to unfold; all else as its text."""
    parts = _scan(document) if isinstance(document, Report) else [_tag("p", _tag("b", _words(one_line(document))))]
    whole = _tag("pre", _words(text(document, verbose=True, width=100)), _CODE)
    return f"<div>{''.join(parts)}<details><summary>The whole report</summary>{whole}</details></div>"


def _scan(report: Report) -> Iterable[str]:
    end = closing(report, _COMMAND)
    said = " ".join([*end.sentences, *screen.effect_in_words(report)])
    yield _tag("p", f"{_tag('b', f'{end.sign} {_words(end.headline)}')}<br>{_words(said)}")
    rows, columns, _ = screen.worst_rows(report)
    if rows:
        yield _table([stage.name for stage in rows], columns)
    for finding in findings_in_words(report.diagnoses, report, show_all=False):
        title = f"{SEVERITY_SIGNS[finding.severity]} {finding.title}"
        remedy = f"{_tag('b', 'Remedy:')} {_words(finding.remedy)}" if finding.remedy else ""
        lines = [_tag("b", _words(title)), *map(_words, (finding.where, finding.message)), remedy]
        yield _tag("p", "<br>".join(line for line in [*lines, _words(finding.measured)] if line))
    for step in screen.next_steps(report, end.step, _COMMAND):
        call = "" if step.command is None else _tag("code", _words(as_call(step.command) or step.command))
        yield _tag("p", f"{_words(step.why)} {call}")


def _table(names: Sequence[str], columns: Sequence[Any]) -> str:
    heads = ["layer", *(" ".join(column.heading.split()) for column in columns)]
    cells = [[cell.plain if isinstance(cell, Text) else cell for cell in column.cells] for column in columns]
    styles = ["" if column.align == "left" else _NUMBERS for column in columns]
    lines = [
        _tag("th", _words(name), "text-align: left")
        + "".join(_tag("td", _words(cell), style) for cell, style in zip(row, styles, strict=True))
        for name, row in zip(names, zip(*cells, strict=True), strict=True)
    ]
    head = "".join(_tag("th", _words(text)) for text in heads)
    return _tag("table", _tag("thead", _tag("tr", head)) + _tag("tbody", "".join(_tag("tr", line) for line in lines)))


def _tag(name: str, content: str, style: str = "") -> str:
    """An element; the content is HTML already."""
    opening = f'{name} style="{style}"' if style else name
    return f"<{opening}>{content}</{name}>"


def _words(text: str) -> str:
    """Text as HTML, whatever is in it."""
    return escape(escaped(text, kept="\n"))
