"""The results of an experiment: what was claimed, what the figures say, and the figures, as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from bnprobe.numbers import count, joined, number
from bnprobe.records import ClaimVerdict, Estimate, LabChart, LabReport, LabSeries, LabTable
from bnprobe.report import figures, markdown
from bnprobe.report.page import FINE, FLAGGED, UNDECIDED, UNMEASURED, Page, RenderOptions, to_string
from bnprobe.report.table import Column, Names, TableLayout, table

SIGNS: dict[ClaimVerdict, str] = {"shown": FINE, "refuted": FLAGGED, "open": UNDECIDED}
"""How each verdict is marked."""

_OPEN = "left open"


def render(found: LabReport, options: RenderOptions) -> str:
    """The results as text in lines of at most ``options.width`` cells."""
    page = Page.of(options)
    parts = [
        page.heading(title(found)),
        page.labelled([("question", found.question), *facts(found)]),
        [line for claim in found.claims for line in _claim(SIGNS[claim.verdict], claim.text, claim.evidence, page)],
        page.paragraph(over_seeds(found)),
        *(_chart(chart, page) for chart in (found.charts if options.show_all else found.charts[:1])),
        *(_table(each, page) for each in found.tables if options.show_all),
        page.section("Notes", found.notes),
        page.verdict(sign(found), f"{one_line(found)}."),
    ]
    return to_string(parts, options.color)


def render_markdown(found: LabReport, options: RenderOptions) -> str:
    """The page of results that is kept with the code: claims, every figure, and how they were made."""
    prose = markdown.prose
    claims = [
        f"- **{_in_words(claim.verdict).capitalize()}.** {prose(claim.text)} {prose(claim.evidence)}"
        for claim in found.claims
    ]
    parts = [
        f"# {prose(found.title)}",
        prose(found.question),
        f"{prose(one_line(found))}. {prose(over_seeds(found))}",
        "\n".join(claims),
        f"![{prose(found.charts[0].title)}]({found.experiment}.svg)" if found.charts else "",
        *(f"## {prose(each.title)}\n\n{_rows(*cells(each))}{_said(each.legend)}" for each in found.charts),
        *(f"## {prose(each.title)}\n\n{_rows(each.columns, each.rows)}{_said(each.legend)}" for each in found.tables),
        "## How this was measured",
        "\n".join(f"- {prose(label)}: {prose(value)}" for label, value in (*facts(found), *machine(found))),
        "\n".join(f"- {prose(note)}" for note in found.notes),
        f"```sh\n{command(found)}\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def command(found: LabReport) -> str:
    """The command that runs the experiment again; the user's own data is not named."""
    options = [f"--budget {found.budget:g}"] if found.budget != 1 else []
    return " ".join(["bnprobe lab", found.experiment, *options, f"--seeds {found.seeds}"])


def title(found: LabReport) -> str:
    """Name and subject."""
    return f"{found.experiment}: {found.title}"


def one_line(found: LabReport) -> str:
    """The result in one line, e.g. "5 of 7 claims shown, 1 refuted, 1 left open"."""
    verdicts = [claim.verdict for claim in found.claims]
    rest = [f"{verdicts.count(each)} {_in_words(each)}" for each in SIGNS if each != "shown" and each in verdicts]
    return ", ".join([f"{verdicts.count('shown')} of {count(len(verdicts), 'claim')} shown", *rest])


def over_seeds(found: LabReport) -> str:
    """What ± stands for, a sentence."""
    if found.seeds == 1:
        return "Figures are of one seed, without intervals: claims that need one are left open."
    return f"Figures with ± are means over {found.seeds} seeds, and half of their 95% intervals (Student's t)."


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


def _in_words(verdict: ClaimVerdict) -> str:
    return _OPEN if verdict == "open" else verdict


def _claim(mark: str, text: str, evidence: str, page: Page) -> Iterator[Text]:
    lines = page.verdict(mark, text)
    for line in lines:
        line.style = ""
    yield from lines
    yield from page.paragraphs([evidence], style="dim")


def _chart(chart: LabChart, page: Page) -> list[Text]:
    columns, rows = cells(chart)
    return _figures(f"{chart.title} ({chart.y})", columns, rows, chart.legend, page)


def _table(found: LabTable, page: Page) -> list[Text]:
    return _figures(found.title, found.columns, found.rows, found.legend, page)


def _figures(
    heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]], legend: Sequence[str], page: Page
) -> list[Text]:
    """A table; columns that do not fit the page are left out from the right, and said to be."""
    names = Names([row[0] for row in rows], heading=columns[0])
    made = [
        Column(_broken(heading), [row[place] for row in rows], "point")
        for place, heading in enumerate(columns[1:], start=1)
    ]
    layouts = [TableLayout(made[:most]) for most in range(len(made), 0, -1)]
    shown = next((each for each in layouts if _fits(each, names, page)), layouts[-1])
    left = [column.heading.replace("\n", " ") for column in made[len(shown.columns) :]]
    said = [*legend, f"Not shown: {joined(left)}; --all and a wider terminal, or the page." if left else ""]
    return [*page.heading(heading), *table(names, [shown], page), *page.paragraphs(said, first="")]


def _fits(layout: TableLayout, names: Names, page: Page) -> bool:
    wide = names.indent + max(names.longest(page), len(names.heading))
    return wide + sum(2 + column.width(page) for column in layout.columns) <= page.width


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
