"""A page of HTML: blocks in sections, written by templates that escape all text, in one file that loads nothing.

What a page shows is data: a `Document` of plain records. Scripts and styles are those of this folder and of Vega; the
page names them by their hashes in its content security policy, so that nothing else runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, ClassVar

from bnprobe.registry import require
from bnprobe.report.page import FINE, FLAGGED, INFO, UNDECIDED, UNMEASURED, WARNING, clean

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

STANDINGS = {
    FLAGGED: "flagged",
    UNDECIDED: "undecided",
    FINE: "fine",
    UNMEASURED: "unmeasured",
    WARNING: "warning",
    INFO: "remark",
}
"""What signs are called: for those who do not see them, and as classes of the style sheet."""


def signs_among(found: Iterable[str]) -> tuple[str, ...]:
    """The signs that rows of a table carry, each once, the worst first."""
    return tuple(sorted(set(found), key=list(STANDINGS).index))


# --- Blocks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What is shown.
        order: What the column is sorted by; None: comes last, as what was not measured.
        sign: Shown before the text.
        note: Shown below the text, small.
    """

    text: str
    order: float | None = None
    sign: str = ""
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: Its heading.
        number: Whether its cells are figures, set flush right.
        on_paper: Whether it is printed, too: paper has less room.
    """

    heading: str
    number: bool = True
    on_paper: bool = True


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        cells: One for each column; the first names the row.
        anchor: What links lead to; empty: none do.
    """

    cells: tuple[Cell, ...]
    anchor: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column heads the rows.

    Attributes:
        caption: What it holds.
        columns, rows: As shown.
        tools: Whether the reader can sort and filter it, and what the signs that rows can be filtered by are.
        legend: How to read it, a sentence each.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    tools: tuple[str, ...] | None = None
    legend: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A chart with its figures as a table behind it.

    Attributes:
        name: Unique in the page.
        title: What it shows.
        charts: Vega-Lite, one below the other, each with what it shows for those who do not see it.
        table: The same figures; None: the table that follows has them.
        legend: How to read it, a sentence each.
        keys: Colours and what they mean: the name of a colour of the style sheet, and words.
        columns: Columns of the chart: with many of them it can be scrolled rather than be too narrow.
    """

    kind: ClassVar[str] = "figure"
    name: str
    title: str
    charts: tuple[Chart, ...]
    table: Table | None
    legend: tuple[str, ...] = ()
    keys: tuple[tuple[str, str], ...] = ()
    columns: int = 0


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        spec: Vega-Lite, as Altair writes it.
        says: What it shows, for those who do not see it.
        heading: Above it; empty: none.
    """

    spec: dict[str, Any]
    says: str
    heading: str = ""


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    kind: ClassVar[str] = "text"
    paragraphs: tuple[str, ...]
    dim: bool = False


@dataclass(frozen=True)
class Points:
    """A list of sentences, each with a sign or without."""

    kind: ClassVar[str] = "points"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Facts:
    """Values with their labels."""

    kind: ClassVar[str] = "facts"
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Tiles:
    """The most important figures: label, value, and what else is to be said."""

    kind: ClassVar[str] = "tiles"
    items: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Command:
    """A command to copy, or lines of Python, and why."""

    kind: ClassVar[str] = "command"
    why: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """A finding: title, where, paragraphs with a word in bold before them, and where to read on."""

    kind: ClassVar[str] = "card"
    sign: str
    title: str
    where: str
    paragraphs: tuple[tuple[str, str], ...]
    link: tuple[str, str] | None = None


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on request."""

    kind: ClassVar[str] = "fold"
    summary: str
    blocks: tuple[Block, ...]
    sign: str = ""
    anchor: str = ""
    note: str = ""


Block = Table | Figure | Text | Points | Facts | Tiles | Command | Card | Fold


@dataclass(frozen=True)
class Section:
    """A part of the page; one without blocks is left out."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]
    short: str = ""


@dataclass(frozen=True)
class Document:
    """A page.

    Attributes:
        title: What the report is of.
        sign, verdict: The result in a sentence.
        sentences: What qualifies it.
        top: Blocks below the verdict.
        sections: The rest, in order.
        data: Tables that charts share, by name: the fields, and a row for each item.
    """

    title: str
    sign: str
    verdict: str
    sentences: tuple[str, ...]
    top: tuple[Block, ...]
    sections: tuple[Section, ...]
    data: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = field(default_factory=dict)


_WIDTHS = (24, 180, 400)
"""With more columns than these a chart is wider, step by step."""


def width_of(figure: Figure) -> int:
    """The step, from 1 on; the style sheet has a least width for each."""
    return 1 + sum(figure.columns > columns for columns in _WIDTHS)


# --- Writing ----------------------------------------------------------------------------------------------------------


def write(make: Callable[[], Document]) -> str:
    """The document as a page of HTML that ends with a newline.

    Raises:
        UsageError: What writes pages is not installed.
    """
    for name in ("jinja2", "altair", "vl_convert"):
        require(name, "html", "--format html")
    document = make()
    sections = [section for section in document.sections if section.blocks]
    figures = [block for section in sections for block in section.blocks if isinstance(block, Figure)]
    scripts = [_file("page.js")] if not figures else [_vega(), _file("page.js")]
    styles = [style_sheet()]
    template = _environment().get_template("page.html")
    text = template.render(
        document=document,
        sections=sections,
        charts=_clean(charts_of(figures)),
        data=_clean({**document.data, **data_of(figures)}) if figures else {},
        scripts=scripts,
        styles=styles,
        policy=_policy(scripts, styles),
    )
    # ASCII alone: whatever the file passes through on its way changes no character, and no hash of the policy.
    return text.rstrip("\n").encode("ascii", "xmlcharrefreplace").decode("ascii") + "\n"


def charts_of(figures: Iterable[Figure]) -> dict[str, dict[str, Any]]:
    """The charts by the name of the element that each is drawn in."""
    return {place: {**spec, "datasets": list(spec["datasets"])} for place, spec in _specs(figures)}


def data_of(figures: Iterable[Figure]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """What each chart draws: fields, and a row for each item, by the chart and the name of the data."""
    return {
        f"{place}/{name}": (list(rows[0]) if rows else [], [list(row.values()) for row in rows])
        for place, spec in _specs(figures)
        for name, rows in spec["datasets"].items()
    }


def _specs(figures: Iterable[Figure]) -> Iterator[tuple[str, dict[str, Any]]]:
    for figure in figures:
        for number, chart in enumerate(figure.charts, start=1):
            yield f"{figure.name}-{number}", chart.spec


@cache
def _environment() -> Environment:
    from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound

    class Beside(BaseLoader):
        """Templates of this folder, also within an archive."""

        def get_source(self, environment: Environment, template: str) -> tuple[str, str | None, Any]:
            try:
                return _file(template), None, None
            except OSError:
                raise TemplateNotFound(template) from None

    environment = Environment(
        loader=Beside(), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.finalize = _shown
    environment.filters |= {
        "script": _script,
        "json": _json,
        "standing": STANDINGS.__getitem__,
        "width": width_of,
        "name": _name,
    }
    return environment


def _shown(value: Any) -> Any:
    """Text as a terminal would show it, without invisible characters and turns of direction; the rest as it is."""
    from markupsafe import Markup

    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value, unicode=True)


def _clean(value: Any) -> Any:
    """Data in which every text is as it is shown."""
    if isinstance(value, str):
        return clean(value, unicode=True)
    if isinstance(value, dict):
        return {key: _clean(each) for key, each in value.items()}
    return [_clean(each) for each in value] if isinstance(value, list | tuple) else value


def _name(text: str) -> Markup:
    """A name, whose lines may end after its dots."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(part) for part in clean(text, unicode=True).split("."))


def style_sheet() -> str:
    """The style sheet of all pages."""
    return _file("page.css")


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, under their licence."""
    import vl_convert

    notice = (
        "/* Vega, Vega-Lite, Vega-Embed: Copyright University of Washington Interactive Data Lab, BSD-3-Clause */\n"
    )
    return notice + _as_ascii(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _as_ascii(code: str) -> str:
    """A script in which all that is not ASCII, which stands in strings and patterns, is written as an escape."""
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], code)


_NOT_ASCII = re.compile(r"[^\n\t\x20-\x7e]")


def _script(code: str) -> Markup:
    """A script of bnprobe's own or of Vega, which no end of a script element can leave."""
    from markupsafe import Markup

    return Markup(_contained(code))


def _contained(code: str) -> str:
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _json(value: Any) -> Markup:
    """Data for a script: what HTML or old JavaScript could take for an end is written as an escape of JSON."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """The content security policy: nothing is loaded, and only these scripts and styles work."""
    allowed = {
        "default-src": "'none'",
        "script-src": " ".join(_hash(_contained(code)) for code in scripts),
        "style-src": " ".join(_hash(code) for code in styles),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {sources}" for name, sources in allowed.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
