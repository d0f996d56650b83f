"""The network on a page: its charts in depth order, the table of layers, and D against batch size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bnprobe.numbers import count, percent
from bnprobe.records import SOURCES, Layer, PathMeasurement, Report
from bnprobe.report import figures
from bnprobe.report import mismatch as sources
from bnprobe.report import scan as words
from bnprobe.report.html import charts, network_charts
from bnprobe.report.html.page import Block, Cell, Column, Figure, Fold, Row, Table, Text, signs_among
from bnprobe.report.html.page import Chart as Drawn
from bnprobe.report.html.vega import LINES
from bnprobe.report.layers import MEANINGS, on_samples, sign_of, terms, worse_path
from bnprobe.report.page import FLAGGED, UNMEASURED
from bnprobe.rules.shares import flagging_size
from bnprobe.stats.theory import mismatch_iid

MOST_LINES = 60
"""So many layers are drawn against batch size, the worst."""


def network(report: Report) -> Iterator[Block]:
    if not report.layers:
        return
    layers = report.layers
    if text := sources.why_none(layers):
        yield Text((text,))
    else:
        yield _share_figure(report)
    if likeness := words.likeness(report, show_all=False):
        yield Text(tuple(likeness))
    if any(layer.train is not None for layer in layers):
        yield _spread_figure(report)


def _share_figure(report: Report) -> Figure:
    layers = report.layers
    rows = sources.share_rows(report, layers)
    drawn = [source for source in SOURCES if any(row.shares and source.of(row.shares) for row in rows)]
    marks = {"│": "Line across a bar", "»": "▲", "x": "Data shift", "s": "Small batches"}
    legend = sources.how_to_read(rows, layers, on_samples(report))
    return Figure(
        "shares",
        sources.TITLE,
        (
            Drawn(
                network_charts.shares(layers, labelled=True), f"Bars of {count(len(layers), 'layer')} in depth order."
            ),
        ),
        Table(
            "Shares of D at inference",
            (
                Column("Layer", number=False),
                *(Column(source.words.capitalize()) for source in SOURCES),
                Column("D"),
                Column("Limit of D"),
                Column("Most of it (95%)", number=False),
            ),
            tuple(_share_row(row) for row in rows),
        ),
        tuple(f"{marks.get(mark, mark.capitalize())}: {text}." for mark, text in legend if mark != "output"),
        tuple((network_charts.SOURCE_COLOURS[source.field], source.words) for source in drawn),
        len(layers),
    )


def _share_row(row: sources.ShareRow) -> Row:
    return Row(
        (
            Cell(row.name, sign=row.mark.sign[:1]),
            *(Cell(_share(source.of(row.shares)) if row.shares else "") for source in SOURCES),
            Cell(row.mismatch),
            Cell("" if row.limit is None else figures.mismatch(row.limit)),
            Cell(sources.largest_share(row, words=True) if row.shares else f"({row.why_not})"),
        )
    )


def _share(value: float | None) -> str:
    if value is None:
        return UNMEASURED
    return figures.mismatch(value) if value >= 0 else figures.signed(value, 2)


def _spread_figure(report: Report) -> Figure:
    layers = report.layers
    number = count(len(layers), "layer")
    present = signs_among(map(sign_of, layers))
    return Figure(
        "spread",
        "r and d in training, over channels and micro-batches",
        (
            Drawn(
                network_charts.spread("r", layers),
                f"Ranges of r of {number} in depth order.",
                "r: batch std / running std",
            ),
            Drawn(
                network_charts.spread("d", layers, labelled=True),
                f"Ranges of d of {number} in depth order.",
                "d: (batch mean − running mean) / running std",  # noqa: RUF001
            ),
        ),
        Table(
            "Quantiles of r and d in training",
            (
                Column("Layer", number=False),
                *(Column(f"{name}: {what}") for name in "rd" for what in ("median", "half", "90%", "98%")),
            ),
            tuple(_spread_row(layer) for layer in layers),
        ),
        (
            "Thin line: 98% of the values; bar: the middle half; line across it: the median."
            " Dashed: the limits r_max 3 and d_max 5 of Batch Renorm.",
        ),
        tuple((network_charts.COLOURS[sign], MEANINGS.get(sign, "not measured in both modes")) for sign in present),
        len(layers),
    )


def _spread_row(layer: Layer) -> Row:
    cells = [Cell(layer.name, sign=sign_of(layer))]
    for values in () if layer.train is None else (layer.train.r, layer.train.d):
        cells += [
            Cell(text) for text in (figures.score(values.quantiles["0.5"]), *network_charts.quantile_spans(values))
        ]
    return Row((*cells, *(Cell(UNMEASURED) for _ in range(9 - len(cells)))))


# --- The table of layers ----------------------------------------------------------------------------------------------


def layer_table(report: Report) -> Iterator[Block]:
    if not report.layers:
        return
    layers = report.layers
    rows = {row.name: row for row in sources.share_rows(report, layers)}
    impacts = any(layer.impact for layer in layers)
    several_kinds = len({layer.kind for layer in layers}) > 1
    columns = [
        Column("Layer", number=False),
        Column("Depth"),
        *figure_columns(),
        Column("Limit"),
        Column("Most of it", number=False),
        *([Column("Output change")] if impacts else []),
        *([Column("Kind", number=False, on_paper=False)] if several_kinds else []),
        Column("r out of 1/3..3"),
        Column("d out of -5..5"),
    ]
    made = tuple(
        Row(
            (
                Cell(layer.name, sign=sign_of(layer), note="; ".join(filter(None, [remark(layer), _shape(layer)]))),
                Cell(str(depth), depth),
                *figure_cells(layer),
                _limit(layer),
                _most(rows[layer.name]),
                *([output_change(layer)] if impacts else []),
                *([Cell(layer.kind)] if several_kinds else []),
                _clipped(layer, "r"),
                _clipped(layer, "d"),
            ),
            f"layer-{depth}",
        )
        for depth, layer in enumerate(layers, start=1)
    )
    present = signs_among(map(sign_of, layers))
    legend = tuple(f"{term}: {text}." for term, text in terms(layers))
    yield Table(f"{count(len(layers), 'layer')} in depth order", tuple(columns), made, present, legend)
    yield from _calls(layers)


def _shape(layer: Layer) -> str:
    return f"{count(layer.channels, 'channel')} of {count(layer.values_per_channel, 'value')}"


def _most(row: sources.ShareRow) -> Cell:
    source, _, part = sources.largest_share(row, words=True).partition(" (")[0].rpartition(" ")
    return Cell(source, note=part)


def remark(layer: Layer) -> str:
    calls = f"{layer.calls_per_forward} calls per forward pass" if layer.calls_per_forward > 1 else ""
    place = (layer.location or "").replace("\\", "/").rpartition("/")[2]  # the path stands with the causes
    return "; ".join(filter(None, [place, calls]))


def figure_columns() -> list[Column]:
    return [Column("n_eq train (95%)"), Column("n_eq eval (95%)"), Column("D, worse")]


def figure_cells(layer: Layer) -> list[Cell]:
    path = worse_path(layer.train, layer.eval)
    return [
        *(_equivalent(one) for one in (layer.train, layer.eval)),
        Cell(figures.path_mismatch(path), None if path is None else path.mismatch),
    ]


def _equivalent(path: PathMeasurement | None) -> Cell:
    if path is None:
        return Cell(UNMEASURED)
    value = path.equivalent_batch_size
    around = figures.equivalent_interval(path.equivalent_batch_size_interval)
    return Cell(figures.path_equivalent(path), 1e300 if value is None else value, note=around)


def _limit(layer: Layer) -> Cell:
    limit = flagging_size(layer)
    return Cell(figures.equivalent_batch_size(limit), limit)


def output_change(layer: Layer) -> Cell:
    impact = layer.impact
    order = None if impact is None else impact.estimate if impact.exact is None else impact.exact
    return Cell(figures.output_change(impact), order)


def _clipped(layer: Layer, name: str) -> Cell:
    if layer.train is None:
        return Cell(UNMEASURED)
    values = layer.train.r if name == "r" else layer.train.d
    return Cell(percent(values.clipped), values.clipped)


def _calls(layers: Iterable[Layer]) -> Iterator[Block]:
    """Every call of layers that one forward pass calls more than once."""
    rows = [
        Row(
            (
                Cell(layer.name),
                Cell(f"{call.index + 1} of {layer.calls_per_forward}"),
                Cell(f"{call.values_per_channel:,}"),
                Cell(figures.path_equivalent(call.train)),
                Cell(figures.path_equivalent(call.eval)),
                Cell(figures.path_mismatch(path)),
            )
        )
        for layer in layers
        for call in layer.calls
        for path in [worse_path(call.train, call.eval)]
    ]
    if rows:
        columns = (Column("Layer", number=False), Column("Call"), Column("Values in a batch"), *figure_columns())
        table = Table("Each call of a layer that is called several times per forward pass", columns, tuple(rows))
        yield Fold("Calls of shared layers", (table,), note=count(len(rows), "call"))


# --- Batch sizes ------------------------------------------------------------------------------------------------------


def batch_sizes(report: Report) -> Iterator[Block]:
    curves = [
        charts.SizeCurve(layer.name, tuple(_size_points(layer, report.scan.batch_size)))
        for layer in report.layers
        if layer.batch_sizes
    ]
    if curves:
        yield size_figure(curves, report.scan.batch_size)


def _size_points(layer: Layer, scanned: int) -> Iterator[charts.SizePoint]:
    n_eq = None if layer.eval is None else layer.eval.equivalent_batch_size
    for point in layer.batch_sizes:
        theory = None if n_eq is None else mismatch_iid(n_eq * point.batch_size / scanned)
        yield charts.SizePoint(point.batch_size, point.mismatch, point.interval, theory, point.limit)


def size_figure(curves: Sequence[charts.SizeCurve], scanned: int) -> Figure:
    """D against batch size: the worst and the median layer stand out, with what i.i.d. samples would give them."""
    ranked = sorted(curves, key=lambda curve: _mismatch_at(curve, scanned))
    told = {"worst": ranked[-1].name, "median": ranked[(len(ranked) - 1) // 2].name}
    if len(ranked) < 3:
        told.pop("median")
    roles = {name: f"{role}: {name}" for role, name in told.items()}
    marked = [charts.SizeCurve(curve.name, curve.points, roles.get(curve.name, "")) for curve in curves]
    # The worst has the first colour, wherever it stands in the network.
    marked.sort(key=lambda curve: (not curve.role.startswith("worst"), not curve.role))
    drawn = [curve for curve in marked if curve.role or curve.name in {each.name for each in ranked[-MOST_LINES:]}]
    sizes = sorted({point.size for curve in curves for point in curve.points})
    keys = [(colour, role) for colour, role in zip(LINES, charts.roles(marked), strict=False)]
    others = [] if len(drawn) == len(keys) else [("line-6", _others(len(curves), len(drawn)))]
    return Figure(
        "batch-sizes",
        "Mismatch D at inference against batch size, same samples",
        (
            Drawn(
                charts.batch_sizes(drawn), f"D of {count(len(curves), 'layer')} at {count(len(sizes), 'batch size')}."
            ),
        ),
        Table(
            "D at inference by batch size, and what i.i.d. samples would give",
            (Column("Layer", number=False), *(Column(f"{size:,}") for size in sizes)),
            tuple(Row((Cell(curve.name), *(_size_cell(curve, size) for size in sizes))) for curve in curves),
        ),
        (
            f"Dashed: i.i.d. samples, from n_eq at size {scanned}. Upright lines: 95% intervals. Dotted: the limit of"
            " the worst layer.",
        ),
        (*keys, *others),
    )


def _others(curves: int, drawn: int) -> str:
    return "other layers" if drawn == curves else f"other layers, the worst of {curves}"


def _mismatch_at(curve: charts.SizeCurve, size: int) -> float:
    return next((point.mismatch for point in curve.points if point.size == size), curve.points[0].mismatch)


def _size_cell(curve: charts.SizeCurve, size: int) -> Cell:
    point = next((each for each in curve.points if each.size == size), None)
    if point is None:
        return Cell(UNMEASURED)
    theory = "" if point.theory is None else f"i.i.d. {figures.mismatch(point.theory)}"
    return Cell(figures.mismatch(point.mismatch), sign=FLAGGED if point.mismatch > point.limit else "", note=theory)
