"""The report of ``bnprobe lint``: findings about the model alone, a block for each, like any linter's."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from bnprobe.numbers import count
from bnprobe.records import Diagnosis, LintReport
from bnprobe.report import baseline
from bnprobe.report.diagnoses import consequences
from bnprobe.report.findings import counted
from bnprobe.report.page import SEVERITY_STYLES, Page, RenderOptions, clean, to_string

MOST_LAYERS = 8
"""So many layers of one finding are listed, unless all are asked for."""


def render(report: LintReport, options: RenderOptions) -> str:
    """One block for each finding: where, which rule, what is wrong, what to do; notes; and a line that counts them.

    Lines are not wrapped: editors and CI read them.
    """
    lines = [line for diagnosis in report.diagnoses for line in _finding(diagnosis, report, options)]
    lines += [_plain(f"note: {note}", options) for note in report.notes]
    lines += [_plain(f"not judged: {layer.name} ({layer.kind}): {layer.reason}", options) for layer in report.skipped]
    if report.baseline is not None:
        lines += [_plain(text, options) for text in baseline.lines(report.baseline, options.show_all)]
    return to_string([[*lines, _plain(f"{one_line(report)}.", options)]], options.color)


def one_line(report: LintReport) -> str:
    """The counts, e.g. "2 errors and 1 warning in 5 layers of model.py:load_model (7 rules)"."""
    parts = counted(diagnosis.severity for diagnosis in report.diagnoses)
    rules = len({verdict.rule for verdict in report.verdicts})
    where = f"in {count(report.layers, 'layer')} of {report.model}"
    return f"{' and '.join(parts) or 'Nothing found'} {where} ({count(rules, 'rule')})"


def _finding(diagnosis: Diagnosis, report: LintReport, options: RenderOptions) -> Iterator[Text]:
    own = [verdict for verdict in report.verdicts if verdict.rule == diagnosis.rule and verdict.outcome == "failed"]
    own = [verdict for verdict in own if not diagnosis.layers or verdict.layer in diagnosis.layers]
    head = _plain(_place(own[0].location, report), options) + " "
    head += Text(f"{diagnosis.rule} {diagnosis.severity}", SEVERITY_STYLES[diagnosis.severity])
    yield head + _plain(f" {diagnosis.message}", options)
    if len(own) > 1:
        shown = own if options.show_all else own[:MOST_LAYERS]
        yield from (_plain(f"    {_place(verdict.location, report)} {verdict.layer}", options) for verdict in shown)
        if len(shown) < len(own):
            yield Text(f"    and {len(own) - len(shown)} more ({Page.of(options).every} lists them)", "dim")
    if explained := consequences(diagnosis):
        yield _plain(f"    also explains: {explained}", options)
    yield _plain(f"    fix: {diagnosis.remedy}", options)


def _place(location: str | None, report: LintReport) -> str:
    """File and line; the model's own name where the line is not known."""
    return f"{location or report.model}:"


def _plain(text: str, options: RenderOptions) -> Text:
    indent = len(text) - len(text.lstrip())
    return Text(" " * indent + clean(text.lstrip(), options.unicode))
