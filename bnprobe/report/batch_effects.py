"""The report of ``bnprobe table``: which batches are off, and which features differ between batches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from rich.text import Text

from bnprobe.numbers import count, grouped, joined, listed, number, percent, plural
from bnprobe.records import TableBatch, TableFeature, TableReport
from bnprobe.report import figures
from bnprobe.report.page import FINE, FLAGGED, STYLES, TIMES, UNMEASURED, Page, RenderOptions, to_string
from bnprobe.report.rows import Cell
from bnprobe.report.table import Column, Mark, Names, dropping, table
from bnprobe.stats.theory import equivalent_batch_size

MOST_BATCHES = 20
"""So many batches are shown, those that are off first, unless all are asked for."""

MOST_FEATURES = 10
"""The same of features, those that differ most."""

_LEAST_NAME = 16

BATCH_HEADINGS = ("rows", "n_eq", "D", "at random", "differs in", "farthest")
FEATURE_HEADINGS = ("explained", "rate", "location", "scale", "farthest")


def render(found: TableReport, options: RenderOptions) -> str:
    """The report as text in lines of at most ``options.width`` cells."""
    page = Page.of(options)
    parts = [
        page.heading(heading(found)),
        page.verdict(sign(found), f"{one_line(found)}.", sentences(found)),
        _batches(found, page, options.show_all),
        _features(found, page, options.show_all),
        page.section("Not judged", skipped(found, options.show_all)),
        page.section("Adjusted", adjusted(found)),
        page.section("Notes", found.notes),
    ]
    return to_string(parts, options.color)


# --- In words ---------------------------------------------------------------------------------------------------------


def noun(found: TableReport) -> str:
    """What a batch is called: as its column is, where that is a word."""
    return found.batch if re.fullmatch(r"[a-z]{2,20}", found.batch) else "batch"


def heading(found: TableReport) -> str:
    """What was measured."""
    kept = f"; effects of {joined(found.covariates)} taken into account" if found.covariates else ""
    batches, features = count(len(found.batches), noun(found)), count(len(found.features), "feature")
    return f"{found.data}: {count(found.rows, 'row')} in {batches}, {features}{kept}"


def one_line(found: TableReport) -> str:
    """The result, e.g. "3 of 8 plates are off; 212 of 2,000 features differ ..."."""
    batches, several = len(found.batches), plural(noun(found))
    off = sum(batch.off for batch in found.batches)
    differ = sum(feature.differs for feature in found.features)
    return (
        f"{off} of {batches} {several} {'is' if off == 1 else 'are'} off; {differ:,} of"
        f" {count(len(found.features), 'feature')} {'differs' if differ == 1 else 'differ'} between {several} at a"
        f" false discovery rate of {100 * found.fdr:g}%"
    )


def sign(found: TableReport) -> str:
    """Whether anything is off."""
    return FINE if found.ok else FLAGGED


def sentences(found: TableReport) -> list[str]:
    """What the verdict rests on."""
    several = plural(noun(found))
    said = [
        f"The {noun(found)} explains {percent(found.explained)} of the variance of a feature on average, beyond chance."
    ]
    if any(batch.off for batch in found.batches):
        said.append(
            f"Population: the {count(len(found.population), noun(found))} that agree."
            if found.agree
            else f"Fewer than half of the {several} agree, so that each is compared with all rows: the table does not"
            " tell which of them are right."
        )
    return said


def adjusted(found: TableReport) -> Iterator[str]:
    """What adjusting did, a sentence each."""
    how = found.adjusted
    if how is None:
        return
    name, several = noun(found), plural(noun(found))
    to = f"those of {name} {how.reference}" if how.reference is not None else f"the mean of all {several}"
    keeps = f" Effects of {joined(found.covariates)} are kept." if found.covariates else ""
    yield f"{how.output}: location and scale of the {several} brought to {to}.{keeps}"
    differ = count(how.differing, "feature") if how.differing else "no feature"
    yield (
        f"Measured again: the {name} explains {percent(how.explained)} of the variance, and {differ}"
        f" {'differs' if how.differing < 2 else 'differ'} between {several}."
    )
    if how.mean_only:
        some = len(how.mean_only) < len(found.batches)
        yield f"The scale{f' of {listed(how.mean_only, 6)}, of one row,' if some else ''} was left as it is."
    if how.unchanged:
        yield (
            f"{count(len(how.unchanged), 'feature')} left as {'it is' if len(how.unchanged) == 1 else 'they are'}:"
            f" {listed(how.unchanged, 6)} (constant, in one {name} or in all, or too few values)."
        )
    if how.entangled:
        yield (
            f"{joined([*how.entangled, name])} are hardly told apart (see the notes): a shift of a {name} may have been"
            " kept as an effect, or an effect taken out as a shift."
        )
    if not how.shrunk:
        yield "There is one feature to adjust: its estimates lean on no others."


def skipped(found: TableReport, show_all: bool) -> list[str]:
    """The features that could not be judged, those of one reason together."""
    names = grouped((each.reason, each.name) for each in found.skipped)
    return [f"{listed(each, len(each) if show_all else 6)}: {reason}." for reason, each in names.items()]


# --- Figures ----------------------------------------------------------------------------------------------------------


def n_eq(batch: TableBatch) -> str:
    """n_eq of a batch."""
    return figures.equivalent_batch_size(batch.equivalent_batch_size) if batch.mismatch is not None else UNMEASURED


def mismatch(batch: TableBatch) -> str:
    """D of a batch."""
    return UNMEASURED if batch.mismatch is None else figures.mismatch(batch.mismatch)


def differing(found: TableReport, batch: TableBatch) -> str:
    """In how many features it differs."""
    return f"{len(batch.differing):,}" if found.features else ""


def farthest(found: TableReport, batch: TableBatch, most: int = 2) -> str:
    """The features in which a batch is farthest from the population, e.g. "IL6 (+2.3), TNF (-1.1, × 0.4)"."""
    differ = set(batch.differing)
    places = zip(found.features, batch.r, batch.d, strict=True)
    return _largest(((feature.name, r, d) for feature, r, d in places if feature.name in differ), most)


def _largest(cells: Iterable[tuple[str, float | None, float | None]], most: int = 2) -> str:
    """The names of the cells (name, r, d) that are farthest from the population, each with its map."""
    measured = [(d * d + (1 - (1.0 if r is None else r)) ** 2, name, r, d) for name, r, d in cells if d is not None]
    ranked = sorted(measured, key=lambda cell: -cell[0])
    return ", ".join(f"{name} ({affine(r, d)})" for _, name, r, d in ranked[:most])


def affine(r: float | None, d: float | None) -> str:
    """The map between a batch and the population, e.g. "+2.3, × 0.4"; a scale that is nearly the same is left out."""
    if d is None:
        return UNMEASURED
    scale = "" if r is None or 0.8 < r < 1.25 else f", {TIMES} {number(r)}"
    return f"{d:+.1f}{scale}" if abs(d) >= 0.05 else f"{d:+.2f}{scale}"


def shown_batches(found: TableReport, show_all: bool) -> list[TableBatch]:
    """The batches to show, in their order: those that are farthest off."""
    ranked = sorted(found.batches, key=lambda batch: (not batch.off, -(batch.mismatch or 0.0)))
    kept = {batch.name for batch in (ranked if show_all else ranked[:MOST_BATCHES])}
    return [batch for batch in found.batches if batch.name in kept]


def farthest_features(found: TableReport, show_all: bool) -> list[tuple[TableFeature, str]]:
    """The features that differ most, and the batches that are farthest in each."""
    ranked = sorted(
        (place for place, feature in enumerate(found.features) if feature.differs),
        key=lambda place: (-found.features[place].explained, found.features[place].rate),
    )
    shown = ranked if show_all else ranked[:MOST_FEATURES]
    return [(found.features[place], _farthest_batches(found, place)) for place in shown]


def _farthest_batches(found: TableReport, place: int) -> str:
    name = found.features[place].name
    differ = (batch for batch in found.batches if name in batch.differing)
    return _largest((batch.name, batch.r[place], batch.d[place]) for batch in differ)


def batch_rows(found: TableReport) -> list[tuple[str, ...]]:
    """Sign, name and figures of each batch, for tables of other formats."""
    return [
        (
            FLAGGED if batch.off else FINE,
            batch.name,
            f"{batch.rows:,}",
            n_eq(batch),
            mismatch(batch),
            figures.span(batch.expected_interval),
            differing(found, batch),
            farthest(found, batch),
        )
        for batch in found.batches
    ]


def feature_rows(shown: Sequence[tuple[TableFeature, str]]) -> list[tuple[str, ...]]:
    """Name and figures of features, for tables of other formats."""
    return [
        (
            feature.name,
            percent(feature.explained),
            probability(feature.rate),
            probability(feature.location),
            probability(feature.scale),
            where,
        )
        for feature, where in shown
    ]


def probability(value: float) -> str:
    """A p-value or a rate, e.g. "0.03", "2e-07", "<1e-99"."""
    if value < 1e-99:
        return "<1e-99"
    return f"{value:.0e}" if value < 0.001 else f"{value:.2g}"


def legend(found: TableReport) -> list[str]:
    """How to read the table of batches."""
    name = noun(found)
    return [
        f"n_eq: the {name} is as far from the population as so many i.i.d. rows would be. D: mean squared difference"
        f" between normalizing by the {name} and by the population; at random: 95% of what it is where rows are dealt"
        f" to the {plural(name)} at random. Farthest: d, the mean in standard deviations of the population, and {TIMES}"
        " r, the standard deviation over that of the population."
    ]


def feature_legend(found: TableReport) -> str:
    """How to read the table of features."""
    return (
        f"Explained: part of its variance that the {noun(found)} explains, beyond chance. Rate: false discovery rate of"
        " the smaller p-value, of location (F-test) or scale (Brown-Forsythe)."
    )


def cells(found: TableReport) -> Iterator[dict[str, Cell]]:
    """A row for each batch and feature."""
    total = sum(batch.rows for batch in found.batches if batch.name in found.population)
    for batch in found.batches:
        differ = set(batch.differing)
        for feature, r, d in zip(found.features, batch.r, batch.d, strict=True):
            each = None if d is None else d * d + (0.0 if r in (None, 0.0) else (1 - r) ** 2)
            yield {
                "batch": batch.name,
                "feature": feature.name,
                "rows": batch.rows,
                "off": batch.off,
                "r": r,
                "d": d,
                "mismatch": each,
                "equivalent_batch_size": _size(each, batch, found, total),
                "differs": feature.name in differ,
                "feature_differs": feature.differs,
                "rate": feature.rate,
                "location": feature.location,
                "scale": feature.scale,
                "explained": feature.explained,
            }


def _size(each: float | None, batch: TableBatch, found: TableReport, total: int) -> float | None:
    if each is None:
        return None
    return equivalent_batch_size(each, total) if batch.name in found.population else equivalent_batch_size(each)


# --- Tables -----------------------------------------------------------------------------------------------------------


def _batches(found: TableReport, page: Page, show_all: bool) -> list[Text]:
    shown = shown_batches(found, show_all)
    columns = [
        Column("rows", [f"{batch.rows:,}" for batch in shown]),
        Column("n_eq", [n_eq(batch) for batch in shown], "point"),
        Column("D", [mismatch(batch) for batch in shown], "point"),
        Column("at random", [figures.span(batch.expected_interval) for batch in shown], "left"),
        Column("differs in", [differing(found, batch) for batch in shown]),
        Column("farthest", [farthest(found, batch) for batch in shown], "left"),
    ]
    one = [Column("farthest", [farthest(found, batch, 1) for batch in shown], "left")]
    marks = [Mark(each, STYLES[each]) for each in (FLAGGED if batch.off else FINE for batch in shown)]
    names = Names([batch.name for batch in shown], heading=found.batch, marks=marks)
    layouts = [
        *dropping(columns, (), _LEAST_NAME),
        *dropping(columns[:-1] + one, ("at random", "farthest"), _LEAST_NAME),
    ]
    hidden = len(found.batches) - len(shown)
    said = [
        *legend(found),
        f"{count(hidden, noun(found))} not shown; {page.every} shows all." if hidden else "",
    ]
    which = "the population" if found.agree else "all rows"
    return [
        *page.heading(f"{plural(noun(found)).capitalize()} against {which}"),
        *table(names, layouts, page),
        *page.paragraphs(said, first=""),
    ]


def _features(found: TableReport, page: Page, show_all: bool) -> list[Text]:
    shown = farthest_features(found, show_all)
    if not shown:
        return []
    rows = feature_rows(shown)
    columns = [
        Column(head, [row[place] for row in rows], "left" if head == "farthest" else "right")
        for place, head in enumerate(FEATURE_HEADINGS, start=1)
    ]
    hidden = sum(feature.differs for feature in found.features) - len(shown)
    said = [
        feature_legend(found),
        f"{count(hidden, 'more feature')} {'differs' if hidden == 1 else 'differ'}; {page.every} shows all."
        if hidden
        else "",
    ]
    names = Names([feature.name for feature, _ in shown], heading="feature")
    return [
        *page.heading("Features that differ most"),
        *table(names, dropping(columns, ("scale", "location", "farthest"), _LEAST_NAME), page),
        *page.paragraphs(said, first=""),
    ]
