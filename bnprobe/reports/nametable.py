"""Tables whose rows begin with a mark and a name: columns that fit the page, the least ones dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from bnprobe.reports.layout import Page, pad

MARK_WIDTH = 3
"""As in the table of layers."""

_LEAST_NAME = 12
_GAP = "  "


@dataclass(frozen=True)
class Mark:
    """What stands before a row: a sign and its style; a bold name follows a bold sign."""

    sign: str = ""
    style: str = ""


@dataclass(frozen=True)
class Column:
    """A column; cells are flush right unless ``left``."""

    heading: str
    cells: Sequence[str]
    left: bool = False


def table(
    heading: str,
    names: Sequence[str],
    marks: Sequence[Mark],
    columns: Sequence[Column],
    page: Page,
    expendable: Sequence[str] = (),
) -> list[Text]:
    """Lines of a table.

    Args:
        heading: Of the names.
        names: One for each row; shortened where need be.
        marks: One for each row.
        columns: What follows the names.
        page: What the lines are written on.
        expendable: Headings of the columns that are dropped, in this order, where the page is too narrow.
    """
    longest = max((cell_len(page.clean(name)) for name in names), default=0)
    kept = list(columns)
    for title in expendable:
        if _room(kept, page) >= min(_LEAST_NAME, longest):
            break
        kept = [column for column in kept if column.heading != title]
    shown = [heading, *page.shorten(names, max(_room(kept, page), len(heading)))]
    width = max(map(cell_len, shown))
    rows = zip([Mark(), *marks], shown, *(_block(column, page) for column in kept), strict=True)
    lines = [_line(mark, pad(name, width), cells, page) for mark, name, *cells in rows]
    lines[0].stylize("dim")
    return lines


def arrows(pairs: Sequence[tuple[str, str]], arrow: str) -> list[str]:
    """Cells "before -> after" with both sides aligned; they are aligned by their decimal points beforehand."""
    before = max((cell_len(start) for start, _ in pairs), default=0)
    after = max((cell_len(end) for _, end in pairs), default=0)
    return [f"{pad(start, before, right=True)} {arrow} {pad(end, after, right=True)}" for start, end in pairs]


def _line(mark: Mark, name: str, cells: Sequence[str], page: Page) -> Text:
    start = pad(page.clean(mark.sign), MARK_WIDTH)
    line = Text(start + _GAP.join([name, *cells]).rstrip())
    bold = mark.style.startswith("bold")
    line.stylize(mark.style, 0, MARK_WIDTH + len(name) if bold else MARK_WIDTH)
    return line


def _block(column: Column, page: Page) -> list[str]:
    cells = [page.clean(cell) for cell in (column.heading, *column.cells)]
    width = max(map(cell_len, cells))
    return [pad(cell, width, right=not column.left) for cell in cells]


def _room(columns: Sequence[Column], page: Page) -> int:
    """What the columns leave for the names."""
    return page.width - MARK_WIDTH - sum(len(_GAP) + cell_len(_block(column, page)[0]) for column in columns)
