"""The page of a table: which batches are off, in which features, and the rows before and after adjusting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from bnprobe.numbers import count, percent, plural
from bnprobe.records import TableBatch, TableProjection, TableReport
from bnprobe.report import batch_effects as words
from bnprobe.report import figures
from bnprobe.report.html.page import (
    Block,
    Cell,
    Chart,
    Column,
    Document,
    Figure,
    Row,
    Section,
    Table,
    Text,
    Tiles,
)
from bnprobe.report.html.parts import points, reproduce
from bnprobe.report.html.vega import LINES, altair, colour, drawing, drawn_from, finished, hue, rounded, told, y_axis
from bnprobe.report.page import FINE, FLAGGED, UNMEASURED, Page, RenderOptions

_MOST_FEATURES = 60
"""Columns of the picture of batches and features."""

_MOST_BATCHES = 40
"""Its rows."""

_MOST_ROWS = 500
"""Rows of the table of features."""

_LINE = 18
"""Pixels of a batch."""

_LABEL = 24
"""Characters of a name beside an axis."""

_FULL = {"d": 2.0, "r": 1.0}
"""Where the colour is deepest: d, and the logarithm of r to the base 2."""

_BINS = 20

_OTHERS = "unmeasured"


def table_page(found: TableReport, options: RenderOptions) -> Document:
    """The page of a table."""
    several = plural(words.noun(found))
    return Document(
        title=words.heading(found),
        sign=words.sign(found),
        verdict=f"{words.one_line(found)}.",
        sentences=tuple(words.sentences(found)),
        top=(Tiles(tuple(_tiles(found))),),
        sections=(
            Section("batches", f"{several.capitalize()} against the population", tuple(_batches(found))),
            Section("map", f"{several.capitalize()} and features", tuple(_map(found))),
            Section("features", "Features that differ", tuple(_features(found))),
            Section("rows", "The rows", tuple(_rows(found))),
            Section("adjusted", "Adjusted", tuple(Text((text,)) for text in words.adjusted(found))),
            Section(
                "skipped", "Features that could not be judged", points(words.skipped(found, show_all=True)), "Skipped"
            ),
            Section("notes", "Notes", points(found.notes)),
            Section("how", "How this was measured", tuple(reproduce(options.command)), "How measured"),
        ),
    )


def _tiles(found: TableReport) -> Iterator[tuple[str, str, str]]:
    several = plural(words.noun(found))
    off, differ = sum(batch.off for batch in found.batches), sum(feature.differs for feature in found.features)
    yield f"{several.capitalize()} off", f"{off} of {len(found.batches)}", f"{len(found.population)} are the population"
    yield "Features that differ", f"{differ:,} of {len(found.features):,}", f"false discovery rate {100 * found.fdr:g}%"
    after = f"{percent(found.adjusted.explained)} after adjusting" if found.adjusted else "beyond chance"
    yield "Variance explained", percent(found.explained), after


# --- Batches ----------------------------------------------------------------------------------------------------------


def _batches(found: TableReport) -> Iterator[Block]:
    columns = (
        Column(found.batch, number=False),
        *(Column(head) for head in ("Rows", "n_eq", "D", "At random (95%)", "Differs in")),
        Column("Farthest", number=False),
    )
    rows = tuple(
        Row(
            (
                Cell(batch.name, sign=FLAGGED if batch.off else FINE),
                Cell(f"{batch.rows:,}", batch.rows),
                Cell(words.n_eq(batch), batch.equivalent_batch_size),
                Cell(words.mismatch(batch), batch.mismatch),
                Cell(figures.span(batch.expected_interval), batch.expected),
                Cell(words.differing(found, batch), len(batch.differing)),
                Cell(words.farthest(found, batch, 4)),
            )
        )
        for batch in found.batches
    )
    yield Table(count(len(rows), words.noun(found)), columns, rows, None, tuple(words.legend(found)))


# --- The map of batches and features ----------------------------------------------------------------------------------


def _map(found: TableReport) -> Iterator[Block]:
    places = _drawn_features(found)
    batches = sorted(found.batches, key=lambda batch: -(batch.mismatch or 0.0))[:_MOST_BATCHES]
    kept = {batch.name for batch in batches}
    shown = [batch for batch in found.batches if batch.name in kept]
    if not places or not shown:
        return
    of = f"{count(len(shown), words.noun(found))} and {count(len(places), 'feature')}"
    left_out = (
        f"Drawn: {of} of {len(found.batches):,} and {len(found.features):,}, those that are farthest apart."
        if len(places) < len(found.features) or len(shown) < len(found.batches)
        else ""
    )
    legend = [
        "d: the mean less that of the population, in standard deviations of the population. r: the standard deviation"
        " over that of the population.",
        left_out,
    ]
    yield Figure(
        "heatmap",
        "How far from the population",
        (
            Chart(cells(found, shown, places, "d"), f"d of {of}.", "d"),
            Chart(cells(found, shown, places, "r"), f"r of {of}, as a factor.", "r"),
        ),
        _map_table(found, shown, places),
        tuple(text for text in legend if text),
        (("bad", "larger"), ("after", "smaller")),
        len(places),
    )


def _drawn_features(found: TableReport) -> list[int]:
    """The features in which batches differ most, in the order of the table."""
    ranked = sorted(
        range(len(found.features)),
        key=lambda place: (not found.features[place].differs, -found.features[place].explained),
    )
    return sorted(ranked[:_MOST_FEATURES])


@drawing
def cells(found: TableReport, shown: Sequence[TableBatch], places: Sequence[int], name: str) -> dict[str, Any]:
    """A rectangle for each batch and feature: the colour says the direction, its depth how far."""
    alt = altair()
    page = Page(80, unicode=True)
    of_batches = page.shorten([batch.name for batch in shown], _LABEL)
    of_features = page.shorten([found.features[place].name for place in places], _LABEL)
    rows = []
    for batch, label in zip(shown, of_batches, strict=True):
        for place, feature in zip(places, of_features, strict=True):
            r, d = batch.r[place], batch.d[place]
            value = d if name == "d" else None if not r else math.log2(r)
            if value is None:
                continue
            rows.append(
                {
                    "row": f"{FLAGGED} {label}" if batch.off else label,
                    "column": feature,
                    "batch": batch.name,
                    "feature": found.features[place].name,
                    "look": "bad" if value > 0 else "after",
                    "depth": rounded(min(abs(value) / _FULL[name], 1.0)),
                    "d": figures.known(d, lambda each: f"{each:+.3g}"),
                    "r": figures.known(r, lambda each: f"{each:.3g}"),
                    "differs": "differs" if found.features[place].name in batch.differing else "",
                }
            )
    x = alt.X(
        "column:N",
        sort=None,
        axis=alt.Axis(title=None, labelAngle=-90, labelLimit=0, ticks=False, labels=name == "r", domain=False),
    )
    y = alt.Y("row:N", sort=None, axis=alt.Axis(title=None, labelLimit=0, ticks=False, domain=False))
    chart = drawn_from("rows")
    tooltip = told(("batch", ""), ("feature", "feature"), ("d", "d"), ("r", "r"), ("differs", ""))
    return finished(
        chart.mark_rect(stroke=colour("paper"), strokeWidth=0.5).encode(
            x=x,
            y=y,
            color=hue("look", {look: look for look in ("bad", "after")}),
            opacity=alt.Opacity("depth:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[0.03, 1])),
            tooltip=tooltip,
        ),
        height=_LINE * len(shown),
        rows=rows,
    )


def _map_table(found: TableReport, shown: Sequence[TableBatch], places: Sequence[int]) -> Table:
    columns = (Column("Feature", number=False), *(Column(batch.name) for batch in shown))
    rows = tuple(
        Row(
            (
                Cell(found.features[place].name),
                *(Cell(words.affine(batch.r[place], batch.d[place]), batch.d[place]) for batch in shown),
            )
        )
        for place in places
    )
    return Table("d, and r where it is far from 1", columns, rows)


# --- Features ---------------------------------------------------------------------------------------------------------


def _features(found: TableReport) -> Iterator[Block]:
    if not found.features:
        return
    counts = _binned([feature.location for feature in found.features])
    yield Figure(
        "p-values",
        "P-values of location",
        (Chart(histogram(counts), f"P-values of {count(len(found.features), 'feature')} in {_BINS} bins."),),
        Table(
            "Features by the p-value of location",
            (Column("Up to", number=False), Column("Features")),
            tuple(
                Row((Cell(f"{(place + 1) / _BINS:g}"), Cell(f"{each:,}", each))) for place, each in enumerate(counts)
            ),
        ),
        (f"Without batch effects every bin has as many: {len(found.features) / _BINS:,.4g}, the dashed line.",),
    )
    ranked = words.farthest_features(found, show_all=True)
    if not ranked:
        return
    columns = (
        Column("Feature", number=False),
        *(Column(head.capitalize()) for head in words.FEATURE_HEADINGS[:-1]),
        Column("Farthest", number=False),
    )
    rows = tuple(Row(tuple(Cell(text) for text in row)) for row in words.feature_rows(ranked[:_MOST_ROWS]))
    hidden = len(ranked) - len(rows)
    more = (f"{count(hidden, 'more feature')}: --format csv has all.",) if hidden else ()
    yield Table(count(len(rows), "feature"), columns, rows, None, (words.feature_legend(found), *more))


def _binned(values: Sequence[float]) -> list[int]:
    counts = [0] * _BINS
    for value in values:
        counts[min(int(value * _BINS), _BINS - 1)] += 1
    return counts


@drawing
def histogram(counts: Sequence[int]) -> dict[str, Any]:
    """Bars, and a dashed line at their mean."""
    alt = altair()
    rows = [
        {"from": place / _BINS, "to": (place + 1) / _BINS, "features": each, "text": f"{each:,}"}
        for place, each in enumerate(counts)
    ]
    x = alt.X("from:Q", axis=alt.Axis(title="p-value", grid=False), scale=alt.Scale(domain=[0, 1]))
    y = alt.Y("features:Q", axis=y_axis("features"))
    bars = drawn_from("rows").mark_bar(color=colour("after"), opacity=0.8, stroke=colour("paper"))
    line = drawn_from("mean").mark_rule(color=colour("ink"), strokeDash=[4, 4])
    return finished(
        alt.layer(
            bars.encode(
                x=x, x2="to:Q", y=y, y2=alt.datum(0), tooltip=told(("text", "features"), ("to", "p-value up to"))
            ),
            line.encode(y=alt.Y("mean:Q", axis=y_axis("features"))),
        ),
        height=160,
        rows=rows,
        mean=[{"mean": sum(counts) / _BINS}],
    )


# --- Rows -------------------------------------------------------------------------------------------------------------


def _rows(found: TableReport) -> Iterator[Block]:
    if (picture := found.projection) is None:
        return
    looks = _looks(found)
    charts = [("Before", picture.before), *([("After", picture.after)] if picture.after else [])]
    axes = [f"{percent(part)} of the variance" for part in picture.explained]
    drawn = tuple(
        Chart(
            scatter(found, picture, rows, looks),
            f"{heading}: {count(len(rows), 'row')} on the two axes along which they vary most.",
            heading if len(charts) > 1 else "",
        )
        for heading, rows in charts
    )
    rest = [(_OTHERS, f"other {plural(words.noun(found))}")] if len(looks) < len(found.batches) else []
    yield Figure(
        "projection",
        "The two axes along which rows vary most",
        drawn,
        _means(found, picture),
        (f"Principal components of the standardized features: {axes[0]} across, {axes[1]} up.",),
        (*((look, name) for name, look in looks.items()), *rest),
    )


def _looks(found: TableReport) -> dict[str, str]:
    """A colour for the batches that are farthest off, or for all where they are few; the others are grey."""
    off = sorted((batch for batch in found.batches if batch.off), key=lambda batch: -(batch.mismatch or 0.0))
    named = off or [batch for batch in found.batches if len(found.batches) <= len(LINES) - 1]
    chosen = {batch.name for batch in named[: len(LINES) - 1]}
    return dict(zip((batch.name for batch in found.batches if batch.name in chosen), LINES, strict=False))


@drawing
def scatter(
    found: TableReport, picture: TableProjection, rows: Sequence[tuple[float, float]], looks: dict[str, str]
) -> dict[str, Any]:
    """Rows as points, on axes that are the same before and after."""
    alt = altair()
    every = [*picture.before, *picture.after]
    names = [found.batches[place].name for place in picture.batches]
    drawn = [
        {"x": rounded(x), "y": rounded(y), "batch": name, "look": looks.get(name, _OTHERS)}
        for name, (x, y) in zip(names, rows, strict=True)
    ]
    drawn.sort(key=lambda row: row["look"] != _OTHERS)  # what is marked stands before the rest
    scales = [_room([point[axis] for point in every]) for axis in (0, 1)]
    axis = {"title": None, "tickCount": 5, "format": ".3~g"}
    by_look = hue("look", {look: look for look in (*LINES, _OTHERS)})
    return finished(
        drawn_from("rows")
        .mark_point(filled=True, size=28, opacity=0.75)
        .encode(
            x=alt.X("x:Q", scale=scales[0], axis=alt.Axis(**axis)),
            y=alt.Y("y:Q", scale=scales[1], axis=y_axis(None, format=".3~g")),
            color=by_look,
            tooltip=told(("batch", "")),
        ),
        height=280,
        rows=drawn,
    )


def _room(values: Sequence[float]) -> Any:
    low, high = min(values), max(values)
    room = 0.05 * ((high - low) or 1.0)
    return altair().Scale(domain=[rounded(low - room), rounded(high + room)], nice=False, zero=False)


def _means(found: TableReport, picture: TableProjection) -> Table:
    """The mean of each batch on the two axes."""
    columns = [Column(found.batch, number=False), Column("Across"), Column("Up")]
    columns += [Column("Across, after"), Column("Up, after")] if picture.after else []
    rows = []
    for place, batch in enumerate(found.batches):
        here = [row for row, of in enumerate(picture.batches) if of == place]
        cells = []
        for drawn in (picture.before, *([picture.after] if picture.after else [])):
            for axis in (0, 1):
                mean = sum(drawn[row][axis] for row in here) / len(here) if here else None
                cells.append(Cell(UNMEASURED if mean is None else f"{mean:+.3g}", mean))
        rows.append(Row((Cell(batch.name, sign=FLAGGED if batch.off else FINE), *cells)))
    return Table(f"Means of the {plural(words.noun(found))}", tuple(columns), tuple(rows))
