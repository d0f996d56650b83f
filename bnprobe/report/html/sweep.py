"""The page of a sweep: from which batch size on layers pass, and which rate of the running average tracks best."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import count
from bnprobe.records import MomentumPoint, MomentumSweep, SweepLayer, SweepPoint, SweepReport, Tracking
from bnprobe.report import figures
from bnprobe.report import sweep as words
from bnprobe.report.html import charts
from bnprobe.report.html.network import size_figure
from bnprobe.report.html.page import (
    Block,
    Cell,
    Chart,
    Column,
    Document,
    Facts,
    Figure,
    Row,
    Section,
    Table,
    Tiles,
    signs_among,
)
from bnprobe.report.html.parts import environment, next_step, points, reproduce, skipped_cards
from bnprobe.report.html.vega import LINES
from bnprobe.report.next_step import sweep_step
from bnprobe.report.page import UNMEASURED, RenderOptions, standing
from bnprobe.stats.theory import equivalent_batch_size

_STARTS = ("loaded", "converged", "shifted")
"""What the running average starts from: fields of a ``MomentumPoint``."""


def sweep_page(report: SweepReport, options: RenderOptions) -> Document:
    """The page of a sweep."""
    momentum = report.momentum
    tracking = words.tracking_in_words(momentum) if momentum else ()
    return Document(
        title=words.title(report),
        sign=words.verdict_sign(report),
        verdict=f"{words.one_line(report)}.",
        sentences=(*words.conclusion(report), *tracking),
        top=(Tiles(tuple(_tiles(report))), *next_step(sweep_step(report, options.command))),
        sections=(
            Section("sizes", "Inference at each batch size", tuple(_sizes(report)), "Inference"),
            Section("layers", "From which batch size on a layer passes", tuple(_smallest(report)), "All layers"),
            Section("training", words.TRAINED_SIZES, tuple(_trained(report)), "Training"),
            Section("momentum", "The running average", tuple(_momentum(momentum)) if momentum else ()),
            Section("skipped", "Layers that could not be judged", tuple(skipped_cards(report.skipped)), "Skipped"),
            Section("notes", "Notes", points([*report.scan.notes, *report.notes])),
            Section("how", "How this was measured", tuple(_how(report, options)), "How measured"),
        ),
    )


def _tiles(report: SweepReport) -> Iterator[tuple[str, str, str]]:
    flagged = sum(layer.flagged for layer in report.layers)
    yield "Layers flagged", f"{flagged} of {len(report.layers)}", f"at batch size {report.scan.batch_size}"
    sizes = [point.batch_size for layer in report.layers for point in layer.eval]
    if sizes:
        likely, surely = report.smallest.likely, report.smallest.surely
        certain = f"significantly (95%): {words.passing_size(surely, max(sizes))}"
        yield "Every layer passes from", words.passing_size(likely, max(sizes)), certain


def _sizes(report: SweepReport) -> Iterator[Block]:
    curves = [
        charts.SizeCurve(layer.name, tuple(_size_point(point) for point in layer.eval))
        for layer in report.layers
        if layer.eval
    ]
    if not curves:
        return
    yield size_figure(curves, report.scan.batch_size)
    yield _size_table([(layer, point) for layer in report.layers for point in layer.eval], "Inference, by batch size")


def _size_point(point: SweepPoint) -> charts.SizePoint:
    return charts.SizePoint(point.batch_size, point.mismatch, point.interval, point.theory, point.limit)


def _size_table(points: list[tuple[SweepLayer, SweepPoint]], caption: str) -> Table:
    headings = tuple(Column(heading.capitalize()) for heading in words.SIZE_HEADINGS)
    rows = tuple(Row(tuple(Cell(text) for text in row)) for row in words.size_rows(points))
    return Table(caption, (*headings, Column("Worst layer", number=False)), rows)


def _smallest(report: SweepReport) -> Iterator[Block]:
    measured = [layer for layer in report.layers if layer.eval]
    if not measured:
        return
    scanned = report.scan.batch_size
    largest = max(point.batch_size for layer in measured for point in layer.eval)
    columns = (
        Column("Layer", number=False),
        Column("Depth"),
        Column(f"n_eq at {scanned}"),
        Column("Limit"),
        Column("Passes from"),
        Column("At 95% from"),
        Column("Kind", number=False),
        Column("Channels"),
    )
    rows = tuple(_layer_row(layer, depth, scanned, largest) for depth, layer in enumerate(measured, start=1))
    present = signs_among(standing(layer.flagged, layer.undecided) for layer in measured)
    yield Table(words.SMALLEST_SIZES, columns, rows, present, tuple(words.what_limits_are(measured, scanned)))


def _layer_row(layer: SweepLayer, depth: int, scanned: int, largest: int) -> Row:
    point = words.at_size(layer, scanned)
    limit = equivalent_batch_size(point.limit)
    n_eq = point.equivalent_batch_size
    sizes = (layer.smallest.likely, layer.smallest.surely)
    return Row(
        (
            Cell(layer.name, sign=standing(layer.flagged, layer.undecided), note=layer.note or ""),
            Cell(str(depth), depth),
            Cell(figures.equivalent_batch_size(n_eq), 1e300 if n_eq is None else n_eq),
            Cell(figures.equivalent_batch_size(limit), limit),
            *(Cell(words.passing_size(size, largest), size or 2 * largest) for size in sizes),
            Cell(layer.kind),
            Cell(f"{layer.channels:,}", layer.channels),
        ),
        f"layer-{depth}",
    )


def _trained(report: SweepReport) -> Iterator[Block]:
    points = [(layer, point) for layer in report.layers for point in layer.train]
    if len({point.batch_size for _, point in points}) > 1:
        yield _size_table(points, words.TRAINED_SIZES)


# --- Rates of the running average -------------------------------------------------------------------------------------


def _momentum(sweep: MomentumSweep) -> Iterator[Block]:
    starts = [start for start in _STARTS if _tracking(sweep.model.points[0], start) is not None]
    best = {start: getattr(sweep.model.best, start) for start in starts}
    tracked = [
        charts.RatePoint(
            words.rate_in_words(point.rate), start, found.mismatch, found.standard_error, point.rate == best[start][0]
        )
        for start in starts
        for point in sweep.model.points
        if (found := _tracking(point, start)) is not None
    ]
    yield Figure(
        "rates",
        words.rates_title(sweep),
        (Chart(charts.rates(tracked), f"D at {count(len(sweep.model.points), 'rate')} of the running average."),),
        _rate_table(sweep, starts),
        ("Ring: best, in the table *.", *words.rates_legend(sweep)),
        tuple(zip(LINES, starts, strict=False)),
    )
    if len(sweep.layers) > 1:
        yield _best_rates(sweep, starts)
    yield from points(f"{one.name} ({one.kind}) not replayed: {one.reason}" for one in sweep.omitted)


def _tracking(point: MomentumPoint, start: str) -> Tracking | None:
    found: Tracking | None = getattr(point, start)
    return found


def _rate_table(sweep: MomentumSweep, starts: list[str]) -> Table:
    columns = (
        Column("Rate"),
        Column("Effective batches"),
        *(Column(heading) for start in starts for heading in (start.capitalize(), "±")),
        *([Column("Recovery")] if "shifted" in starts else []),
    )
    late = f"> {sweep.batches - sweep.batches // 2}"
    rows = tuple(
        Row(
            (
                Cell(words.rate_in_words(point.rate)),
                Cell("" if point.effective_batches is None else f"{point.effective_batches:,.1f}"),
                *(cell for start in starts for cell in _tracked(point, start, sweep)),
                *([Cell(late if point.recovery is None else str(point.recovery))] if "shifted" in starts else []),
            )
        )
        for point in sweep.model.points
    )
    return Table("D at each rate, mean over the layers, with its standard error", columns, rows)


def _tracked(point: MomentumPoint, start: str, sweep: MomentumSweep) -> tuple[Cell, Cell]:
    found = _tracking(point, start)
    if found is None:
        return Cell(UNMEASURED), Cell(UNMEASURED)
    error = found.standard_error
    mismatch = words.marked(found.mismatch, point, getattr(sweep.model.best, start))
    return Cell(mismatch), Cell(figures.known(error, words.rate_mismatch))


def _best_rates(sweep: MomentumSweep, starts: list[str]) -> Table:
    columns = (Column("Layer", number=False), Column("Own"), *(Column(f"Best {start}") for start in starts))
    rows = tuple(
        Row(
            (
                Cell(curve.layer or ""),
                Cell(words.rate_in_words(curve.momentum)),
                *(Cell(words.with_ties(getattr(curve.best, start))) for start in starts),
            )
        )
        for curve in sweep.layers
    )
    return Table(words.BEST_RATES, columns, rows)


def _how(report: SweepReport, options: RenderOptions) -> Iterator[Block]:
    yield Facts((*words.what_was_run(report), *environment(report.environment)))
    yield from reproduce(options.command)
