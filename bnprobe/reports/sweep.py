"""The report of ``bnprobe sweep``, for the terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

from rich.text import Text

from bnprobe.records import SweepReport
from bnprobe.reports import figures, glyphs
from bnprobe.reports.interface import RenderOptions
from bnprobe.reports.layout import MINIMUM_WIDTH, Page, to_string
from bnprobe.reports.rates import rates, rates_by_layer, tracking
from bnprobe.reports.sizecurves import by_layer, by_size, by_train_size, chart, conclusion
from bnprobe.reports.standing import STYLES


def render_terminal(report: SweepReport, options: RenderOptions) -> str:
    """The report as text in lines of at most ``options.width`` cells."""
    page = Page(max(options.width, MINIMUM_WIDTH), options.unicode)
    scanned, momentum = report.scan.batch_size, report.momentum
    parts = [
        _header(report, page),
        chart(report.layers, scanned, page),
        by_size(report.layers, page),
        by_layer(report.layers, scanned, page, options.show_all),
        by_train_size(report.layers, page),
        *([rates(momentum, page), rates_by_layer(momentum, page, options.show_all)] if momentum else []),
        _notes(report, page),
        _closing(report, page),
    ]
    lines: list[Text] = []
    for part in parts:
        lines += [Text(), *part] if lines and part else part
    return to_string(lines, options.color)


def render_json(report: SweepReport, options: RenderOptions | None = None) -> str:
    """The report as JSON: the records as they are.

    Raises:
        ValueError: If a figure is NaN or infinite, which the records do not allow.
    """
    return json.dumps(asdict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


SWEEP_FORMATS: dict[str, Callable[[SweepReport, RenderOptions], str]] = {
    "terminal": render_terminal,
    "json": render_json,
}


def one_line(report: SweepReport) -> str:
    """The result in one line."""
    partial = "PARTIAL: " if report.partial else ""
    flagged = sum(layer.flagged for layer in report.layers)
    layers = figures.count(len(report.layers), "layer")
    return f"{partial}{flagged} of {layers} flagged at batch size {report.scan.batch_size}"


def _header(report: SweepReport, page: Page) -> list[Text]:
    scan = report.scan
    partial = " (PARTIAL)" if report.partial else ""
    title = page.heading(f"{report.tool.name} {report.tool.version}: sweep of {scan.model}{partial}")
    batches = figures.count(scan.batches, "micro-batch")
    regrouped = ", regrouped for every size" if any(len(layer.eval) > 1 for layer in report.layers) else ""
    rows = [
        ("data", f"{scan.data} (synthetic)" if scan.synthetic else scan.data),
        *([("checkpoint", scan.checkpoint)] if scan.checkpoint else []),
        ("device", f"{scan.device} ({report.environment.device_name}), {scan.dtype}, seed {scan.seed}"),
        ("measured", f"{batches} {glyphs.TIMES} {scan.batch_size} = {figures.count(scan.images, 'image')}{regrouped}"),
    ]
    return [*title, *page.labelled(rows)]


def _notes(report: SweepReport, page: Page) -> list[Text]:
    notes = [*report.scan.notes, *report.notes]
    lines = [line for note in notes for line in page.paragraph(note, first="  ")]
    return [*page.heading("Notes"), *lines] if lines else []


def _closing(report: SweepReport, page: Page) -> list[Text]:
    headline, *sentences = conclusion(report)
    flagged = any(layer.flagged for layer in report.layers)
    undecided = any(layer.undecided for layer in report.layers)
    sign = glyphs.FLAGGED if flagged else glyphs.UNDECIDED if undecided else glyphs.FINE
    lines = page.paragraph(headline, style="bold", first=f"{page.clean(sign)} ")
    lines[0].stylize(STYLES[sign], 0, 1)
    sentences += [f"{one_line(report)}."]
    sentences += tracking(report.momentum) if report.momentum else []
    return lines + [line for sentence in sentences for line in page.paragraph(sentence, first="  ")]
