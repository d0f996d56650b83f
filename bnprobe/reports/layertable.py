"""The table of layers: one line for each layer (and call), in network order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.text import Text

from bnprobe.records import Distribution, Layer, PathMeasurement
from bnprobe.reports import figures, glyphs, sparkline
from bnprobe.reports.layout import Page, pad
from bnprobe.reports.standing import STYLES, sign, with_sign, worse_path, worst_first

MARKED_WORST = 3
"""So many of the worst flagged layers carry their rank beside the sign."""

_SIGN_WIDTH = 3
_GAP = "  "


@dataclass(frozen=True)
class Row:
    """A line of the table: a layer, or one call of it."""

    sign: str
    style: str
    name: str
    kind: str
    channels: str
    values: str
    limit: str
    train: PathMeasurement | None
    eval: PathMeasurement | None


@dataclass(frozen=True)
class Column:
    """A column: two lines of heading, the text of a row, and what stands under the last row."""

    heading: tuple[str, str]
    text: Callable[[Row], str]
    align: Literal["left", "right", "point"] = "right"
    foot: str = ""


@dataclass(frozen=True)
class Layout:
    """What is shown where there is room.

    Attributes:
        half: Cells in half a histogram; 0 for none.
        extras: Columns beyond those that are always there.
        names: The layout is taken only if this much room is left for names, or as much as the longest needs.
    """

    half: int
    extras: frozenset[str]
    names: int = 34


LAYOUTS = (
    Layout(8, frozenset({"kind", "channels", "values", "interval", "clipped"})),
    Layout(8, frozenset({"kind", "channels", "interval", "clipped"})),
    Layout(6, frozenset({"kind", "channels", "interval", "clipped"})),
    Layout(6, frozenset({"kind", "channels", "clipped"})),
    Layout(6, frozenset({"kind", "channels"})),
    Layout(5, frozenset({"kind", "channels"})),
    Layout(5, frozenset({"channels"})),
    Layout(5, frozenset()),
    Layout(4, frozenset(), names=12),
    Layout(0, frozenset(), names=0),
)
"""From rich to poor; the first that fits is taken."""


def table(layers: Sequence[Layer], network: Sequence[Layer], page: Page) -> list[Text]:
    """The lines of the table: headings, layers, and the axes of the histograms.

    Args:
        layers: The layers to show.
        network: All layers; a shortened name tells a layer from all of them, not only from those shown.
        page: What the table is written on.
    """
    ranks = _ranks(layers)
    rows = [row for layer in layers for row in _rows(layer, ranks)]
    body, room = _fit(rows, layers, page)
    names = page.shorten([*(row.name for row in rows), *(layer.name for layer in network)], room)[: len(rows)]
    width = max(cell_len(name) for name in [*names, "layer"])
    signs = ["", "", *(page.clean(row.sign) for row in rows), ""]
    styles = ["dim", "dim", *(row.style for row in rows), "dim"]
    parts = zip(signs, ["", "layer", *names, ""], styles, body, strict=True)
    lines = [_line(pad(mark, _SIGN_WIDTH) + pad(name, width), style, cells) for mark, name, style, cells in parts]
    return lines if lines[-1].plain.strip() else lines[:-1]


def legend(layers: Sequence[Layer], page: Page) -> list[Text]:
    """How to read the table."""
    limits = {layer.threshold for layer in layers}
    limit = figures.plain(limits.pop()) if len(limits) == 1 else "its limit"
    entries = (
        ("n_eq", f"behaves as if the batch were n_eq values; flagged when surely below {limit}"),
        ("D", "mean squared gap between batch and running normalization, worse path"),
        ("r, d", "batch std / running std, and (batch mean - running mean) / running std"),
        ("train", "the network runs on batch statistics; eval: on running statistics"),
    )
    lines = page.labelled(entries)
    for line in lines:
        line.stylize("dim")
    return lines


def _fit(rows: Sequence[Row], layers: Sequence[Layer], page: Page) -> tuple[list[list[str]], int]:
    """The cells of each line in the richest layout that leaves room for the names, and that room."""
    longest = max(cell_len(page.clean(name)) for name in ["layer", *(row.name for row in rows)])
    for layout in LAYOUTS:
        blocks = [_block(column, rows, page) for column in _columns(layout, layers)]
        room = page.width - _SIGN_WIDTH - sum(len(_GAP) + cell_len(block[0]) for block in blocks)
        if room >= min(longest, layout.names):
            break
    return [list(cells) for cells in zip(*blocks, strict=True)], room


def _columns(layout: Layout, layers: Sequence[Layer]) -> list[Column]:
    several_kinds = len({layer.kind for layer in layers}) > 1
    several_limits = len({layer.threshold for layer in layers}) > 1
    optional = (
        ("kind" in layout.extras and several_kinds, Column(("", "kind"), lambda row: row.kind, "left")),
        ("channels" in layout.extras, Column(("", "chan"), lambda row: row.channels)),
        ("values" in layout.extras, Column(("values in", "a batch"), lambda row: row.values)),
        (several_limits, Column(("", "limit"), lambda row: row.limit)),
        (True, Column(("n_eq", "train"), lambda row: figures.path_equivalent(row.train), "point")),
        (True, Column(("n_eq", "eval"), lambda row: figures.path_equivalent(row.eval), "point")),
        ("interval" in layout.extras, Column(("n_eq 95%", "worse path"), _interval)),
        (True, Column(("D", "worse"), _mismatch, "point")),
        (layout.half > 0, _histogram("r", sparkline.R_AXIS, layout.half)),
        (layout.half > 0, _histogram("d", sparkline.D_AXIS, layout.half)),
        ("clipped" in layout.extras, Column(("r out of", "1/3..3"), lambda row: _clipped(row, "r"))),
        ("clipped" in layout.extras, Column(("d out of", "-5..5"), lambda row: _clipped(row, "d"))),
    )
    return [column for wanted, column in optional if wanted]


def _histogram(name: Literal["r", "d"], axis: sparkline.Axis, half: int) -> Column:
    def text(row: Row) -> str:
        values = _distribution(row, name)
        return " " * half + glyphs.CENTRE if values is None else sparkline.draw(values.histogram, axis, half)

    heading = (" " * half + name, " " * (half - 2) + "train")
    return Column(heading, text, "left", sparkline.ruler(axis, half))


def _distribution(row: Row, name: Literal["r", "d"]) -> Distribution | None:
    return None if row.train is None else row.train.r if name == "r" else row.train.d


def _clipped(row: Row, name: Literal["r", "d"]) -> str:
    values = _distribution(row, name)
    return glyphs.UNMEASURED if values is None else figures.percent(values.clipped)


def _interval(row: Row) -> str:
    path = worse_path(row.train, row.eval)
    if path is None:
        return glyphs.UNMEASURED
    return figures.equivalent_interval(path.equivalent_batch_size_interval)


def _mismatch(row: Row) -> str:
    path = worse_path(row.train, row.eval)
    return glyphs.UNMEASURED if path is None else figures.mismatch(path.mismatch)


def _block(column: Column, rows: Sequence[Row], page: Page) -> list[str]:
    """The cells of a column, of equal width: two headings, the rows, the foot."""
    texts = [page.clean(column.text(row)) for row in rows]
    if column.align == "point":
        texts = figures.points_in_line(texts)
    cells = [*column.heading, *texts, column.foot]
    width = max(cell_len(cell) for cell in cells)
    return [pad(cell, width, right=column.align != "left") for cell in cells]


def _line(start: str, style: str, cells: Sequence[str]) -> Text:
    """A line of the table; the style is for the sign and, if bold, the name; headings are dim throughout."""
    line = Text(start + "".join(_GAP + cell for cell in cells))
    extent = {"dim": len(line), "bold": len(start)}.get(style.partition(" ")[0], _SIGN_WIDTH)
    line.stylize(style, 0, extent)
    return line


def _ranks(layers: Sequence[Layer]) -> dict[str, str]:
    """Rank of the worst layers; a lone flagged layer needs none."""
    flagged = worst_first(with_sign(layers, glyphs.FLAGGED))
    if len(flagged) < 2:
        return {}
    return {layer.name: str(rank) for rank, layer in enumerate(flagged[:MARKED_WORST], start=1)}


def _rows(layer: Layer, ranks: dict[str, str]) -> list[Row]:
    mark = sign(layer)
    row = Row(
        sign=mark + ranks.get(layer.name, ""),
        style=STYLES[mark],
        name=layer.name,
        kind=layer.kind.replace("BatchNorm", "BN"),
        channels=str(layer.channels),
        values=str(layer.values_per_channel),
        limit=figures.plain(layer.threshold),
        train=layer.train,
        eval=layer.eval,
    )
    return [row, *_call_rows(layer)]


def _call_rows(layer: Layer) -> list[Row]:
    return [
        Row(
            sign="",
            style="",
            name=f"  call {call.index + 1} of {layer.calls_per_forward}",
            kind="",
            channels="",
            values=str(call.values_per_channel),
            limit="",
            train=call.train,
            eval=call.eval,
        )
        for call in layer.calls
    ]
