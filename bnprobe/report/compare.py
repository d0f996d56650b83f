"""The report of ``bnprobe compare``: the scans one below the other, and what became of each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

from bnprobe.numbers import count, listed
from bnprobe.records import Comparison, LayerPoint, LayerTrend, PathValues, Trend
from bnprobe.report import figures
from bnprobe.report.page import (
    ARROW,
    FINE,
    FLAGGED,
    LEVELS,
    TIMES,
    UNDECIDED,
    UNMEASURED,
    Page,
    RenderOptions,
    standing,
    to_string,
)
from bnprobe.report.table import Column, Mark, Names, arrows, dropping, table

MOST_LAYERS = 12
"""So many layers are shown, those that changed most surely and most, unless all are asked for."""

_LEAST_SCAN = 28
"""Columns are dropped until the names of scans, which end alike, have so much room."""

WORDS: dict[Trend, str] = {
    "same": "no change",
    "better": "surely better",
    "worse": "surely worse",
    "unsure": "not sure",
    "unknown": "not in both",
}
_ORDER: tuple[Trend, ...] = ("worse", "better", "unsure", "unknown", "same")


def render(found: Comparison, options: RenderOptions) -> str:
    """The comparison as text in lines of at most ``options.width`` cells."""
    page = Page.of(options)
    parts = [
        page.heading(heading(found)),
        _scans(found, page),
        _layers(found, page, options.show_all),
        page.section("Notes on the comparison", found.notes),
        page.verdict(sign(found), f"{one_line(found)}."),
    ]
    return to_string(parts, options.color)


def heading(found: Comparison) -> str:
    """What is compared, e.g. "3 scans of model.py:load_model, from first to last"."""
    models = dict.fromkeys(scan.model for scan in found.scans)
    return f"{len(found.scans)} scans of {listed(list(models))}, from first to last"


def one_line(found: Comparison) -> str:
    """The result in one line, e.g. "From a.json to b.json: 3 of 9 layers surely better, none surely worse"."""
    ends = f"From {found.scans[0].name} to {found.scans[-1].name}"
    if all(layer.trend == "same" for layer in found.layers):
        return f"{ends}: no change"
    better, worse = (sum(layer.trend == each for layer in found.layers) for each in ("better", "worse"))
    layers = count(len(found.layers), "layer")
    return f"{ends}: {better or 'none'} of {layers} surely better, {worse or 'none'} surely worse"


def sign(found: Comparison) -> str:
    """Whether a layer is surely worse, or flagged now and not before."""
    first, last = found.scans[0], found.scans[-1]
    if any(layer.trend == "worse" for layer in found.layers):
        return FLAGGED if last.flagged > first.flagged else UNDECIDED
    return FINE


def scan_rows(found: Comparison) -> dict[str, list[str]]:
    """The columns of the table of scans, by heading; those of which nothing is known are left out."""
    columns = {
        "flagged": [f"{scan.flagged} of {scan.layers}" for scan in found.scans],
        "errors": [str(scan.errors) for scan in found.scans],
        "undecided": [str(scan.undecided) for scan in found.scans],
        "worst D": [figures.known(scan.mismatch, figures.mismatch) for scan in found.scans],
        "worst layer": [scan.worst or UNMEASURED for scan in found.scans],
        "outputs apart": [figures.known(scan.output, figures.relative) for scan in found.scans],
        f"loss, train {ARROW} eval": [_modes(scan.loss) for scan in found.scans],
        f"metric, train {ARROW} eval": [_modes(scan.metric) for scan in found.scans],
    }
    return {head: cells for head, cells in columns.items() if any(cell not in (UNMEASURED, "0") for cell in cells)}


def ratio(layer: LayerTrend) -> str:
    """D of the last scan over that of the first, e.g. "\N{MULTIPLICATION SIGN} 0.42 (0.35 to 0.50)"."""
    if layer.ratio is None:
        return ""
    low, high = layer.ratio_interval or (None, None)
    around = "" if low is None or high is None else f" ({low:.2g} to {high:.2g})"
    return f"{TIMES} {layer.ratio:.2g}{around}"


def mismatch(point: LayerPoint | None) -> str:
    """D of a layer in one of the scans."""
    return UNMEASURED if point is None else figures.mismatch(point.mismatch)


def most_changed(found: Comparison, show_all: bool) -> list[LayerTrend]:
    """The layers that changed most, in network order: surely worse ones first, then surely better ones."""
    ranked = sorted(found.layers, key=lambda layer: (_ORDER.index(layer.trend), -abs(math.log(layer.ratio or 1.0))))
    kept = {layer.name for layer in (ranked if show_all else ranked[:MOST_LAYERS])}
    return [layer for layer in found.layers if layer.name in kept]


def _modes(values: PathValues | None) -> str:
    return UNMEASURED if values is None else f"{figures.score(values.train)} {ARROW} {figures.score(values.eval)}"


def _scans(found: Comparison, page: Page) -> list[Text]:
    columns = [Column(head, cells, "left") for head, cells in scan_rows(found).items()]
    marks = [Mark.of(standing(bool(scan.flagged or scan.errors), bool(scan.undecided))) for scan in found.scans]
    names = Names([scan.name for scan in found.scans], heading="scan", marks=marks)
    expendable = ("undecided", f"loss, train {ARROW} eval", "worst layer", "outputs apart", "errors")
    return table(names, dropping(columns, expendable, _LEAST_SCAN), page)


def _layers(found: Comparison, page: Page, show_all: bool) -> list[Text]:
    shown = most_changed(found, show_all)
    if not shown:
        return []
    ends = [(mismatch(layer.points[0]), mismatch(layer.points[-1])) for layer in shown]
    columns = [
        Column("D", arrows(ends, page, ARROW)),
        Column("change", [ratio(layer) for layer in shown], "left"),
        Column("", [WORDS[layer.trend] for layer in shown], "left"),
    ]
    if len(found.scans) > 2:
        columns.insert(1, Column("over time", [course(layer) for layer in shown], "left"))
    marks = [_layer_mark(layer.points[-1]) for layer in shown]
    lines = table(Names([layer.name for layer in shown], marks=marks), dropping(columns, ("over time", "D")), page)
    hidden = len(found.layers) - len(shown)
    left_out = f"{count(hidden, 'layer')} that changed less not shown; {page.every} shows all." if hidden else ""
    return [
        *page.heading("Layers, the larger D of training and inference"),
        *lines,
        *page.paragraphs([left_out], first=""),
    ]


def course(layer: LayerTrend) -> str:
    """D over the scans, drawn from the smallest to the largest on a logarithmic scale."""
    known = [math.log(point.mismatch) for point in layer.points if point is not None and point.mismatch > 0]
    low, high = min(known, default=0.0), max(known, default=0.0)
    steps = len(LEVELS) - 2

    def level(point: LayerPoint | None) -> str:
        if point is None or point.mismatch <= 0:
            return LEVELS[0]
        part = (math.log(point.mismatch) - low) / (high - low) if high > low else 0.0
        return LEVELS[1 + round(part * steps)]

    return "".join(map(level, layer.points))


def _layer_mark(point: LayerPoint | None) -> Mark:
    if point is None:
        return Mark.of(UNMEASURED)
    return Mark.of(standing(point.flagged, point.undecided))


def rows(layers: Sequence[LayerTrend]) -> list[tuple[str, ...]]:
    """Name, D first and last, change and words of each layer, for tables of other formats."""
    return [
        (layer.name, mismatch(layer.points[0]), mismatch(layer.points[-1]), ratio(layer), WORDS[layer.trend])
        for layer in layers
    ]
