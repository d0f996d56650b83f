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
"""So many layers are shown, the worst and those that surely changed most, unless all are asked for."""

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
    if layer.ratio_interval is None:
        return f"{TIMES} {layer.ratio:.2g}"
    low, high = layer.ratio_interval
    around = f"over {low:.2g}" if high is None else f"{low:.2g} to {high:.2g}" if low else f"under {high:.2g}"
    return f"{TIMES} {layer.ratio:.2g} ({around})"


def mismatch(point: LayerPoint | None) -> str:
    """D of a layer in one of the scans."""
    return UNMEASURED if point is None else figures.mismatch(point.mismatch)


def words(layer: LayerTrend) -> str:
    """What became of D, and why that is not sure where more of the same would not tell."""
    ends = [point for point in (layer.points[0], layer.points[-1]) if point is not None]
    if layer.trend != "unsure":
        return WORDS[layer.trend]
    reason = ": D is 0" if layer.ratio is None else ": no upper end" if any(not end.interval[1] for end in ends) else ""
    return f"{WORDS['unsure']}{reason}"


def most_changed(found: Comparison, show_all: bool) -> list[LayerTrend]:
    """The layers to show, in network order: those that changed most, and the worst of both ends, if it changed.

    Surely worse ones come first, then surely better ones, by the least that the change surely is.
    """
    worst = (found.scans[0].worst, found.scans[-1].worst)

    def rank(layer: LayerTrend) -> tuple[bool, int, float]:
        return layer.trend == "same" or layer.name not in worst, _ORDER.index(layer.trend), -_least_change(layer)

    ranked = sorted(found.layers, key=rank)
    kept = {layer.name for layer in (ranked if show_all else ranked[:MOST_LAYERS])}
    return [layer for layer in found.layers if layer.name in kept]


def _least_change(layer: LayerTrend) -> float:
    """How far the nearer end of the ratio's interval is from 1, as a logarithm; of the ratio where nothing is sure."""
    ends = layer.ratio_interval if layer.trend in ("better", "worse") else None
    return min(abs(math.log(end)) if end else math.inf for end in ends or (layer.ratio or 1.0,))


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
        Column("D", arrows(ends, page)),
        Column("change", [ratio(layer) for layer in shown], "left"),
        Column("", [words(layer) for layer in shown], "left"),
    ]
    if len(found.scans) > 2:
        columns.insert(1, Column("over time", [course(layer) for layer in shown], "left"))
    marks = [_layer_mark(layer.points[-1]) for layer in shown]
    lines = table(Names([layer.name for layer in shown], marks=marks), dropping(columns, ("over time", "D")), page)
    hidden = len(found.layers) - len(shown)
    left_out = (
        f"{count(hidden, 'layer')} that changed less, or less surely, not shown; {page.every} shows all."
        if hidden
        else ""
    )
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
        (layer.name, mismatch(layer.points[0]), mismatch(layer.points[-1]), ratio(layer), words(layer))
        for layer in layers
    ]
