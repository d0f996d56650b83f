"""Where the mismatch comes from: one stacked bar per layer, and one for the model."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from bnprobe.records import Layer, Report
from bnprobe.reports import figures, glyphs, stacked
from bnprobe.reports.causes import SOURCES, Source
from bnprobe.reports.layout import Page
from bnprobe.reports.sharetable import Row, bar_scale, share_table
from bnprobe.reports.standing import STYLES, sign

_CLEARLY = 0.1
"""A share below 0 by this part of the bar is clearly so where it has no interval."""

_ANY_WIDTH = 16
_UNEXPLAINED = "could not be taken apart"


def shares(report: Report, shown: Sequence[Layer], page: Page) -> list[Text]:
    """The bars, and how to read them.

    Args:
        report: The whole report.
        shown: The layers to show, in network order.
        page: What the lines are written on.
    """
    if not report.layers:
        return []
    heading = page.heading("Where the mismatch comes from, eval path")
    if not any(layer.shares for layer in report.layers):
        return [*heading, *page.paragraph(_nothing_apart(report.layers), first="  ")]
    rows = [*(_row(layer) for layer in shown), *_model_row(report)]
    return [*heading, *share_table(rows, report.layers, page), *_legend(rows, shown, page)]


def _nothing_apart(layers: Sequence[Layer]) -> str:
    reasons = [reason for reason in dict.fromkeys(map(_why_not, layers)) if reason != _UNEXPLAINED]
    why = f": {', '.join(reasons)}" if reasons else ""
    return f"The mismatch of no layer {_UNEXPLAINED}{why}.".replace("could not", "could")


def _row(layer: Layer) -> Row:
    mark = sign(layer)
    impact = layer.impact
    return Row(
        sign=mark,
        style=STYLES[mark],
        name=layer.name,
        shares=layer.shares,
        intervals=layer.share_intervals,
        mismatch=glyphs.UNMEASURED if layer.eval is None else figures.mismatch(layer.eval.mismatch),
        threshold=layer.threshold,
        estimate="" if impact is None or impact.estimate is None else figures.relative(impact.estimate),
        exact="" if impact is None or impact.exact is None else figures.relative(impact.exact),
        why_not=_why_not(layer),
    )


def _model_row(report: Report) -> list[Row]:
    total = report.summary.shares
    number = sum(layer.shares is not None for layer in report.layers)
    if total is None or number < 2:
        return []
    # Without the data shift, which comes on top of D.
    mismatch = sum(source.of(total) or 0.0 for source in SOURCES if source.field != "data_shift")
    limits = {layer.threshold for layer in report.layers}
    threshold = limits.pop() if len(limits) == 1 else None
    return [Row("", "bold", f"mean of {number} layers", total, None, figures.mismatch(max(mismatch, 0)), threshold)]


def _why_not(layer: Layer) -> str:
    if not layer.running_statistics:
        return "no running statistics"
    if layer.eval is None:
        return "not measured at inference"
    return _UNEXPLAINED


def _legend(rows: Sequence[Row], shown: Sequence[Layer], page: Page) -> list[Text]:
    apart = [row for row in rows if row.shares is not None]
    entries = [("bar", _letters(apart))]
    entries += [(glyphs.CENTRE, _limits(shown))]
    entries += _remarks(apart)
    lines = page.labelled([(page.clean(label), text) for label, text in entries])
    for line in lines:
        line.stylize("dim")
    return lines


def _letters(rows: Sequence[Row]) -> str:
    # The data shift has a line of its own.
    there = [source for source in SOURCES[:-1] if any(row.shares and source.of(row.shares) is not None for row in rows)]
    return ", ".join(f"{source.letter} {source.words}" for source in there)


def _limits(shown: Sequence[Layer]) -> str:
    limits = {layer.threshold for layer in shown}
    if len(limits) > 1:
        return "the layer's limit"
    threshold = limits.pop()
    return f"the limit: D {figures.mismatch(stacked.limit(threshold))} is n_eq {figures.plain(threshold)}"


def _remarks(rows: Sequence[Row]) -> list[tuple[str, str]]:
    scale = bar_scale(rows, _ANY_WIDTH)
    found = [row.shares for row in rows if row.shares is not None]
    remarks = []
    if any(scale.cuts(stacked.length(one)) for one in found):
        remarks.append((glyphs.CUT, "too long for the scale: parts of the whole bar"))
    if any(row.estimate or row.exact for row in rows):
        text = "relative L2 change if only this layer uses batch statistics (~ estimate)"
        remarks.append(("output", text))
    if any(one.data_shift is not None for one in found):
        remarks.append(("x", "data shift, held-out against training data; comes on top of D"))
    if any(one.composition is None for one in found):
        remarks.append(("s", "holds composition too where images could not be regrouped"))
    if below := _below([row for row in rows if row.sign]):
        remarks.append(("not drawn", f"clearly below 0, offsetting other shares: {below}"))
    return remarks


def _below(rows: Sequence[Row]) -> str:
    """Each source that is clearly below 0 somewhere, with the layer where it is furthest."""
    texts = []
    for source in SOURCES:
        found = [(_share(row, source), row.name) for row in rows if _clearly_below(row, source)]
        if found:
            lowest, name = min(found)
            where = f"{figures.count(len(found), 'layer')}, down to " if len(found) > 1 else ""
            texts.append(f"{source.words} ({where}{lowest:.2g} in {name})")
    return ", ".join(texts)


def _share(row: Row, source: Source) -> float:
    return 0.0 if row.shares is None else source.of(row.shares) or 0.0


def _clearly_below(row: Row, source: Source) -> bool:
    share = _share(row, source)
    if row.shares is None or share >= 0:
        return False
    interval = source.interval(row.intervals)
    if interval is not None:
        return interval[1] is not None and interval[1] < 0
    return -share > _CLEARLY * stacked.length(row.shares)
