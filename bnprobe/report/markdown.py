"""Markdown as GitHub and GitLab show it: for the summary of a job, or a comment on a pull request.

First the verdict, what to do and the worst layers; all else is folded. Names, messages and paths are whatever the
user's code holds: in prose every character that Markdown would obey is escaped, and names stand in code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bnprobe.numbers import IN_MODE, count
from bnprobe.records import (
    BaselineComparison,
    Comparison,
    Diagnosis,
    Layer,
    LintReport,
    Report,
    SkippedLayer,
    TableReport,
    Verification,
)
from bnprobe.report import baseline, batch_effects, compare, figures, lint, verify
from bnprobe.report.charts import mostly
from bnprobe.report.diagnoses import closing
from bnprobe.report.layers import sign_of, worse_path, worst_first
from bnprobe.report.page import ARROW, FINE, FLAGGED, SEVERITY_SIGNS, RenderOptions, clean, worst_sign
from bnprobe.rules import title_of

MOST_LAYERS = 10
"""So many layers are shown at once, the worst."""

MOST_FOLDED = 200
"""So many are in the table that can be unfolded, unless all are asked for: a comment may have 65,536 characters."""

_OBEYED = re.compile(r"[\\`*_{}\[\]<>#!|~&$]|(?<=\b[wW]{3})\.|:(?=\S)")
_LINKED = re.compile(r"[@#](?=\w)")


def render_scan(report: Report, options: RenderOptions) -> str:
    """The verdict of a scan, its diagnoses, the worst layers and, folded, all layers and how it was measured."""
    end = closing(report, options.command)
    worst = worst_first(report.layers)[:MOST_LAYERS]
    parts = [
        f"### bnprobe: {end.sign} {prose(end.headline)}",
        _scanned(report),
        *map(prose, end.sentences),
        _against(report.baseline),
        *_diagnoses(report.diagnoses),
        f"{prose(end.step.why)}\n\n{_block(end.step.command)}" if end.step.command else "",
        _layers(worst),
        "" if len(worst) == len(report.layers) else _folded("All layers", _layers(_kept(report.layers, options))),
        _folded("How it was measured", _measured(report)),
        _skipped(report.skipped),
    ]
    return _document(parts)


def render_lint(report: LintReport, options: RenderOptions) -> str:
    """The findings of a lint."""
    sign = worst_sign(diagnosis.severity for diagnosis in report.diagnoses)
    parts = [
        f"### bnprobe lint: {sign} {prose(lint.one_line(report))}",
        _against(report.baseline),
        *_diagnoses(report.diagnoses),
        _folded("Notes", _listed(report.notes)),
        _skipped(report.skipped),
    ]
    return _document(parts)


def render_verify(found: Verification, options: RenderOptions) -> str:
    """Whether a repair holds, and every layer before and after."""
    rows = [
        (
            verify.sign_after(layer),
            code(layer.name),
            f" {ARROW} ".join(verify.mismatches_of(layer)),
        )
        for layer in found.layers
    ]
    layers = table(("", "layer", "D"), rows[: None if options.show_all else MOST_FOLDED])
    parts = [
        f"### bnprobe verify: {FINE if found.passed else FLAGGED} {prose(verify.one_line(found))}",
        _listed(found.problems),
        _folded(count(len(found.layers), "layer"), layers),
        _folded("Notes", _listed(found.notes)),
    ]
    return _document(parts)


def render_compare(found: Comparison, options: RenderOptions) -> str:
    """The scans, and the layers that changed most."""
    columns = compare.scan_rows(found)
    scans = [(code(scan.name), *cells) for scan, *cells in zip(found.scans, *columns.values(), strict=True)]
    shown = compare.most_changed(found, options.show_all)
    layers = [(code(name), *rest) for name, *rest in compare.rows(shown)]
    parts = [
        f"### bnprobe compare: {compare.sign(found)} {prose(compare.one_line(found))}",
        table(("scan", *columns), [(name, *map(prose, cells)) for name, *cells in scans]),
        table(("layer", "D, first", "D, last", "change", ""), layers),
        _folded("Notes", _listed(found.notes)),
    ]
    return _document(parts)


def render_table(found: TableReport, options: RenderOptions) -> str:
    """Which batches are off, and the features that differ most."""
    batches = batch_effects.batch_rows(found)
    features = batch_effects.feature_rows(batch_effects.farthest_features(found, options.show_all))
    shown = [(sign, code(name), *map(prose, cells)) for sign, name, *cells in batches]
    differing = [(code(name), *map(prose, cells)) for name, *cells in features]
    parts = [
        f"### bnprobe table: {batch_effects.sign(found)} {prose(batch_effects.one_line(found))}",
        *map(prose, batch_effects.sentences(found)),
        table(("", code(found.batch), *batch_effects.BATCH_HEADINGS), shown),
        table(("feature", *batch_effects.FEATURE_HEADINGS), differing),
        _listed(batch_effects.adjusted(found)),
        _folded("Features not judged", _listed(batch_effects.skipped(found, options.show_all))),
        _folded("Notes", _listed(found.notes)),
    ]
    return _document(parts)


def prose(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no link, no mention of a user or an issue."""
    escaped = _OBEYED.sub(r"\\\g<0>", clean(text, unicode=True))
    return _LINKED.sub(r"\g<0><!-- -->", escaped)


def code(text: str) -> str:
    """Text in code, in a table or a sentence; a vertical bar would end the cell of a table even there."""
    shown = clean(text, unicode=True)
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}".replace("|", r"\|")


def _block(command: str) -> str:
    fence = "`" * max(3, max(map(len, re.findall("`+", command)), default=0) + 1)
    return f"{fence}sh\n{clean(command, unicode=True)}\n{fence}"


def _document(parts: Iterable[str]) -> str:
    return "\n\n".join(filter(None, parts)) + "\n"


def _listed(texts: Iterable[str]) -> str:
    return "\n".join(f"- {prose(text)}" for text in texts)


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>" if text else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; nothing where there are no rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *lines]) if lines else ""


def _scanned(report: Report) -> str:
    scan = report.scan
    weights = f", weights of {code(scan.checkpoint)}" if scan.checkpoint else ""
    measured = f"{count(scan.batches, 'micro-batch')} of {scan.batch_size} of {prose(figures.data(scan))}"
    return f"{code(scan.model)}{weights}, measured on {measured}."


def _diagnoses(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """One item of a list for each root cause, worst first, with what to do."""
    items = []
    for number, diagnosis in enumerate(diagnoses, start=1):
        title = prose(title_of(diagnosis.rule, diagnosis.cause))
        head = f"{number}. {SEVERITY_SIGNS[diagnosis.severity]} **{title}** ({prose(diagnosis.rule)}):"
        items.append(f"{head} {prose(diagnosis.message)}\n   **What to do:** {prose(diagnosis.remedy)}")
    return ["\n".join(items)] if items else []


def _against(known: BaselineComparison | None) -> str:
    if known is None:
        return ""
    return f"{prose(baseline.heading(known))}.\n\n{_listed(baseline.sentences(known, show_all=False))}"


def _layers(layers: Sequence[Layer]) -> str:
    heads = ("", "layer", *(f"n_eq {where}" for where in IN_MODE.values()), "D", "most of it", "built in")
    return table(heads, map(_row, layers))


def _row(layer: Layer) -> tuple[str, ...]:
    return (
        sign_of(layer),
        code(layer.name),
        figures.path_equivalent(layer.train),
        figures.path_equivalent(layer.eval),
        figures.path_mismatch(worse_path(layer.train, layer.eval)),
        mostly(layer.shares),
        code(layer.location) if layer.location else "",
    )


def _kept(layers: Sequence[Layer], options: RenderOptions) -> Sequence[Layer]:
    return layers if options.show_all or len(layers) <= MOST_FOLDED else worst_first(layers)[:MOST_FOLDED]


def _measured(report: Report) -> str:
    scan, environment = report.scan, report.environment
    facts = [
        f"{scan.device} ({environment.device_name}), {scan.dtype}, seed {scan.seed}",
        f"{report.tool.name} {report.tool.version}, torch {environment.torch}, Python {environment.python}",
        *scan.notes,
    ]
    command = f"\n\n{_block(scan.command)}" if scan.command else ""
    return _listed(facts) + command


def _skipped(layers: Sequence[SkippedLayer]) -> str:
    rows = [(code(layer.name), code(layer.kind), prose(layer.reason)) for layer in layers[:MOST_FOLDED]]
    return _folded(f"{count(len(layers), 'layer')} not judged", table(("layer", "class", "why"), rows))
