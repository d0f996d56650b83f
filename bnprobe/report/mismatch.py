"""Where the mismatch comes from: a stacked bar of shares for each layer and for the model, and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.text import Text

from bnprobe.numbers import count, percent
from bnprobe.records import SOURCES, Interval, Layer, Report, ShareIntervals, Shares, Source
from bnprobe.report import charts, figures
from bnprobe.report.layers import OUTPUT_CHANGE, on_samples, sign_of
from bnprobe.report.page import CENTRE, CUT, Page, pad
from bnprobe.report.table import Column, Mark, TableLayout, fit, layer_names, table
from bnprobe.rules.shares import flagging_limit, noise_threshold
from bnprobe.stats.theory import mismatch_iid

_CLEARLY = 0.1
"""A share below 0 by this part of the bar is clearly so where it has no interval."""

_ANY_WIDTH = 16
_SHORTEST_BAR, _LONGEST_BAR = 20, 56
_ROOMY_BAR = 32
_UNEXPLAINED = "could not be decomposed"
_SHORT = {
    "no running statistics": "no statistics",
    "runs in training only": "training only",
    "not measured at inference": "not measured",
    _UNEXPLAINED: "not decomposed",
}
"""Why there is no bar, in the width of the shortest one."""


@dataclass(frozen=True)
class ShareRow:
    """A line: a layer, or the model.

    Attributes:
        mark: Sign and style.
        name: What stands before the bar.
        shares, intervals: What the bar shows; None: ``why_not`` says why there is none.
        mismatch: D of the row, as printed.
        limit: The D above which the layer is flagged; None: no mark.
        estimate, exact: Change of the output if only this layer uses batch statistics, as printed.
        why_not: Why there is no bar.
    """

    mark: Mark
    name: str
    shares: Shares | None
    intervals: ShareIntervals | None
    mismatch: str
    limit: float | None
    estimate: str = ""
    exact: str = ""
    why_not: str = ""


def shares(report: Report, shown: Sequence[Layer], page: Page) -> list[Text]:
    """The bars, and how to read them.

    Args:
        report: The whole report.
        shown: The layers to show, in network order.
        page: What the lines are written on.
    """
    if not report.layers:
        return []
    heading = page.heading(TITLE)
    if text := why_none(report.layers):
        return [*heading, *page.paragraph(text, first="  ")]
    rows = share_rows(report, shown)
    return [*heading, *_table(rows, report.layers, page), *_legend(rows, shown, on_samples(report), page)]


TITLE = "Where the mismatch at inference comes from"


def why_none(layers: Sequence[Layer]) -> str:
    """Why there is no bar at all, a sentence; empty where there are some."""
    if any(layer.shares for layer in layers):
        return ""
    reasons = [reason for reason in dict.fromkeys(map(_why_not, layers)) if reason != _UNEXPLAINED]
    return f"The mismatch of no layer could be decomposed{': ' if reasons else ''}{', '.join(reasons)}."


# --- Rows -------------------------------------------------------------------------------------------------------------


def share_rows(report: Report, shown: Sequence[Layer]) -> list[ShareRow]:
    """A row for each layer, and one for the model."""
    return [*map(_row, shown), *_model_row(report)]


def _row(layer: Layer) -> ShareRow:
    impact = layer.impact
    return ShareRow(
        mark=Mark.of(sign_of(layer)),
        name=layer.name,
        shares=None if layer.only_in == "train" else layer.shares,
        intervals=layer.share_intervals,
        mismatch=figures.path_mismatch(layer.eval),
        limit=flagging_limit(layer),
        estimate="" if impact is None or impact.estimate is None else figures.relative(impact.estimate),
        exact="" if impact is None or impact.exact is None else figures.relative(impact.exact),
        why_not=_why_not(layer),
    )


def _model_row(report: Report) -> list[ShareRow]:
    total = report.summary.shares
    number = sum(layer.shares is not None and layer.only_in != "train" for layer in report.layers)
    if total is None or number < 2:
        return []
    # Without the data shift, which comes on top of D.
    mismatch = sum(source.of(total) or 0.0 for source in SOURCES if source.adds_up)
    mean = f"mean of {number} layers"
    return [ShareRow(Mark(style="bold"), mean, total, None, figures.mismatch(max(mismatch, 0)), limit=None)]


def _why_not(layer: Layer) -> str:
    if not layer.running_statistics:
        return "no running statistics"
    if layer.only_in == "train":
        return "runs in training only"
    if layer.eval is None:
        return "not measured at inference"
    return _UNEXPLAINED


# --- The table --------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[ShareRow], network: Sequence[Layer], page: Page) -> list[Text]:
    """Names, bars in what room is left, and the columns right of them that fit."""
    names = [row.name for row in rows]
    whole = layer_names(names, [layer.name for layer in network], page, [row.mark for row in rows])
    (shortest, *columns), room = fit(_layouts(rows), whole, page)
    rest = room + shortest.width(page)
    fitted = replace(whole, most=min(whole.most or rest, max(rest - _SHORTEST_BAR, rest // 2)))
    taken = max(map(cell_len, ["layer", *fitted.fitted(rest, page)]))
    scale = bar_scale(rows, min(rest - taken, _LONGEST_BAR))
    axis = "0" + pad(figures.mismatch(scale.full), scale.width - 1, right=True)
    bars = Column(axis, [_bar(row, scale, page) for row in rows], "left")
    return table(fitted, [TableLayout([bars, *columns])], page)


def bar_scale(rows: Sequence[ShareRow], width: int) -> charts.Scale:
    """The scale of all bars of the table."""
    lengths = [charts.length(row.shares) for row in rows if row.shares is not None]
    limits = [row.limit for row in rows if row.limit is not None and row.shares is not None]
    return charts.Scale(charts.full_length(lengths, limits), width)


def _bar(row: ShareRow, scale: charts.Scale, page: Page) -> Text:
    if row.shares is not None:
        return charts.bar(row.shares, scale, row.limit, page)
    long, short = f"({row.why_not})", f"({_SHORT[row.why_not]})"
    (text,) = page.shorten([long if len(long) <= scale.width else short], scale.width)
    return Text(pad(text, scale.width), "dim")


def _layouts(rows: Sequence[ShareRow]) -> Iterator[TableLayout]:
    """Columns from rich to poor, the bars first in the least width that they may have."""
    total = _column("D", rows, lambda row: row.mismatch)
    short = _column("most", rows, lambda row: largest_share(row, words=False))
    words = _column("most of it\n(95% interval)", rows, lambda row: largest_share(row, words=True))
    single = _column("output\nchange", rows, lambda row: row.exact or (f"~{row.estimate}" if row.estimate else ""))
    exact = _column("output\nchange", rows, lambda row: row.exact)
    estimate = _column("esti-\nmate", rows, lambda row: row.estimate)
    with_impact = any(row.estimate or row.exact for row in rows)
    roomy, narrow = (Column("", [" " * cells] * len(rows)) for cells in (_ROOMY_BAR, _SHORTEST_BAR))
    yield TableLayout([roomy, total, words, *([exact, estimate] if with_impact else [])])
    yield TableLayout([narrow, total, short, *([single] if with_impact else [])])
    yield TableLayout([narrow, total, short])
    yield TableLayout([narrow, total])
    yield TableLayout([narrow], 0)


def _column(heading: str, rows: Sequence[ShareRow], cell: Callable[[ShareRow], str]) -> Column:
    """Figures have their points in line, words stand flush left."""
    cells = [cell(row) for row in rows]
    worded = any(char.isalpha() for text in cells for char in text)
    return Column(heading, cells, "left" if worded else "point")


def largest_share(row: ShareRow, words: bool) -> str:
    """The largest share, as a part of the bar."""
    found = None if row.shares is None else charts.largest(row.shares)
    if found is None:
        return ""
    source, share, total = found
    part = percent(share / total)
    return (
        f"{source.words} {part}{_around(source.interval(row.intervals), total)}"
        if words
        else f"{source.letter} {part:>4}"
    )


def _around(interval: Interval | None, total: float) -> str:
    """The interval of a share, as a part of the bar."""
    if interval is None:
        return ""
    low, high = (None if end is None else percent(min(max(end / total, 0), 1)) for end in interval)
    return f" (over {low})" if high is None else f" ({str(low).removesuffix('%')} to {high})"


# --- How to read it ---------------------------------------------------------------------------------------------------


def _legend(rows: Sequence[ShareRow], shown: Sequence[Layer], measured_on: str, page: Page) -> list[Text]:
    letters = _letters([row for row in rows if row.shares is not None])
    return page.labelled([("bar", letters), *how_to_read(rows, shown, measured_on)], "dim")


def how_to_read(rows: Sequence[ShareRow], shown: Sequence[Layer], measured_on: str) -> list[tuple[str, str]]:
    """What the marks of bars are, and what else is to be known of them: a mark or a word, and a sentence each."""
    return [(CENTRE, _limits(shown)), *_remarks([row for row in rows if row.shares is not None], measured_on)]


def _letters(rows: Sequence[ShareRow]) -> str:
    # The data shift has a line of its own.
    there = [
        source
        for source in SOURCES
        if source.adds_up and any(row.shares and source.of(row.shares) is not None for row in rows)
    ]
    return ", ".join(f"{source.letter} {source.words}" for source in there)


def _limits(shown: Sequence[Layer]) -> str:
    """Where the mark of a bar stands, a sentence."""
    thresholds = {layer.threshold for layer in shown}
    if len(thresholds) > 1:
        return "the layer's limit"
    threshold = thresholds.pop()
    noise, others = _limit(noise_threshold(threshold)), _limit(threshold)
    if noise == others:
        return f"the limit: {others}"
    return f"the layer's limit: for noise of batches {noise}; for all else {others}; in proportion where there is both"


def _limit(threshold: float) -> str:
    return f"n_eq {figures.plain(threshold)}, D {figures.mismatch(mismatch_iid(threshold))}"


def _remarks(rows: Sequence[ShareRow], measured_on: str) -> list[tuple[str, str]]:
    scale = bar_scale(rows, _ANY_WIDTH)
    found = [row.shares for row in rows if row.shares is not None]
    remarks = []
    if any(scale.cuts(charts.length(one)) for one in found):
        remarks.append((CUT, "bar cut off; segments keep their proportions"))
    if any(row.estimate or row.exact for row in rows):
        text = f"{OUTPUT_CHANGE} only this layer uses batch statistics{measured_on} (~ estimate)"
        remarks.append(("output", text))
    if any(one.data_shift is not None for one in found):
        remarks.append(
            ("x", "data shift of the held-out data (thin): it comes on top of D, and this limit is not for it")
        )
    if any(one.composition is None for one in found):
        remarks.append(("s", "includes non-i.i.d. batches where samples could not be regrouped"))
    if below := _below([row for row in rows if row.mark.sign]):
        remarks.append(("not drawn", f"negative shares, which offset others: {below}"))
    return remarks


def _below(rows: Sequence[ShareRow]) -> str:
    """Each source that is clearly below 0 somewhere, with the layer where it is furthest."""
    texts = []
    for source in SOURCES:
        found = [(_share(row, source), row.name) for row in rows if _clearly_below(row, source)]
        if found:
            lowest, name = min(found)
            where = f"{count(len(found), 'layer')}, down to " if len(found) > 1 else ""
            texts.append(f"{source.words} ({where}{lowest:.2g} in {name})")
    return ", ".join(texts)


def _share(row: ShareRow, source: Source) -> float:
    return 0.0 if row.shares is None else source.of(row.shares) or 0.0


def _clearly_below(row: ShareRow, source: Source) -> bool:
    share = _share(row, source)
    if row.shares is None or share >= 0:
        return False
    interval = source.interval(row.intervals)
    if interval is not None:
        return interval[1] is not None and interval[1] < 0
    return -share > _CLEARLY * charts.length(row.shares)
