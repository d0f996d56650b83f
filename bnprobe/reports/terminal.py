"""The terminal report: what `bnprobe scan` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from bnprobe.records import Layer, Report
from bnprobe.reports import sections, training
from bnprobe.reports.clipping import clipping
from bnprobe.reports.closing import closing
from bnprobe.reports.cost import cost
from bnprobe.reports.gaps import gaps
from bnprobe.reports.interface import RenderOptions
from bnprobe.reports.layertable import legend, table
from bnprobe.reports.layout import MINIMUM_WIDTH, Page, to_string
from bnprobe.reports.likeness import likeness
from bnprobe.reports.shares import shares
from bnprobe.reports.standing import select
from bnprobe.reports.whatif import whatif

MOST_LAYERS = 25
"""A network with more layers shows its worst, unless all are asked for."""


def render(report: Report, options: RenderOptions) -> str:
    """The report as text in lines of at most ``options.width`` cells."""
    page = Page(max(options.width, MINIMUM_WIDTH), options.unicode)
    shown = list(report.layers) if options.show_all else select(report.layers, MOST_LAYERS)
    parts = [
        sections.header(report, page),
        _layers(report.layers, shown, page),
        shares(report, shown, page),
        likeness(report, page, options.show_all),
        clipping(report.layers, page, options.show_all),
        sections.skipped(report, page, options.show_all),
        sections.notes(report.layers, page, options.show_all),
        sections.batch_sizes(report.layers, page),
        sections.output(report.summary.output, page, scores=not report.summary.gaps),
        gaps(report.summary.gaps, page),
        training.backward(report, page, options.show_all),
        training.updates(report, page, options.show_all),
        sections.scan_notes(report.scan, page),
        cost(report.scan, page),
        whatif(report.remedies, page),
        closing(report, page, options.command, options.show_all),
    ]
    return to_string(_separated(parts), options.color)


def _layers(layers: Sequence[Layer], shown: Sequence[Layer], page: Page) -> list[Text]:
    if not layers:
        return []
    return [
        *sections.tally(layers, page),
        *table(shown, layers, page),
        *sections.hidden(layers, shown, page),
        *legend(layers, page),
    ]


def _separated(parts: Sequence[list[Text]]) -> list[Text]:
    """The parts that have lines, with an empty line between them."""
    lines: list[Text] = []
    for part in parts:
        lines += [Text(), *part] if lines and part else part
    return lines
