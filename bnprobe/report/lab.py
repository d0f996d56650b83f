"""The results of an experiment: what was claimed, what the figures say, and the figures, as text and as Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from rich.text import Text

from bnprobe.numbers import count, number
from bnprobe.records import Claim, ClaimVerdict, Estimate, LabChart, LabReport, LabSeries, LabTable
from bnprobe.records.lab import FEWEST_SEEDS
from bnprobe.report import figures, markdown
from bnprobe.report.page import FINE, FLAGGED, UNDECIDED, UNMEASURED, Page, RenderOptions, to_string
from bnprobe.report.table import Column, Names, TableLayout, table

SIGNS: dict[ClaimVerdict, str] = {"shown": FINE, "refuted": FLAGGED, "open": UNDECIDED}
"""How each verdict is marked."""

_OPEN = "left open"

SYMBOLS: Mapping[str, str] = {
    "D": "mismatch of batch and running statistics: how far what a layer gives with one is from what it gives with the"
    " other, squared; the mean over batches and channels of d^2 + (r - 1)^2",
    "r": "standard deviation of the batch over the running one",
    "d": "mean of the batch less the running mean, over the running standard deviation",
    "n_eq": "how many independent normal values a batch is worth: with so many, D would be as it is",
    "e_n": "mean of r over batches of n independent normal values; their D is 2 (1 - e_n)",
    "B": "samples in a batch",
    "B_eff": "how many independent values the mean of B correlated ones is worth",
    "m": "momentum: the weight of the newest batch in running statistics",
    "q": "variance of a step of a random walk over that of the noise of a batch",
}
"""What letters stand for, in claims, charts and tables."""

DERIVED = "docs/explanation/equations.md"
"""Where the equations are."""


def render(found: LabReport, options: RenderOptions) -> str:
    """The results as text in lines of at most ``options.width`` cells."""
    page = Page.of(options)
    about = [("question", found.question), ("answer", found.answer), *facts(found)]
    parts = [
        page.heading(title(found)),
        page.labelled([(label, value) for label, value in about if value]),
        [line for claim in found.claims for line in _claim(claim, page)],
        page.paragraph(over_seeds(found)),
        *(_chart(chart, page) for chart in (found.charts if options.show_all else found.charts[:1])),
        *(_table(each, page) for each in found.tables if options.show_all),
        _symbols(found, page),
        page.section("Notes", found.notes),
        page.verdict(sign(found), f"{one_line(found)}."),
    ]
    return to_string(parts, options.color)


def render_markdown(found: LabReport, options: RenderOptions) -> str:
    """The page of results that is kept with the code: claims, every figure, and how they were made."""
    prose = markdown.prose
    claims = [
        f"- **{in_words(claim.verdict).capitalize()}.** {prose(claim.text)} {prose(claim.evidence)}"
        for claim in found.claims
    ]
    letters = [f"- {prose(symbol)}: {prose(meaning)}" for symbol, meaning in symbols(found)]
    parts = [
        f"# {prose(found.title)}",
        prose(found.question),
        prose(found.answer),
        f"{prose(one_line(found))}. {prose(over_seeds(found))}",
        "\n".join(claims),
        f"![{prose(found.charts[0].title)}]({found.experiment}.svg)" if found.charts else "",
        *(f"## {prose(headline(each))}\n\n{_rows(*cells(each))}{_said(each.legend)}" for each in found.charts),
        *(f"## {prose(each.title)}\n\n{_rows(each.columns, each.rows)}{_said(each.legend)}" for each in found.tables),
        *(["## Symbols", "\n".join(letters)] if letters else []),
        "## How this was measured",
        "\n".join(f"- {prose(label)}: {prose(value)}" for label, value in (*facts(found), *machine(found))),
        "\n".join(f"- {prose(note)}" for note in found.notes),
        f"```sh\n{command(found)}\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def command(found: LabReport) -> str:
    """The command that gives the same figures."""
    options = [f"--budget {found.budget:g}"] if found.budget != 1 else []
    data = [f"--data {shlex.quote(found.folder)}"] if found.folder is not None else []
    return " ".join(["bnprobe lab", found.experiment, *data, *options, f"--seeds {found.seeds}"])


def title(found: LabReport) -> str:
    """Name and subject."""
    return f"{found.experiment}: {found.title}"


def one_line(found: LabReport) -> str:
    """The result in one line, e.g. "5 of 7 claims shown, 1 refuted, 1 left open"."""
    verdicts = [claim.verdict for claim in found.claims]
    rest = [f"{verdicts.count(each)} {in_words(each)}" for each in SIGNS if each != "shown" and each in verdicts]
    return ", ".join([f"{verdicts.count('shown')} of {count(len(verdicts), 'claim')} shown", *rest])


def over_seeds(found: LabReport) -> str:
    """What ± stands for, in sentences."""
    if found.seeds < FEWEST_SEEDS:
        what = "of one seed" if found.seeds == 1 else f"means over {found.seeds} seeds"
        return f"Figures are {what}, without intervals, which need {FEWEST_SEEDS}: claims that need one are left open."
    said = [
        f"Figures with ± are means over {found.seeds} seeds, and half of their 95% intervals (Student's t); of fewer"
        f" than {FEWEST_SEEDS} there is none."
    ]
    texts = [found.answer, *_texts(found), *(each for chart in found.charts for row in cells(chart)[1] for each in row)]
    if any(_ALIKE.search(text) for text in texts):
        said.append("± 0: all seeds gave the same; of N images, an accuracy shows no difference below 1/N.")
    return " ".join(said)


_ALIKE = re.compile(r"± 0(?![.\d])")


def symbols(found: LabReport) -> list[tuple[str, str]]:
    """The letters that the results use, and what they stand for; last, where their formulas are from."""
    texts = [found.question, found.answer, *found.notes, *_texts(found)]
    used: set[str] = set()
    while new := {each for each in SYMBOLS if each not in used and any(_uses(text, each) for text in texts)}:
        used |= new
        texts = [SYMBOLS[each] for each in new]
    meanings = [(symbol, meaning) for symbol, meaning in SYMBOLS.items() if symbol in used]
    return [*meanings, *([("derived in", DERIVED)] if "D" in used else [])]


def _uses(text: str, symbol: str) -> bool:
    return re.search(rf"(?<![\w-]){symbol}(?![\w'-])", text) is not None


def _texts(found: LabReport) -> Iterator[str]:
    """What is written of claims, charts and tables, but for the figures of charts."""
    for claim in found.claims:
        yield from (claim.text, claim.evidence)
    for chart in found.charts:
        yield from (chart.title, chart.x, chart.y, *chart.legend, *(series.name for series in chart.series))
    for table_ in found.tables:
        yield from (table_.title, *table_.columns, *table_.legend, *(each for row in table_.rows for each in row))


def sign(found: LabReport) -> str:
    """How the claims stand together: whether all are decided."""
    return UNDECIDED if any(claim.verdict == "open" for claim in found.claims) or not found.claims else FINE


def facts(found: LabReport) -> list[tuple[str, str]]:
    """What the experiment follows, and how much was run."""
    work = f"{count(len(found.trials), 'trial')} with {count(found.seeds, 'seed')}, budget {number(found.budget)}"
    rows = [
        ("after", "; ".join(found.sources) or "an open question"),
        ("data", found.data),
        ("work", f"{work}, {figures.duration(found.seconds)} of one core"),
    ]
    return [(label, value) for label, value in rows if value]


def machine(found: LabReport) -> list[tuple[str, str]]:
    """Where it ran."""
    where = found.environment
    return [("software", f"bnprobe {found.tool.version}, torch {where.torch}, Python {where.python}, {where.platform}")]


def headline(chart: LabChart) -> str:
    """What a table of its figures is of, with their unit."""
    return chart.title if chart.y.lower() in chart.title.lower() else f"{chart.title} ({chart.y})"


def cells(chart: LabChart) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The figures of a chart as a table: a row for each x, a column for each series."""
    places = sorted_places(chart)
    rows = [(_place(at), *(_at(series, at) for series in chart.series)) for at in places]
    return (chart.x, *(series.name for series in chart.series)), tuple(rows)


def sorted_places(chart: LabChart) -> list[float | str]:
    """Every x of a chart, once: numbers in their order, names as they come."""
    places = list(dict.fromkeys(at for series in chart.series for at in series.x))
    return places if any(isinstance(at, str) for at in places) else sorted(places)


def value_at(series: LabSeries, index: int) -> str:
    """A value with half its interval, as tables show it."""
    value, low, high = series.y[index], series.low[index], series.high[index]
    if value is None:
        return UNMEASURED
    return figures.estimate(Estimate(value, None if low is None else (low, high)))


def _at(series: LabSeries, at: float | str) -> str:
    return value_at(series, series.x.index(at)) if at in series.x else ""


def _place(at: float | str) -> str:
    return at if isinstance(at, str) else f"{at:g}"


def in_words(verdict: ClaimVerdict) -> str:
    """E.g. "left open"."""
    return _OPEN if verdict == "open" else verdict


def _claim(claim: Claim, page: Page) -> Iterator[Text]:
    lines = page.verdict(SIGNS[claim.verdict], f"{in_words(claim.verdict).capitalize()}: {claim.text}")
    for line in lines:
        line.style = ""
    yield from lines
    yield from page.paragraphs([claim.evidence], style="dim")


def _symbols(found: LabReport, page: Page) -> list[Text]:
    letters = page.labelled(symbols(found))
    return [*page.heading("Symbols"), *letters] if letters else []


def _chart(chart: LabChart, page: Page) -> list[Text]:
    columns, rows = cells(chart)
    return _figures(headline(chart), columns, rows, chart.legend, page)


def _table(found: LabTable, page: Page) -> list[Text]:
    return _figures(found.title, found.columns, found.rows, found.legend, page)


def _figures(
    heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]], legend: Sequence[str], page: Page
) -> list[Text]:
    """A table; columns that do not fit the page go on in further ones below, with the same rows."""
    names = Names([row[0] for row in rows], heading=columns[0])
    parts: list[list[int]] = []
    for place in range(1, len(columns)):
        tried = [*(parts[-1] if parts else []), place]
        if parts and _width(names, [_column(each, columns, rows) for each in tried], page) <= page.width:
            parts[-1] = tried
        else:
            parts.append([place])
    lines = page.heading(heading)
    for places in parts:
        own = [row for row in rows if len(parts) == 1 or any(row[place] for place in places)]
        names = Names([row[0] for row in own], heading=columns[0])
        layout = TableLayout([_column(place, columns, own) for place in places])
        lines += [*([] if places is parts[0] else [Text()]), *table(names, [layout], page)]
    return [*lines, *page.paragraphs(legend, first="")]


def _column(place: int, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Column:
    return Column(_broken(columns[place]), [row[place] for row in rows], "point")


def _width(names: Names, columns: Sequence[Column], page: Page) -> int:
    wide = names.indent + max(names.longest(page), len(names.heading))
    return wide + sum(2 + column.width(page) for column in columns)


def _broken(heading: str) -> str:
    """In two lines of about the same length."""
    words = heading.split()
    if len(words) < 2 or len(heading) < 12:
        return heading
    ends = [sum(map(len, words[:end])) + end - 1 for end in range(1, len(words))]
    cut = min(ends, key=lambda end: abs(end - len(heading) / 2))
    return f"{heading[:cut]}\n{heading[cut + 1 :]}"


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown.table([markdown.prose(each) for each in columns], [[*map(markdown.prose, row)] for row in rows])


def _said(legend: Sequence[str]) -> str:
    return "".join(f"\n\n{markdown.prose(each)}" for each in legend)
