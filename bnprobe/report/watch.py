"""The state of a training run that a monitor watches: the loss in both modes, the worst layers, what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.text import Text

from bnprobe.numbers import count, listed
from bnprobe.records import LayerSample, MonitorFinding, MonitorLog, MonitorSample
from bnprobe.report import figures
from bnprobe.report.charts import sparkline
from bnprobe.report.page import FINE, SEVERITY_SIGNS, SEVERITY_STYLES, UNMEASURED, Page, RenderOptions, to_string
from bnprobe.report.table import Column, Mark, Names, TableLayout, dropping, layer_names, table

_ON_SCREEN = 9
"""So many layers are shown, the worst."""

_FINDINGS = 3
"""So many findings are shown, the latest; each rule once."""

_CURVE = 24
"""Cells of a curve, where they are not more than a quarter of the line."""

_LARGE = 1024.0
"""The top of the curves of n_eq, which are on a logarithmic scale."""


def render(log: MonitorLog, options: RenderOptions) -> str:
    """The state as text in lines of at most ``options.width`` cells."""
    page = Page.of(options)
    latest = _latest(log.findings)
    parts = [_header(log, page)]
    if log.samples:
        last = log.samples[-1]
        parts += [
            _loss(log.samples, last, page),
            _layers(log.samples, last, latest, page, len(last.layers) if options.show_all else _ON_SCREEN),
        ]
    return to_string([*parts, _findings(latest, page) if log.version else []], options.color)


def _latest(findings: Sequence[MonitorFinding]) -> list[MonitorFinding]:
    """The latest finding of each rule, the newest first."""
    return sorted({finding.rule: finding for finding in findings}.values(), key=lambda each: each.step, reverse=True)


def _header(log: MonitorLog, page: Page) -> list[Text]:
    if not log.version:
        return page.paragraph(f"{log.path} is empty: the run has not begun.")
    resumed = f", resumed at step {log.step:,}" if log.step else ""
    if log.samples:
        last = log.samples[-1]
        size = "" if last.samples is None else f", of {count(last.samples, 'sample')}"
        sampled = f"every {count(log.every, 'step')}; the last at step {last.step:,}{size}"
    else:
        sampled = f"every {count(log.every, 'step')}; none yet"
    rows = [("log", log.path), ("sampled", f"{sampled}{resumed}")]
    if log.skipped:
        rows.append(("skipped", f"{count(len(log.skipped), 'layer')}: {listed(sorted(log.skipped), 3)}"))
    for action in sorted(set(log.changed.values())):
        rows.append((action, listed([name for name, done in log.changed.items() if done == action], 3)))
    if log.unreadable:
        rows.append(("damaged", count(log.unreadable, "line")))
    return [*page.heading(f"bnprobe {log.version}: training of {log.model}"), *page.labelled(rows)]


def _loss(samples: Sequence[MonitorSample], last: MonitorSample, page: Page) -> list[Text]:
    """The loss of the sampled batches in both modes, on one scale, and how far the outputs are apart."""
    known = [sample.loss for sample in samples if sample.loss is not None]
    apart = "" if last.output is None else f"Outputs of the last batch differ by {figures.relative(last.output)}."
    if last.loss is None or not known:
        return page.paragraph(f"The loss could not be computed again in eval mode. {apart}".rstrip())
    finite = [value for loss in known for value in (loss.train, loss.eval) if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    curves = [[loss.train for loss in known], [loss.eval for loss in known]]
    columns = [
        Column("last", [_or_unmeasured(curve[-1], figures.score) for curve in curves], "point"),
        Column("over the run", [sparkline(curve, low, high, _cells(page)) for curve in curves], "left"),
    ]
    names = Names(["in train mode", "in eval mode"], heading="loss")
    return [*table(names, [TableLayout(columns)], page), *page.paragraph(apart, first="  ")]


def _findings(latest: Sequence[MonitorFinding], page: Page) -> list[Text]:
    if not latest:
        return page.verdict(FINE, "Nothing was found so far.")
    lines = []
    for finding in latest[:_FINDINGS]:
        sign = next((sign for severity, sign in SEVERITY_SIGNS.items() if severity == finding.severity), UNMEASURED)
        where = f" in {listed(finding.layers, 3)}" if finding.layers else ""
        block = page.paragraph(f"step {finding.step:,}: {finding.rule}{where}", "bold", first=f"{page.clean(sign)} ")
        block[0].stylize(next((s for key, s in SEVERITY_STYLES.items() if key == finding.severity), ""), 0, 1)
        lines += [*block, *page.paragraphs([finding.message, f"Remedy: {finding.remedy}"])]
    more = len(latest) - _FINDINGS
    return lines + (page.paragraph(f"{count(more, 'more rule')} before.", "dim", first="  ") if more > 0 else [])


def _layers(
    samples: Sequence[MonitorSample], last: MonitorSample, latest: Sequence[MonitorFinding], page: Page, most: int
) -> list[Text]:
    """The layers with the smallest n_eq in the last sample."""
    worst = sorted(last.layers, key=lambda name: _badness(last.layers[name]), reverse=True)[:most]
    if not worst:
        return page.paragraph("No layer normalized with its batch in the last sample.")
    found = {name: finding.severity for finding in reversed(list(latest)) for name in finding.layers}
    marks = [_mark(found.get(name, "")) for name in worst]
    shown = [last.layers[name] for name in worst]
    columns = [
        Column("n_eq", [_equivalent(layer) for layer in shown], "point"),
        Column("D", [_or_unmeasured(layer.mismatch, figures.mismatch) for layer in shown], "point"),
        Column("r", [_or_unmeasured(layer.r, "{:.2f}".format) for layer in shown], "point"),
        Column("d", [_or_unmeasured(layer.d, "{:.2f}".format) for layer in shown], "point"),
        Column("n_eq over the run", [_curve(samples, name, _cells(page)) for name in worst], "left"),
    ]
    names = layer_names(worst, list(last.layers), page, marks)
    more = len(last.layers) - len(worst)
    legend = (
        "n_eq: on this batch the layer behaves as if its statistics came from so many independent values; curves are on"
        " a log scale from 1 to 1,000."
    )
    return [
        *page.heading(f"{count(len(last.layers), 'layer')} in the last sample{', the worst' if more else ''}"),
        *table(names, dropping(columns, ("d", "r", "D")), page),
        *page.paragraph(legend, "dim"),
    ]


def _mark(severity: str) -> Mark:
    for known, sign in SEVERITY_SIGNS.items():
        if known == severity:
            return Mark(sign, SEVERITY_STYLES[known])
    return Mark()


def _badness(layer: LayerSample) -> float:
    return math.inf if math.isnan(layer.mismatch) else layer.mismatch


def _or_unmeasured(value: float, write: Callable[[float], str]) -> str:
    return write(value) if math.isfinite(value) else UNMEASURED


def _equivalent(layer: LayerSample) -> str:
    value = layer.equivalent_batch_size
    if not math.isfinite(layer.mismatch) or (value is not None and not math.isfinite(value)):
        return UNMEASURED
    return figures.equivalent_batch_size(value)


def _cells(page: Page) -> int:
    return min(_CURVE, page.width // 4)


def _curve(samples: Sequence[MonitorSample], name: str, cells: int) -> str:
    values = [_height(sample.layers[name]) for sample in samples if name in sample.layers]
    return sparkline(values, 0.0, math.log(_LARGE), cells)


def _height(layer: LayerSample) -> float:
    if math.isnan(layer.mismatch):
        return math.nan
    value = layer.equivalent_batch_size
    return math.log(_LARGE) if value is None else math.log(max(value, 1.0))
