"""Tables that fit the page: a column of names, which are shortened, and columns that are dropped where need be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.text import Text

from bnprobe.report.figures import points_in_line
from bnprobe.report.page import ARROW, STYLES, Page, pad

MARK_WIDTH = 3
"""Cells for the marks before the names."""


_INDENT = 2
_GAP = "  "


@dataclass(frozen=True)
class Mark:
    """What stands before a row: a sign and its style.

    A bold style is that of the name too, a dim one that of the whole line.
    """

    sign: str = ""
    style: str = ""

    @classmethod
    def of(cls, sign: str, rank: str = "") -> Mark:
        """A sign of how a layer stands, in its own style, before its rank."""
        return cls(sign + rank, STYLES[sign])


@dataclass(frozen=True)
class Column:
    """A column of cells.

    Attributes:
        heading: In one line, or in two with a line break between them.
        cells: One for each row; `Text` is drawn as it is.
        align: "point": flush right with the decimal points in line.
        foot: What stands under the last row.
    """

    heading: str
    cells: Sequence[str | Text]
    align: Literal["left", "right", "point"] = "right"
    foot: str = ""

    def block(self, page: Page, lines_of_heading: int) -> list[Text]:
        """All cells of the column, of equal width: the heading, the rows, the foot."""
        headings = [page.clean(line) for line in self.heading.split("\n")]
        headings = [""] * (lines_of_heading - len(headings)) + headings
        texts = [cell.plain if isinstance(cell, Text) else page.clean(cell) for cell in self.cells]
        if self.align == "point":
            texts = points_in_line(texts)
        texts = [*headings, *texts, page.clean(self.foot)]
        width = max(map(cell_len, texts))
        cells = [Text(pad(text, width, right=self.align != "left")) for text in texts]
        drawn = ((index, cell) for index, cell in enumerate(self.cells, lines_of_heading) if isinstance(cell, Text))
        for index, cell in drawn:
            cells[index] = cell + " " * (width - cell_len(cell.plain))
        return cells

    def width(self, page: Page) -> int:
        """Terminal cells that the column takes."""
        return cell_len(self.block(page, 2)[0].plain)


@dataclass(frozen=True)
class Names:
    """The column of names.

    Attributes:
        names: One for each row.
        heading: In one line; it stands in the last line of the headings.
        marks: One for each row; empty: no room is kept for marks.
        among: Further names that a shortened name must stay different from.
        most: Terminal cells that names may take at most.
        last: Names stand in the last column, not in the first.
    """

    names: Sequence[str]
    heading: str = "layer"
    marks: Sequence[Mark] = ()
    among: Sequence[str] = ()
    most: int | None = None
    last: bool = False

    @property
    def indent(self) -> int:
        """Terminal cells before the first column."""
        return MARK_WIDTH if any(mark.sign for mark in self.marks) else _INDENT

    def longest(self, page: Page) -> int:
        """Terminal cells that the longest name takes."""
        return max((cell_len(page.clean(name)) for name in self.names), default=0)

    def fitted(self, room: int, page: Page) -> list[str]:
        """The names in at most ``room`` cells."""
        room = max(room if self.most is None else min(room, self.most), len(self.heading))
        names = list(dict.fromkeys([*self.among, *self.names]))  # in an order that is that of all tables
        shown = dict(zip(names, page.shorten(names, room), strict=True))
        return [shown[name] for name in self.names]


def layer_names(
    names: Sequence[str], network: Sequence[str], page: Page, marks: Sequence[Mark] = (), last: bool = False
) -> Names:
    """A column of names of layers; each has one spelling in all tables of a page that is not very narrow.

    Args:
        names: One for each row.
        network: All layers of the report.
        page: What the table is written on.
        marks, last: As in ``Names``.
    """
    return Names(names, marks=marks, among=network, most=page.width * 3 // 5, last=last)


@dataclass(frozen=True)
class TableLayout:
    """Columns to show if ``least`` cells are left for the names; None: as many as the longest name needs."""

    columns: Sequence[Column]
    least: int | None = None


def dropping(columns: Sequence[Column], expendable: Sequence[str], least: int | None = None) -> Iterator[TableLayout]:
    """Layouts that drop columns one by one, those with these headings, in this order; ``least`` as in a layout."""
    yield TableLayout(columns, least)
    for heading in expendable:
        columns = [column for column in columns if column.heading != heading]
        yield TableLayout(columns, least)


def fit(
    layouts: Iterator[TableLayout] | Sequence[TableLayout], names: Names, page: Page
) -> tuple[Sequence[Column], int]:
    """The columns of the first layout that fits, else of the last one, and the room that they leave for the names."""
    longest = max(names.longest(page), len(names.heading)) if names.names else 0
    longest = longest if names.most is None else min(longest, names.most)
    columns: Sequence[Column] = ()
    room = 0
    for layout in layouts:
        columns = layout.columns
        room = page.width - names.indent - sum(len(_GAP) + column.width(page) for column in columns)
        if room >= (longest if layout.least is None else min(longest, layout.least)):
            break
    return columns, room


def table(names: Names, layouts: Iterator[TableLayout] | Sequence[TableLayout], page: Page) -> list[Text]:
    """Lines of a table in the first layout that fits; lines of headings and a foot only where there are any.

    Args:
        names: The column of names; without names there is none.
        layouts: From rich to poor.
        page: What the lines are written on.
    """
    columns, room = fit(layouts, names, page)
    headings = max([1, *(column.heading.count("\n") + 1 for column in columns)])
    blocks = [column.block(page, headings) for column in columns]
    if names.names:
        shown = [*[""] * (headings - 1), names.heading, *names.fitted(room, page), ""]
        width = 0 if names.last else max(map(cell_len, shown))
        blocks.insert(len(blocks) if names.last else 0, [Text(pad(name, width)) for name in shown])
    dim = Mark(style="dim")
    rows = len(blocks[0]) - headings - 1
    marks = [*[dim] * headings, *(names.marks or [Mark()] * rows), dim]
    lines = [_line(mark, cells, names.indent, page) for mark, *cells in zip(marks, *blocks, strict=True)]
    kept = [line for line in lines[:headings] if line.plain.strip()] + lines[headings:-1]
    return [*kept, *([lines[-1]] if lines[-1].plain.strip() else [])]


def _line(mark: Mark, cells: Sequence[Text], indent: int, page: Page) -> Text:
    line = Text(pad(page.clean(mark.sign), indent)) + Text(_GAP).join(cells)
    extent = {"dim": len(line), "bold": indent + len(cells[0])}.get(mark.style.partition(" ")[0], indent)
    line.stylize(mark.style, 0, extent)
    return line


def arrows(pairs: Sequence[tuple[str, str]], page: Page) -> list[str]:
    """Cells "before -> after" with both sides aligned by their decimal points."""
    if not pairs:
        return []
    before, after = (points_in_line([page.clean(cell) for cell in side]) for side in zip(*pairs, strict=True))
    left, right = (max(map(cell_len, side)) for side in (before, after))
    return [
        f"{pad(start, left, right=True)} {page.clean(ARROW)} {pad(end, right, right=True)}"
        for start, end in zip(before, after, strict=True)
    ]
