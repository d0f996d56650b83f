"""What ``bnprobe lint`` prints: findings about the model alone, one line each, like any linter's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

from rich.text import Text

from bnprobe.records import SCHEMA_VERSION, Diagnosis, Severity, SkippedLayer, Tool, Verdict
from bnprobe.reports.figures import count
from bnprobe.reports.glyphs import clean
from bnprobe.reports.interface import RenderOptions
from bnprobe.reports.layout import to_string

MOST_LAYERS = 8
"""So many layers of one finding are listed, unless all are asked for."""

_STYLES: Mapping[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True)
class LintReport:
    """The result of a lint.

    Attributes:
        model: How the model was named, e.g. "model.py:load_model".
        layers: Layers judged.
        verdicts: Of the rules that need the model alone.
        diagnoses: The failed ones joined, the worst first.
        skipped: Layers that could not be judged.
    """

    tool: Tool
    model: str
    layers: int
    verdicts: tuple[Verdict, ...]
    diagnoses: tuple[Diagnosis, ...]
    skipped: tuple[SkippedLayer, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def has_findings(self) -> bool:
        """Whether a rule failed by more than a piece of information."""
        return any(verdict.outcome == "failed" and verdict.severity != "info" for verdict in self.verdicts)


def render_json(report: LintReport, options: RenderOptions) -> str:
    """The report as JSON, with the same verdicts and diagnoses as a scan's."""
    content = asdict(report)
    document = {"schema_version": content.pop("schema_version"), **content}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def render_terminal(report: LintReport, options: RenderOptions) -> str:
    """One block for each finding: where, which rule, what is wrong, what to do; and a line that counts them."""
    lines = [line for diagnosis in report.diagnoses for line in _finding(diagnosis, report, options)]
    lines += [_plain(f"not judged: {layer.name} ({layer.kind}): {layer.reason}", options) for layer in report.skipped]
    return to_string([*lines, _plain(f"{summary(report)}.", options)], options.color)


def summary(report: LintReport) -> str:
    """The counts, e.g. "2 errors and 1 warning in 5 layers of model.py:load_model (7 rules)"."""
    found = {severity: _number(report, severity) for severity in _STYLES}
    words = {"error": "error", "warning": "warning", "info": "remark"}
    parts = [count(number, words[severity]) for severity, number in found.items() if number]
    rules = len({verdict.rule for verdict in report.verdicts})
    where = f"in {count(report.layers, 'layer')} of {report.model}"
    return f"{' and '.join(parts) or 'Nothing found'} {where} ({count(rules, 'rule')})"


FORMATS: Mapping[str, Callable[[LintReport, RenderOptions], str]] = {
    "terminal": render_terminal,
    "json": render_json,
}


def _number(report: LintReport, severity: Severity) -> int:
    return sum(diagnosis.severity == severity for diagnosis in report.diagnoses)


def _finding(diagnosis: Diagnosis, report: LintReport, options: RenderOptions) -> Iterator[Text]:
    own = [verdict for verdict in report.verdicts if verdict.rule == diagnosis.rule and verdict.outcome == "failed"]
    own = [verdict for verdict in own if not diagnosis.layers or verdict.layer in diagnosis.layers]
    head = Text(_place(own[0].location, report) + " ")
    head += Text(f"{diagnosis.rule} {diagnosis.severity}", _STYLES[diagnosis.severity])
    yield head + _plain(f" {diagnosis.message}", options)
    if len(own) > 1:
        shown = own if options.show_all else own[:MOST_LAYERS]
        yield from (_plain(f"    {_place(verdict.location, report)} {verdict.layer}", options) for verdict in shown)
        if len(shown) < len(own):
            yield Text(f"    and {len(own) - len(shown)} more (--all lists them)", "dim")
    yield from (_plain(f"    hence: {consequence}", options) for consequence in diagnosis.consequences)
    yield _plain(f"    fix: {diagnosis.remedy}", options)


def _place(location: str | None, report: LintReport) -> str:
    """File and line; the model's own name where the line is not known."""
    return f"{location or report.model}:"


def _plain(text: str, options: RenderOptions) -> Text:
    indent = len(text) - len(text.lstrip())
    return Text(" " * indent + clean(text.lstrip(), options.unicode))
