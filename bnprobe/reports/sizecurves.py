"""Mismatch against batch size: the chart, the tables, and what they come to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.text import Text

from bnprobe.records import SweepLayer, SweepPoint, SweepReport
from bnprobe.reports import figures, glyphs
from bnprobe.reports.columns import table
from bnprobe.reports.layout import Page, pad
from bnprobe.stats.theory import mismatch_iid

MOST_LAYERS = 25

_SIGNS = {"fails": glyphs.FLAGGED, "undecided": glyphs.UNDECIDED, "passes": glyphs.FINE}
_FLAT = 3.0
"""A mismatch so many times that of i.i.d. images is no matter of batch size."""

_EXPENDABLE = ("undecided", "limit", "batches")
_NARROW = 64
"""Below so many cells there is a chart of one layer only."""

_FULL = "█"
_DECADES = 3.0
_BESIDE_BAR = 9
"""Cells of a sign and a value with their blanks."""


@dataclass(frozen=True)
class _Scale:
    """A logarithmic axis of D."""

    low: float
    high: float
    cells: int

    def place(self, value: float) -> int:
        """The cell in which a value lies, from 0."""
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return min(max(math.ceil(share * self.cells) - 1, 0), self.cells - 1)


def chart(layers: Sequence[SweepLayer], scanned: int, page: Page) -> list[Text]:
    """D of the worst and the median layer at each size as bars, with a mark where i.i.d. images would be."""
    drawn = _worst_and_median(layers, scanned)[: 1 if page.width < _NARROW else 2]
    if not drawn:
        return []
    sizes = sorted({point.batch_size for _, layer in drawn for point in layer.eval})
    labels = ["size", *map(str, sizes)]
    width = max(map(len, labels))
    room = (page.width - 2 - width - 2 * len(drawn)) // len(drawn)
    blocks = [_block(title, layer, sizes, _scale(drawn, room - _BESIDE_BAR), page) for title, layer in drawn]
    rows = zip([pad(label, width, right=True) for label in labels], *blocks, strict=True)
    lines = [Text("  " + "  ".join(row)) for row in rows]
    lines[0].stylize("dim")
    legend = (
        f"{_FULL} measured, on a log scale; {glyphs.CENTRE} i.i.d. images, from n_eq at size {scanned}",
        f"{glyphs.FINE} passes, {glyphs.UNDECIDED} undecided, {glyphs.FLAGGED} fails (95%)",
    )
    return [
        *page.heading("Mismatch D against batch size, eval path, same images"),
        *lines,
        *(line for text in legend for line in page.paragraph(text, style="dim", first="  ")),
    ]


def by_size(layers: Sequence[SweepLayer], page: Page) -> list[Text]:
    """The worst layer at each size of the eval path, and how many layers pass."""
    points = [(layer, point) for layer in layers for point in layer.eval]
    if not points:
        return []
    rows = [("size", "batches", "worst n_eq", "fail", "undecided", "worst layer"), *_size_rows(points)]
    return [
        *page.heading(f"{figures.count(len(layers), 'layer')}, eval path, by batch size"),
        *table(rows, page, True, _EXPENDABLE),
    ]


def by_train_size(layers: Sequence[SweepLayer], page: Page) -> list[Text]:
    """The same for the train path, where it was measured at more than one size."""
    points = [(layer, point) for layer in layers for point in layer.train]
    if len({point.batch_size for _, point in points}) < 2:
        return []
    rows = [("size", "batches", "worst n_eq", "fail", "undecided", "worst layer"), *_size_rows(points)]
    return [*page.heading("Train path, one measurement for each size"), *table(rows, page, True, _EXPENDABLE)]


def by_layer(layers: Sequence[SweepLayer], scanned: int, page: Page, show_all: bool) -> list[Text]:
    """The smallest batch size of each layer."""
    measured = [layer for layer in layers if layer.eval]
    worst = sorted(measured, key=lambda layer: _at(layer, scanned).mismatch, reverse=True)
    kept = {layer.name for layer in (worst if show_all else worst[:MOST_LAYERS])}
    shown = [layer for layer in measured if layer.name in kept]
    if not shown:
        return []
    largest = max(point.batch_size for layer in shown for point in layer.eval)
    header = (f"n_eq at {scanned}", "limit", "passes", "surely", "layer")
    rows = [header, *(_layer_row(layer, scanned, largest) for layer in shown)]
    left_out = len(measured) - len(shown)
    more = page.paragraph(f"{figures.count(left_out, 'layer')} with less mismatch not shown; --all shows every one.")
    return [
        *page.heading("Batch size from which on a layer passes, eval path"),
        *table(rows, page, True, (*_EXPENDABLE, header[0])),
        *(more if left_out else []),
    ]


def conclusion(report: SweepReport) -> tuple[str, ...]:
    """The smallest batch size at which every layer passes, in words."""
    sizes = sorted({point.batch_size for layer in report.layers for point in layer.eval})
    if not sizes:
        return ("No layer could be measured on the eval path.",)
    found = report.smallest
    if found.likely is None:
        return _none_passes(report, sizes[-1])
    if found.surely == found.likely:
        least = ", the smallest measured" if found.likely == sizes[0] else ""
        return (f"The smallest batch size at which every layer passes is {found.likely}{least} (eval path).",)
    surely = f"surely (95%) from {found.surely} on" if found.surely else f"not surely at any size up to {sizes[-1]}"
    return (f"Every layer probably passes from batch size {found.likely} on, {surely} (eval path).",)


def _none_passes(report: SweepReport, largest: int) -> tuple[str, ...]:
    missing = [layer for layer in report.layers if layer.flagged and not layer.eval]
    if missing:
        return (f"No batch size lets every layer pass: {missing[0].name} could not be measured on the eval path.",)
    failing = [layer for layer in report.layers if layer.eval and layer.smallest.likely is None]
    worst = max(failing, key=lambda layer: layer.eval[-1].mismatch, default=None)
    if worst is None:
        return ("No layer has running statistics that could differ from the batch's.",)
    last = worst.eval[-1]
    first = (
        f"No batch size up to {largest} lets every layer pass (eval path): {len(failing)} of"
        f" {figures.count(len(report.layers), 'layer')} still {'measures' if len(failing) == 1 else 'measure'} below"
        f" the limit, worst {worst.name} (n_eq {figures.equivalent_batch_size(last.equivalent_batch_size)})."
    )
    if not any(layer.eval[-1].standing == "fails" for layer in failing):
        only = figures.count(last.batches, "micro-batch")
        first += f" None does so surely: there were {only} of {last.batch_size}."
    if last.mismatch <= _FLAT * last.theory:
        return (first,)
    return (
        first,
        f"At {largest}, i.i.d. images would give it D = {figures.mismatch(last.theory)}, and it has"
        f" {figures.mismatch(last.mismatch)}: a larger batch is not what it lacks. bnprobe scan says what is wrong.",
    )


def _worst_and_median(layers: Sequence[SweepLayer], scanned: int) -> list[tuple[str, SweepLayer]]:
    ranked = sorted((layer for layer in layers if layer.eval), key=lambda layer: _at(layer, scanned).mismatch)
    if not ranked:
        return []
    if len(ranked) < 3:
        return [("worst", ranked[-1])]
    return [("worst", ranked[-1]), ("median", ranked[(len(ranked) - 1) // 2])]


def _at(layer: SweepLayer, size: int) -> SweepPoint:
    return next((point for point in layer.eval if point.batch_size == size), layer.eval[0])


def _scale(drawn: Sequence[tuple[str, SweepLayer]], cells: int) -> _Scale:
    """From the smallest measured value to the largest, at most three decades, the same for all."""
    values = [point.mismatch for _, layer in drawn for point in layer.eval if point.mismatch > 0] or [1.0]
    high = max(values)
    return _Scale(max(min(values), high / 10**_DECADES) / 1.5, high, cells)


def _block(title: str, layer: SweepLayer, sizes: Sequence[int], scale: _Scale, page: Page) -> list[str]:
    """Lines of one layer, all of the same width: sign, bar, value; a blank one for a size that was not measured."""
    points = {point.batch_size: point for point in layer.eval}
    room = scale.cells + _BESIDE_BAR
    name = page.shorten([layer.name], room - len(title) - 2)[0]
    bars = [_bar(points[size], scale, page) if size in points else "" for size in sizes]
    return [pad(line, room) for line in (f"{title}: {name}", *bars)]


def _bar(point: SweepPoint, scale: _Scale, page: Page) -> str:
    length = scale.place(point.mismatch) + 1 if point.mismatch > 0 else 0
    cells = list(_FULL * length + " " * (scale.cells - length))
    cells[scale.place(point.theory)] = glyphs.CENTRE
    value = pad(figures.mismatch(point.mismatch), 6, right=True)
    return page.clean(f"{_SIGNS[point.standing]} {''.join(cells)} {value}")


def _size_rows(points: Sequence[tuple[SweepLayer, SweepPoint]]) -> Iterable[tuple[str, ...]]:
    for size in sorted({point.batch_size for _, point in points}):
        here = [(layer, point) for layer, point in points if point.batch_size == size]
        worst, point = max(here, key=lambda pair: pair[1].mismatch / mismatch_iid(pair[0].threshold))
        failing, undecided = (sum(p.standing == name for _, p in here) for name in ("fails", "undecided"))
        n_eq = figures.equivalent_batch_size(point.equivalent_batch_size)
        yield str(size), str(point.batches), n_eq, f"{failing} of {len(here)}", str(undecided), worst.name


def _layer_row(layer: SweepLayer, scanned: int, largest: int) -> tuple[str, str, str, str, str]:
    beyond = f"> {largest}"
    likely, surely = (str(size) if size else beyond for size in (layer.smallest.likely, layer.smallest.surely))
    n_eq = figures.equivalent_batch_size(_at(layer, scanned).equivalent_batch_size)
    return n_eq, figures.plain(layer.threshold), likely, surely, layer.name
