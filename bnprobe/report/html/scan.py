"""The page of a scan: the verdict and what to do first, then the network, then all that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bnprobe.numbers import count, percent
from bnprobe.records import (
    MEASURES,
    SOURCES,
    Environment,
    Gap,
    Layer,
    Measure,
    PathMeasurement,
    Remedy,
    Report,
    SkippedLayer,
    Verdict,
    leading,
)
from bnprobe.report import diagnoses, figures, further
from bnprobe.report import mismatch as sources
from bnprobe.report import scan as words
from bnprobe.report.html import charts
from bnprobe.report.html.page import (
    Block,
    Card,
    Cell,
    Column,
    Command,
    Document,
    Facts,
    Figure,
    Fold,
    Points,
    Row,
    Section,
    Table,
    Text,
    Tiles,
)
from bnprobe.report.html.page import Chart as Drawn
from bnprobe.report.layers import MEANINGS, on_samples, sign_of, terms, worse_path, worst_first
from bnprobe.report.next_step import NextStep, advised_step
from bnprobe.report.page import (
    ARROW,
    FINE,
    FLAGGED,
    SEVERITY_SIGNS,
    UNDECIDED,
    UNMEASURED,
    RenderOptions,
)
from bnprobe.rules import rule_of, title_of
from bnprobe.rules.docs import manual
from bnprobe.rules.shares import flagging_limit
from bnprobe.stats.theory import equivalent_batch_size, mismatch_iid

MOST_WORST = 5
"""So many of the worst layers stand at the top."""

MOST_LINES = 60
"""So many layers are drawn against batch size, the worst."""

SIGNS = (FLAGGED, UNDECIDED, FINE, UNMEASURED)


def scan_page(report: Report, options: RenderOptions) -> Document:
    """The page of a scan."""
    end = diagnoses.closing(report, options.command)
    verdict = end.headline if end.sign == UNDECIDED else f"{words.one_line(report)}."
    said = [] if verdict == end.headline else [end.headline]
    return Document(
        title=words.title(report),
        sign=end.sign,
        verdict=verdict,
        sentences=(*said, *end.sentences),
        top=(Tiles(tuple(_tiles(report))), *next_step(end.step)),
        sections=(
            Section("causes", "Causes, and what to do", tuple(_causes(report))),
            Section("worst", "The worst layers", tuple(_worst(report))),
            Section("network", "The network, from input to output", tuple(_network(report)), "The network"),
            Section("layers", "All layers", tuple(_layers(report))),
            Section("sizes", "Other batch sizes", tuple(_batch_sizes(report))),
            Section("output", words.OUTPUT, tuple(_output(report)), "Output"),
            Section("gap", further.gap_title(report.summary.gaps), tuple(_gaps(report)), "Step by step"),
            Section("remedies", "Remedies without training", tuple(_remedies(report, options, end.step))),
            Section("clipping", words.CLIPPING, tuple(_clipping(report)), "Clipping"),
            Section("backward", further.BACKWARD, tuple(_backward(report)), "Backward pass"),
            Section("updates", further.UPDATES, tuple(_updates(report)), "Training steps"),
            Section("skipped", "Layers that could not be judged", tuple(skipped_cards(report.skipped)), "Skipped"),
            Section("notes", "Notes", tuple(_notes(report))),
            Section("rules", "Every rule, and what it found", tuple(rule_folds(report.verdicts)), "Rules"),
            Section("how", "How this was measured", tuple(_how(report, options)), "How measured"),
        ),
        data={charts.LAYERS: charts.network_data(report.layers)},
    )


# --- What one wants first ---------------------------------------------------------------------------------------------


def _tiles(report: Report) -> Iterator[tuple[str, str, str]]:
    yield "Layers flagged", f"{report.summary.flagged} of {report.summary.layers}", _counts(report)
    measured = [layer for layer in report.layers if worse_path(layer.train, layer.eval) is not None]
    if measured:
        worst = worst_first(measured)[0]
        path = worse_path(worst.train, worst.eval)
        yield "n_eq of the worst layer", figures.path_equivalent(path), worst.name
    output = report.summary.output
    if output.relative_l2 is not None:
        yield "Outputs apart", figures.relative(output.relative_l2), "training against inference"
    yield from _score_tiles(report)


def _counts(report: Report) -> str:
    others = (("undecided", report.summary.undecided), ("skipped", report.summary.skipped))
    return ", ".join(f"{number} {what}" for what, number in others if number)


def _score_tiles(report: Report) -> Iterator[tuple[str, str, str]]:
    """What batch statistics against running statistics do to the metric, else to the loss."""
    gaps = {gap.measure: gap for gap in report.summary.gaps}
    measure = leading(tuple(gaps))
    if measure is None:
        return
    gap = gaps[measure]
    text = f"{figures.score(gap.without_noise)} {ARROW} {figures.score(gap.inference)}"
    yield measure.capitalize(), text, further.LEVELS_AND_STEPS["inconsistency"]


def next_step(step: NextStep) -> list[Block]:
    """What to do next."""
    return [Text((step.why,))] if step.command is None else [Command(step.why, (step.command,))]


def _causes(report: Report) -> Iterator[Block]:
    for found in diagnoses.findings_in_words(report.diagnoses, report, show_all=False):
        paragraphs = [("", found.message), (diagnoses.REMEDY, found.remedy), ("", found.measured)]
        paragraphs += [(diagnoses.EXPLAINS, f"{found.explains}.")] if found.explains else []
        known = rule_of(found.rule) is not None
        yield Card(
            SEVERITY_SIGNS[found.severity],
            found.title,
            found.where,
            tuple((word, text) for word, text in paragraphs if text),
            (f"What {found.rule} checks, and why", f"rule-{found.rule}") if known else None,
        )
    if text := diagnoses.output_change(report.diagnoses, report):
        yield Text((text,), dim=True)


def _worst(report: Report) -> Iterator[Block]:
    worst = [layer for layer in worst_first(report.layers) if layer.flagged or layer.undecided][:MOST_WORST]
    if not worst:
        return
    rows = {row.name: row for row in sources.share_rows(report, worst)}
    columns = [Column("Layer", number=False), *_figure_columns(), Column("Most of it (95%)", number=False)]
    impacts = any(layer.impact for layer in worst)
    columns += [Column("Output change")] if impacts else []
    yield Table(
        "The worst layers, with the largest part of their mismatch at inference",
        tuple(columns),
        tuple(
            Row(
                (
                    Cell(layer.name, sign=sign_of(layer), note=_remark(layer)),
                    *_figure_cells(layer),
                    Cell(sources.largest_share(rows[layer.name], words=True) or f"({rows[layer.name].why_not})"),
                    *([_impact(layer)] if impacts else []),
                )
            )
            for layer in worst
        ),
    )


# --- The network ------------------------------------------------------------------------------------------------------


def _network(report: Report) -> Iterator[Block]:
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
        (Drawn(charts.shares(layers, labelled=True), f"Bars of {count(len(layers), 'layer')} in depth order."),),
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
        tuple((charts.SOURCE_COLOURS[source.field], source.words) for source in drawn),
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
    present = [sign for sign in SIGNS if any(sign_of(layer) == sign for layer in layers)]
    return Figure(
        "spread",
        "r and d in training, over channels and micro-batches",
        (
            Drawn(charts.spread("r", layers), f"Ranges of r of {number} in depth order.", "r: batch std / running std"),
            Drawn(
                charts.spread("d", layers, labelled=True),
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
        tuple((charts.COLOURS[sign], MEANINGS.get(sign, "not measured in both modes")) for sign in present),
        len(layers),
    )


def _spread_row(layer: Layer) -> Row:
    cells = [Cell(layer.name, sign=sign_of(layer))]
    for values in () if layer.train is None else (layer.train.r, layer.train.d):
        cells += [Cell(text) for text in (figures.score(values.quantiles["0.5"]), *charts.quantile_spans(values))]
    return Row((*cells, *(Cell(UNMEASURED) for _ in range(9 - len(cells)))))


# --- The table of layers ----------------------------------------------------------------------------------------------


def _layers(report: Report) -> Iterator[Block]:
    if not report.layers:
        return
    layers = report.layers
    rows = {row.name: row for row in sources.share_rows(report, layers)}
    impacts = any(layer.impact for layer in layers)
    columns = [
        Column("Layer", number=False),
        Column("Depth"),
        *_figure_columns(),
        Column("n_eq 95%, worse"),
        Column("Limit"),
        Column("Most of it", number=False),
        *([Column("Output change")] if impacts else []),
        Column("Kind", number=False, on_paper=False),
        Column("Channels", on_paper=False),
        Column("Values in a batch", on_paper=False),
        Column("r out of 1/3..3"),
        Column("d out of -5..5"),
    ]
    made = tuple(
        Row(
            (
                Cell(layer.name, sign=sign_of(layer), note=_remark(layer)),
                Cell(str(depth), depth),
                *_figure_cells(layer),
                _interval(layer),
                _limit(layer),
                Cell(sources.largest_share(rows[layer.name], words=True).partition(" (")[0]),
                *([_impact(layer)] if impacts else []),
                Cell(layer.kind),
                Cell(f"{layer.channels:,}", layer.channels),
                Cell(f"{layer.values_per_channel:,}", layer.values_per_channel),
                _clipped(layer, "r"),
                _clipped(layer, "d"),
            ),
            f"layer-{depth}",
        )
        for depth, layer in enumerate(layers, start=1)
    )
    present = tuple(sign for sign in SIGNS if any(sign_of(layer) == sign for layer in layers))
    legend = tuple(f"{term}: {text}." for term, text in terms(layers))
    yield Table(f"{count(len(layers), 'layer')} in depth order", tuple(columns), made, present, legend)
    yield from _calls(layers)


def _remark(layer: Layer) -> str:
    calls = f"{layer.calls_per_forward} calls per forward pass" if layer.calls_per_forward > 1 else ""
    place = (layer.location or "").replace("\\", "/").rpartition("/")[2]  # the path stands with the causes
    return "; ".join(filter(None, [place, calls]))


def _figure_columns() -> list[Column]:
    return [Column("n_eq train"), Column("n_eq eval"), Column("D, worse")]


def _figure_cells(layer: Layer) -> list[Cell]:
    path = worse_path(layer.train, layer.eval)
    return [
        *(_equivalent(one) for one in (layer.train, layer.eval)),
        Cell(UNMEASURED) if path is None else Cell(figures.mismatch(path.mismatch), path.mismatch),
    ]


def _equivalent(path: PathMeasurement | None) -> Cell:
    if path is None:
        return Cell(UNMEASURED)
    value = path.equivalent_batch_size
    return Cell(figures.path_equivalent(path), 1e300 if value is None else value)


def _interval(layer: Layer) -> Cell:
    path = worse_path(layer.train, layer.eval)
    if path is None:
        return Cell(UNMEASURED)
    interval = path.equivalent_batch_size_interval
    return Cell(figures.equivalent_interval(interval), interval[0])


def _limit(layer: Layer) -> Cell:
    limit = equivalent_batch_size(flagging_limit(layer)) or layer.threshold
    return Cell(figures.equivalent_batch_size(limit), limit)


def _impact(layer: Layer) -> Cell:
    impact = layer.impact
    if impact is None or (impact.exact is None and impact.estimate is None):
        return Cell("")
    if impact.exact is not None:
        return Cell(figures.relative(impact.exact), impact.exact)
    return Cell(f"~{figures.relative(impact.estimate or 0.0)}", impact.estimate)


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
                Cell(UNMEASURED if path is None else figures.mismatch(path.mismatch)),
            )
        )
        for layer in layers
        for call in layer.calls
        for path in [worse_path(call.train, call.eval)]
    ]
    if rows:
        columns = (Column("Layer", number=False), Column("Call"), Column("Values in a batch"), *_figure_columns())
        table = Table("Each call of a layer that is called several times per forward pass", columns, tuple(rows))
        yield Fold("Calls of shared layers", (table,), note=count(len(rows), "call"))


# --- Batch sizes ------------------------------------------------------------------------------------------------------


def _batch_sizes(report: Report) -> Iterator[Block]:
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
    keys = [(colour, role) for colour, role in zip(charts.LINES, charts.roles(marked), strict=False)]
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
        (f"Dashed: i.i.d. samples, from n_eq at size {scanned}. Upright lines: 95% intervals.",),
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


# --- The output, step by step -----------------------------------------------------------------------------------------


def _output(report: Report) -> Iterator[Block]:
    if said := words.output_in_words(report.summary.output, scores=not report.summary.gaps):
        yield Text(tuple(said))


def _gaps(report: Report) -> Iterator[Block]:
    gaps = report.summary.gaps
    if not gaps:
        return
    fields = further.gap_fields(gaps)
    yield Figure(
        "steps",
        "Levels, and the steps between them",
        tuple(
            Drawn(charts.waterfall(_steps(gap, fields)), f"Steps of the {gap.measure}.", gap.measure.capitalize())
            for gap in gaps
        ),
        Table(
            "Levels and steps, with 95% intervals",
            (Column("", number=False), *(Column(gap.measure.capitalize()) for gap in gaps)),
            tuple(
                Row((Cell(further.LEVELS_AND_STEPS[field]), *(_step_cell(gap, field) for gap in gaps)))
                for field in fields
            ),
        ),
        tuple(further.gap_samples(gaps[0], report.scan.sample)),
        tuple(_step_keys(gaps)),
    )
    yield Text(tuple(further.largest_steps(gaps)))


def _step_keys(gaps: Sequence[Gap]) -> Iterator[tuple[str, str]]:
    yield "before", "level"
    if any(gap.goal_is_known for gap in gaps):
        yield from (("good", "step for the better"), ("bad", "step for the worse"))
    if not all(gap.goal_is_known for gap in gaps):
        yield "after", "step; whether more is better is not known"


def _step_cell(gap: Gap, field: str) -> Cell:
    value = further.gap_estimate(gap, field)
    return Cell(UNMEASURED if value is None else figures.estimate(value, with_sign=further.is_step(field)))


def _steps(gap: Gap, fields: Sequence[str]) -> list[charts.Bar]:
    """Levels from 0, and steps from the level before to the level after."""
    bars, level = [], 0.0
    for field in fields:
        value = further.gap_estimate(gap, field)
        label = further.LEVELS_AND_STEPS[field]
        if value is None:
            continue
        if not further.is_step(field):
            level = value.mean
            bars.append(charts.Bar(label, figures.estimate(value), 0.0, level, "before"))
            continue
        interval = value.interval and (
            level + value.interval[0],
            None if value.interval[1] is None else level + value.interval[1],
        )
        text = figures.estimate(value, with_sign=True)
        bars.append(charts.Bar(label, text, level, level + value.mean, _look(gap, value.mean), interval))
    return bars


def _look(gap: Gap, step: float) -> str:
    if not gap.goal_is_known:
        return "after"
    return "good" if (step > 0) == (gap.goal == "max") else "bad"


# --- Remedies without training ----------------------------------------------------------------------------------------


def _remedies(report: Report, options: RenderOptions, last: NextStep) -> Iterator[Block]:
    if not report.remedies:
        return
    title, ordered, best = further.remedies_in_words(report)
    yield Text(tuple(filter(None, [best])))
    measures = [measure for measure in reversed(MEASURES) if any(one.after.of(measure) is not None for one in ordered)]
    if measures:
        yield _remedy_figure(title, ordered, measures)
    advised = advised_step(report, options.command)
    if advised is not None and advised != last:
        yield from next_step(advised)
    if notes := further.remedy_notes(ordered, report):
        yield Text(tuple(notes), dim=True)


def _remedy_figure(title: str, ordered: Sequence[Remedy], measures: Sequence[Measure]) -> Figure:
    return Figure(
        "what-if",
        title,
        tuple(
            Drawn(
                charts.dumbbells([_remedy_bar(remedy, measure) for remedy in ordered]),
                f"The {measure} without and with each remedy.",
                measure.capitalize(),
            )
            for measure in measures
        ),
        Table(
            "Scores without and with each remedy",
            (
                Column("Remedy", number=False),
                *(Column(measure.capitalize()) for measure in measures),
                Column("Layers"),
                Column("How", number=False),
            ),
            tuple(
                Row(
                    (
                        Cell(further.remedy_name(remedy)),
                        *(Cell(_remedy_bar(remedy, measure).text) for measure in measures),
                        Cell(str(len(remedy.layers))),
                        Cell(further.how_done(remedy)),
                    )
                )
                for remedy in ordered
            ),
        ),
        ("Thick line: 95% interval of the change, paired.",),
        (("before", "as loaded, or the baseline"), ("after", "with the remedy")),
    )


def _remedy_bar(remedy: Remedy, measure: Measure) -> charts.Bar:
    before, after = (remedy.control or remedy.before).of(measure), remedy.after.of(measure)
    change = remedy.loss_change if measure == "loss" else remedy.metric_change
    texts = [UNMEASURED if value is None else figures.score(value) for value in (before, after)]
    interval = None
    if change is not None and change.interval is not None and after is not None:
        low, high = change.interval
        shift = after - change.mean
        interval = (shift + low, None if high is None else shift + high)
    return charts.Bar(further.remedy_name(remedy), f" {ARROW} ".join(texts), before, after, "after", interval)


# --- What is measured on request --------------------------------------------------------------------------------------


def _clipping(report: Report) -> Iterator[Block]:
    found = words.most_clipped(report.layers)
    if not found:
        return
    columns = (Column("Layer", number=False), *(Column(each) for each in ("r", "r by chance", "d", "d by chance")))
    rows = tuple(
        Row(
            (
                Cell(name),
                *(
                    Cell(text)
                    for values in (path.r, path.d)
                    for text in (percent(values.clipped), words.clipped_by_chance(path, values))
                ),
            )
        )
        for name, path in found
    )
    yield Table(words.CLIPPING, columns, rows, None, (f"{words.by_chance([path for _, path in found])}.",))


def _backward(report: Report) -> Iterator[Block]:
    found = [(layer, layer.backward) for layer in report.layers if layer.backward is not None]
    if found:
        found.sort(key=lambda pair: pair[1].noise, reverse=True)
        rows = tuple(
            Row(
                (
                    Cell(layer.name),
                    Cell(figures.equivalent_batch_size(noise.equivalent_batch_size)),
                    Cell(further.noise_interval(noise)),
                )
            )
            for layer, noise in found
        )
        columns = (Column("Layer", number=False), Column("n_eq backward"), Column("95%"))
        yield Table("The noisiest layers first", columns, rows)
    if report.summary.gradient_angle is not None:
        yield Text((further.angle_in_words(report.summary.gradient_angle),))


def _updates(report: Report) -> Iterator[Block]:
    found = [(layer, layer.updates) for layer in report.layers if layer.updates is not None]
    if not found:
        return
    odd = [pair for pair in found if not further.is_as_configured(*pair)]
    yield Text((*([] if odd else [further.as_configured(len(found))]), further.largest_drift(found)))
    headings = ("Updates per step", "Repeated", "Rate", "Configured", "Drift")
    rows = tuple(
        Row(
            (
                Cell(layer.name, sign="!" if (layer, moved) in odd else ""),
                *(
                    Cell(UNMEASURED if value is None else figures.plain(value))
                    for value in (
                        moved.per_step,
                        moved.repeated,
                        moved.rate,
                        moved.configured,
                        float(f"{moved.drift:.2g}"),
                    )
                ),
            )
        )
        for layer, moved in found
    )
    columns = (Column("Layer", number=False), *map(Column, headings))
    yield Fold("Every layer", (Table("Updates of the running statistics", columns, rows),))


def skipped_cards(skipped: Iterable[SkippedLayer]) -> Iterator[Block]:
    """The layers that could not be judged, those of one reason together."""
    for (kind, reason), names in words.skipped_by_reason(skipped).items():
        yield Card(UNMEASURED, names[0] if len(names) == 1 else count(len(names), "layer"), kind, (("", reason),))
        if len(names) > 1:
            yield Fold("Their names", (Points(tuple(("", name) for name in names)),))


def _notes(report: Report) -> Iterator[Block]:
    items = [("", note) for note in report.scan.notes]
    for note, names in words.layers_by_note(report.layers).items():
        items.append(("", f"{figures.listed_in_line(names, show_all=False)}: {note}"))
    if items:
        yield Points(tuple(items))


# --- Rules ------------------------------------------------------------------------------------------------------------


def rule_folds(verdicts: Sequence[Verdict]) -> Iterator[Block]:
    """Each rule with its outcome, what failed, and its manual; those that failed first."""
    by_rule: dict[str, list[Verdict]] = {}
    for verdict in sorted(verdicts, key=lambda verdict: verdict.rule):
        by_rule.setdefault(verdict.rule, []).append(verdict)
    folds: dict[str, list[Fold]] = {}
    for code, found in by_rule.items():
        title = f"{code}: {title_of(code, found[0].cause)}"
        blocks = (*_failures(found), *_manual(code))
        fold = Fold(title, blocks, _rule_sign(found), f"rule-{code}", _outcome_in_words(found))
        folds.setdefault(_outcome(found), []).append(fold)
    yield from folds.get("failed", ())
    for outcome, sign in (("passed", FINE), ("skipped", UNMEASURED)):
        if outcome in folds:
            yield Fold(f"{count(len(folds[outcome]), 'rule')} {outcome}", tuple(folds[outcome]), sign)


def _outcome(found: Sequence[Verdict]) -> str:
    outcomes = {verdict.outcome for verdict in found}
    return next(outcome for outcome in ("failed", "passed", "skipped") if outcome in outcomes)


def _rule_sign(found: Sequence[Verdict]) -> str:
    failed = [verdict.severity for verdict in found if verdict.outcome == "failed"]
    worst = next((severity for severity in SEVERITY_SIGNS if severity in failed), None)
    if worst is not None:
        return SEVERITY_SIGNS[worst]
    return FINE if _outcome(found) == "passed" else UNMEASURED


def _outcome_in_words(found: Sequence[Verdict]) -> str:
    failed = [verdict for verdict in found if verdict.outcome == "failed"]
    if failed:
        layers = sum(verdict.layer is not None for verdict in failed)
        return f"failed in {count(layers, 'layer')}" if layers else "failed for the model"
    if _outcome(found) == "passed":
        return "passed"
    reasons = dict.fromkeys(verdict.reason or "" for verdict in found)
    return f"skipped: {'; '.join(filter(None, reasons))}"


def _failures(found: Sequence[Verdict]) -> Iterator[Block]:
    items = [
        (SEVERITY_SIGNS[verdict.severity], f"{_where(verdict)}: {verdict.message}{diagnoses.value_in_words(verdict)}")
        for verdict in found
        if verdict.outcome == "failed"
    ]
    if items:
        yield Points(tuple(items))


def _where(verdict: Verdict) -> str:
    return verdict.layer or "the model"


def _manual(code: str) -> Iterator[Block]:
    rule = rule_of(code)
    if rule is None:
        return
    text = manual(rule)
    yield Text((text.summary,))
    yield Facts(text.sections)


# --- How it was measured ----------------------------------------------------------------------------------------------


def _how(report: Report, options: RenderOptions) -> Iterator[Block]:
    yield Facts((*words.what_was_run(report), *environment(report.environment)))
    if sentences := words.cost(report.scan):
        yield Fold(words.COST, (Points(tuple(("", text) for text in sentences)),))
    yield from reproduce(options.command)


def environment(found: Environment) -> list[tuple[str, str]]:
    """The machine and its software."""
    return [
        ("python", found.python),
        ("platform", f"{found.platform}, {count(found.threads, 'thread')}"),
    ]


def reproduce(command: str | None) -> list[Block]:
    """The command that the report comes from."""
    if not command or command == RenderOptions.command:
        return []
    return [Command("The command that gave this report:", (command,))]
