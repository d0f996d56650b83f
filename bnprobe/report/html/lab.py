"""The page of an experiment, and its first chart as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from bnprobe.numbers import count
from bnprobe.records import LabChart, LabReport
from bnprobe.report import figures
from bnprobe.report import lab as words
from bnprobe.report.html.curves import colours, curves
from bnprobe.report.html.page import (
    Block,
    Card,
    Cell,
    Chart,
    Column,
    Document,
    Facts,
    Figure,
    Fold,
    Row,
    Section,
    Table,
    Tiles,
    style_sheet,
)
from bnprobe.report.html.parts import points, reproduce


def lab_page(found: LabReport) -> Document:
    """The page of an experiment."""
    return Document(
        title=words.title(found),
        sign=words.sign(found),
        verdict=f"{words.one_line(found)}.",
        sentences=(" ".join(filter(None, (found.question, found.answer))), words.over_seeds(found)),
        top=(Tiles(tuple(_tiles(found))),),
        sections=(
            Section("claims", "What was claimed, and what the figures say", tuple(_claims(found)), "Claims"),
            Section("symbols", "Symbols", tuple(_symbols(found))),
            Section("figures", "Figures", tuple(map(_figure, found.charts))),
            Section(
                "tables",
                "Tables",
                tuple(_table(each.title, each.columns, each.rows, each.legend) for each in found.tables),
            ),
            Section("notes", "Notes", points(found.notes)),
            Section("trials", "Every trial", tuple(_trials(found)), "Trials"),
            Section("how", "How this was measured", tuple(_how(found)), "How measured"),
        ),
    )


def _tiles(found: LabReport) -> Iterator[tuple[str, str, str]]:
    for verdict, label in (("shown", "Shown"), ("refuted", "Refuted"), ("open", "Left open")):
        number = sum(claim.verdict == verdict for claim in found.claims)
        yield label, str(number), f"of {count(len(found.claims), 'claim')}"
    yield (
        "Trials",
        f"{len(found.trials):,}",
        f"{count(found.seeds, 'seed')}, {figures.duration(found.seconds)} of one core",
    )


def _claims(found: LabReport) -> Iterator[Block]:
    for claim in found.claims:
        verdict = words.in_words(claim.verdict).capitalize()
        yield Card(words.SIGNS[claim.verdict], claim.text, "", ((f"{verdict}.", claim.evidence),))


def _symbols(found: LabReport) -> Iterator[Block]:
    if letters := words.symbols(found):
        yield Facts(tuple(letters))


def _figure(chart: LabChart) -> Figure:
    columns, rows = words.cells(chart)
    says = f"{chart.title}: {chart.y} against {chart.x}, of {', '.join(series.name for series in chart.series)}."
    return Figure(
        chart.name,
        chart.title,
        (Chart(curves(chart), says),),
        _table(words.headline(chart), columns, rows),
        chart.legend,
        tuple((look, f"{name} (theory, dashed)" if theory else name) for name, look, theory in colours(chart)),
    )


def _table(
    caption: str, columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...], legend: tuple[str, ...] = ()
) -> Table:
    headings = tuple(Column(heading, number=place > 0) for place, heading in enumerate(columns))
    return Table(caption, headings, tuple(Row(tuple(map(Cell, row))) for row in rows), legend=legend)


def _trials(found: LabReport) -> Iterator[Block]:
    settings = list(dict.fromkeys(name for trial in found.trials for name in trial.condition))
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.values))
    names = [name for name in names if not any(isinstance(trial.values.get(name), tuple) for trial in found.trials)]
    rows = tuple(
        Row(
            (
                *(Cell(str(trial.condition.get(name, ""))) for name in settings),
                Cell(str(trial.seed), trial.seed),
                *(_value(trial.values.get(name)) for name in names),
            )
        )
        for trial in found.trials
    )
    columns = [*(Column(name, number=False) for name in settings), Column("seed"), *map(Column, names)]
    yield Fold(count(len(found.trials), "trial"), (Table("Every trial", tuple(columns), rows, tools=()),))


def _value(value: float | tuple[float | None, ...] | None) -> Cell:
    return Cell(f"{value:.4g}", value) if isinstance(value, float | int) else Cell("")


def _how(found: LabReport) -> Iterator[Block]:
    yield Facts((*words.facts(found), *words.machine(found)))
    yield from reproduce(words.command(found))


# --- A picture --------------------------------------------------------------------------------------------------------


def picture(found: LabReport) -> str:
    """The first chart as an SVG on white, with its legend; its text is in the font of the reader.

    Raises:
        UsageError: What draws it is not installed.
    """
    import vl_convert

    spec = curves(found.charts[0], keyed=True) | {"width": 520, "background": "white"}
    light = dict(re.findall(r"(--[\w-]+): (#\w+)", style_sheet().partition("@media")[0]))
    text = re.sub(r"var\((--[\w-]+)\)", lambda name: light[name[1]], json.dumps(spec))
    drawn: str = vl_convert.vegalite_to_svg(json.loads(text))
    return f"{drawn}\n"
