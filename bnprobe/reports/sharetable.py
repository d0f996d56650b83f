"""The lines of stacked bars: names, bars, and the figures right of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from bnprobe.records import Interval, Layer, ShareIntervals, Shares
from bnprobe.reports import figures, stacked
from bnprobe.reports.layout import Page, pad

_SIGN_WIDTH = 3
_GAP = "  "
_SHORTEST_BAR, _LONGEST_BAR = 20, 56
_ROOMY_BAR = 32
_NAMES = 34
"""So much room for names, or as much as the longest needs, is kept before a column is shown in its wide form."""


@dataclass(frozen=True)
class Row:
    """A line: a layer, or the model.

    Attributes:
        mismatch: D of the row, as printed.
        threshold: Where its limit lies; None: no mark.
        why_not: Why there is no bar.
    """

    sign: str
    style: str
    name: str
    shares: Shares | None
    intervals: ShareIntervals | None
    mismatch: str
    threshold: float | None
    estimate: str = ""
    exact: str = ""
    why_not: str = ""


_Column = tuple[tuple[str, str], Callable[[Row], str]]


def share_table(rows: Sequence[Row], network: Sequence[Layer], page: Page) -> list[Text]:
    """The lines: headings, and one for each row.

    Args:
        rows: What to show.
        network: All layers; a shortened name tells a layer from all of them.
        page: What the lines are written on.
    """
    longest = max(cell_len(page.clean(name)) for name in ["layer", *(row.name for row in rows)])
    blocks, rest = _fit(rows, longest, page)
    short = _names(rows, network, min(longest, max(rest - _SHORTEST_BAR, rest // 2)), page)
    room = max(map(cell_len, [*short, "layer"]))
    scale = bar_scale(rows, min(rest - room, _LONGEST_BAR))
    bars = [Text(" " * scale.width), _axis(scale), *(_bar(row, scale, page) for row in rows)]
    starts = [("", "", "dim"), ("", "layer", "dim")]
    starts += [(row.sign, name, row.style) for row, name in zip(rows, short, strict=True)]
    lines = [
        _line(page.clean(mark), pad(name, room), style, drawn, cells)
        for (mark, name, style), drawn, *cells in zip(starts, bars, *blocks, strict=True)
    ]
    return lines if lines[0].plain.strip() else lines[1:]


def _fit(rows: Sequence[Row], longest: int, page: Page) -> tuple[list[list[str]], int]:
    """The columns right of the bars in the richest layout that fits, and what they leave for names and bars."""
    for columns, needed in _layouts(rows, min(longest, _NAMES)):
        blocks = [_block(heading, text, rows, page) for heading, text in columns]
        rest = page.width - _SIGN_WIDTH - len(_GAP) - sum(len(_GAP) + cell_len(block[0]) for block in blocks)
        if rest >= needed:
            break
    return blocks, rest


def _names(rows: Sequence[Row], network: Sequence[Layer], room: int, page: Page) -> list[str]:
    """The names, told from all layers of the network; the model's own is not shortened like a layer's."""
    return page.shorten([*(row.name for row in rows), *(layer.name for layer in network)], room)[: len(rows)]


def _axis(scale: stacked.Scale) -> Text:
    """What the ends of a bar mean."""
    return Text("0" + pad(figures.mismatch(scale.full), scale.width - 1, right=True), "dim")


def bar_scale(rows: Sequence[Row], width: int) -> stacked.Scale:
    """The scale of all bars of the table."""
    lengths = [stacked.length(row.shares) for row in rows if row.shares is not None]
    limits = [stacked.limit(row.threshold) for row in rows if row.threshold is not None]
    return stacked.Scale(stacked.full_length(lengths, limits), width)


def _bar(row: Row, scale: stacked.Scale, page: Page) -> Text:
    if row.shares is not None:
        return stacked.bar(row.shares, scale, row.threshold, page)
    (text,) = page.shorten([f"({row.why_not})"], scale.width)
    return Text(pad(text, scale.width), "dim")


def _layouts(rows: Sequence[Row], names: int) -> list[tuple[list[_Column], int]]:
    """Columns right of the bars, from rich to poor, and the room that names and bars must keep for each."""
    total: _Column = (("", "D"), lambda row: row.mismatch)
    short: _Column = (("", "most"), lambda row: _largest(row, words=False))
    words: _Column = (("most of it", "(95% interval)"), lambda row: _largest(row, words=True))
    single: _Column = (("moves", "output"), _impact)
    exact: _Column = (("moves", "output"), lambda row: row.exact)
    estimate: _Column = (("esti-", "mate"), lambda row: row.estimate)
    with_impact = any(row.estimate or row.exact for row in rows)
    return [
        ([total, words, *([exact, estimate] if with_impact else [])], _ROOMY_BAR + names),
        ([total, short, *([single] if with_impact else [])], _SHORTEST_BAR + min(names, 20)),
        ([total, short], _SHORTEST_BAR + min(names, 16)),
        ([total], _SHORTEST_BAR + min(names, 10)),
        ([], 0),
    ]


def _impact(row: Row) -> str:
    return row.exact or (f"~{row.estimate}" if row.estimate else "")


def _largest(row: Row, words: bool) -> str:
    """The largest share, as a part of the bar."""
    drawn = [] if row.shares is None else stacked.drawn(row.shares)
    held = [(source, share) for source, share in drawn if source.field != "data_shift"]  # which comes on top
    total = sum(share for _, share in held)
    if not total:
        return ""
    source, share = max(held, key=lambda pair: pair[1])
    part = figures.percent(share / total)
    return (
        f"{source.words} {part}{_around(source.interval(row.intervals), total)}"
        if words
        else f"{source.letter} {part:>4}"
    )


def _around(interval: Interval | None, total: float) -> str:
    """The interval of a share, as a part of the bar."""
    if interval is None:
        return ""
    low, high = (None if end is None else figures.percent(min(max(end / total, 0), 1)) for end in interval)
    return f" (over {low})" if high is None else f" ({str(low).removesuffix('%')} to {high})"


def _block(heading: tuple[str, str], text: Callable[[Row], str], rows: Sequence[Row], page: Page) -> list[str]:
    texts = [page.clean(text(row)) for row in rows]
    left = any(char.isalpha() for cell in texts for char in cell)
    aligned = texts if left else figures.points_in_line(texts)
    cells = [*heading, *aligned]
    width = max(map(cell_len, cells))
    return [pad(cell, width, right=not left) for cell in cells]


def _line(mark: str, name: str, style: str, drawn: Text, cells: Sequence[str]) -> Text:
    start = Text(pad(mark, _SIGN_WIDTH) + name)
    line = start + _GAP + drawn + "".join(_GAP + cell for cell in cells)
    extent = {"dim": len(line), "bold": len(start)}.get(style.partition(" ")[0], _SIGN_WIDTH)
    line.stylize(style, 0, extent)
    return line
