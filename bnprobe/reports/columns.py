"""Tables that fit their page: columns flush right, a last one of names that are shortened, the least ones dropped."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from bnprobe.reports.layout import Page, pad

_LEAST_NAME = 12
_GAP = "  "


def table(rows: Sequence[Sequence[str]], page: Page, names: bool, expendable: Sequence[str] = ()) -> list[Text]:
    """Lines of a table.

    Args:
        rows: The header, then the rest; all of the same length.
        page: What the lines are written on.
        names: Whether the last column holds names.
        expendable: Headers of the columns that are dropped, in this order, where the page is too narrow.
    """
    columns = [[page.clean(cell) for cell in column] for column in zip(*rows, strict=True)]
    last = columns.pop() if names else []
    for header in map(page.clean, expendable):
        if _room(columns, page) >= min(_LEAST_NAME, max(map(cell_len, last), default=0)):
            break
        columns = [column for column in columns if column[0] != header]
    blocks = [[pad(cell, _width(column), right=True) for cell in column] for column in columns]
    if names:
        blocks.append(page.shorten(last, _room(columns, page)))
    lines = [Text(_GAP + _GAP.join(row)) for row in zip(*blocks, strict=True)]
    lines[0].stylize("dim")
    return lines


def _width(column: Sequence[str]) -> int:
    return max(map(cell_len, column))


def _room(columns: Sequence[Sequence[str]], page: Page) -> int:
    """What the columns leave for the names."""
    return page.width - sum(_width(column) + len(_GAP) for column in columns) - len(_GAP)
