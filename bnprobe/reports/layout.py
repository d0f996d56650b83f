"""Lines of text of a given width: paragraphs, labelled values, and names shortened to fit.

Widths are counted in terminal cells, not characters. Lines are `rich.text.Text`, never markup, so that a name
such as "[red]" stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from bnprobe.reports import glyphs

MINIMUM_WIDTH = 40


@dataclass(frozen=True)
class Page:
    """What the lines are written on.

    Attributes:
        width: Terminal cells in a line.
        unicode: Whether more than ASCII may be used.
    """

    width: int
    unicode: bool

    def clean(self, text: str) -> str:
        """Text that this page can show; see `glyphs.clean`."""
        return glyphs.clean(text, self.unicode)

    def paragraph(self, text: str, style: str = "", first: str = "", rest: str | None = None) -> list[Text]:
        """Text wrapped at words; ``first`` precedes the first line, ``rest`` (or blanks) the others."""
        rest = " " * cell_len(first) if rest is None else rest
        room = self.width - max(cell_len(first), cell_len(rest))
        lines = Text(self.clean(text)).wrap(_MEASURE, room, overflow="fold")
        marks = [first] + [rest] * (len(lines) - 1)
        plain = [line.plain.rstrip() for line in lines]
        return [Text(mark) + Text(line, style) for mark, line in zip(marks, plain, strict=True)]

    def heading(self, text: str) -> list[Text]:
        """The title of a part of the report."""
        return self.paragraph(text, style="bold")

    def labelled(self, rows: Sequence[tuple[str, str]]) -> list[Text]:
        """Lines of a label and a value, the values aligned and wrapped."""
        width = max((cell_len(label) for label, _ in rows), default=0) + 2
        lines: list[Text] = []
        for label, value in rows:
            block = self.paragraph(value, first=pad(label, width))
            block[0].stylize("dim", 0, len(label))
            lines += block
        return lines

    def shorten(self, names: Sequence[str], width: int) -> list[str]:
        """The names, cleaned, each in at most ``width`` cells; different names stay different.

        The middle is left out, at the point nearest to it that keeps the shortened names apart; where no
        point does, the names that collide are numbered.
        """
        cleaned = [self.clean(name) for name in names]
        mark = self.clean(glyphs.ELLIPSIS)
        room = max(width - cell_len(mark), 0)
        tails = sorted(range(room + 1), key=lambda tail: (abs(2 * tail - room), -tail))
        for tail in tails:
            short = [_elide(name, width, mark, tail) for name in cleaned]
            if len(set(short)) == len(set(names)):
                return short
        return _number([_elide(name, width, mark, tails[0]) for name in cleaned], names, width)


def pad(text: str, width: int, right: bool = False) -> str:
    """Text filled with blanks to ``width`` cells."""
    blanks = " " * (width - cell_len(text))
    return blanks + text if right else text + blanks


def to_string(lines: Iterable[Text], color: bool) -> str:
    """The lines as one string, with ANSI colours if wanted, without trailing blanks."""
    out = StringIO()
    # NO_COLOR, COLUMNS and TERM are the command line's to read: a format depends on its options only.
    console = Console(
        file=out,
        color_system="standard" if color else None,
        force_terminal=color,
        legacy_windows=False,
        highlight=False,
        width=1_000_000,
        _environ={},
    )
    for line in lines:
        line.rstrip()
        console.print(line, soft_wrap=True)
    return out.getvalue()


_MEASURE = Console(file=StringIO(), color_system=None, legacy_windows=False, _environ={})


def _elide(name: str, width: int, mark: str, tail: int) -> str:
    if cell_len(name) <= width:
        return name
    head = width - cell_len(mark) - tail
    return _take(name, head) + mark + _take(name[::-1], tail)[::-1]


def _take(text: str, cells: int) -> str:
    """The longest beginning of ``text`` that fits into ``cells``."""
    used = 0
    for index, char in enumerate(text):
        used += cell_len(char)
        if used > cells:
            return text[:index]
    return text


def _number(short: list[str], names: Sequence[str], width: int) -> list[str]:
    order = {name: index for index, name in enumerate(dict.fromkeys(names), start=1)}
    ends = [f"#{order[name]}" for name in names]
    return [
        _take(label, width - cell_len(end)) + end if short.count(label) > 1 else label
        for label, end in zip(short, ends, strict=True)
    ]
