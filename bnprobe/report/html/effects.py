"""What a mismatch costs and what mends it: the output, step by step, remedies, and what was measured on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnprobe.numbers import percent, plural
from bnprobe.records import MEASURES, Gap, Measure, Remedy, Report
from bnprobe.report import figures, further
from bnprobe.report import scan as words
from bnprobe.report.html import charts
from bnprobe.report.html.page import Block, Cell, Column, Figure, Fold, Row, Table, Text
from bnprobe.report.html.page import Chart as Drawn
from bnprobe.report.html.parts import next_step
from bnprobe.report.next_step import NextStep, advised_step
from bnprobe.report.page import ARROW, UNMEASURED, RenderOptions


def output(report: Report) -> Iterator[Block]:
    if said := words.output_in_words(report.summary.output, scores=not report.summary.gaps):
        yield Text(tuple(said))


def steps(report: Report) -> Iterator[Block]:
    gaps = report.summary.gaps
    if not gaps:
        return
    fields = further.gap_fields(gaps)
    yield Figure(
        "steps",
        "Levels, and the steps between them",
        tuple(
            Drawn(charts.waterfall(step_bars(gap, fields)), f"Steps of the {gap.measure}.", gap.measure.capitalize())
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


def step_bars(gap: Gap, fields: Sequence[str]) -> list[charts.Bar]:
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


def remedies(report: Report, options: RenderOptions, last: NextStep) -> Iterator[Block]:
    if not report.remedies:
        return
    title, ordered, best = further.remedies_in_words(report)
    yield Text(tuple(filter(None, [best])))
    measures = [measure for measure in reversed(MEASURES) if any(one.after.of(measure) is not None for one in ordered)]
    if measures:
        yield _remedy_figure(title, ordered, measures, plural(report.scan.sample))
    advised = advised_step(report, options.command)
    if advised is not None and advised != last:
        yield from next_step(advised)
    if notes := further.remedy_notes(ordered, report):
        yield Text(tuple(notes), dim=True)


def _remedy_figure(title: str, ordered: Sequence[Remedy], measures: Sequence[Measure], what: str) -> Figure:
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
                Column(what.capitalize()),
                Column("How", number=False),
            ),
            tuple(
                Row(
                    (
                        Cell(further.remedy_name(remedy)),
                        *(Cell(_remedy_bar(remedy, measure).text) for measure in measures),
                        Cell(str(len(remedy.layers))),
                        Cell(f"{remedy.images:,}"),
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
    before, after = further.ends(remedy, measure)
    change = further.change_of(remedy, measure)
    texts = [figures.known(value, figures.score) for value in (before, after)]
    interval = None
    if change is not None and change.interval is not None and after is not None:
        low, high = change.interval
        shift = after - change.mean
        interval = (shift + low, None if high is None else shift + high)
    return charts.Bar(further.remedy_name(remedy), f" {ARROW} ".join(texts), before, after, "after", interval)


# --- What is measured on request --------------------------------------------------------------------------------------


def clipping(report: Report) -> Iterator[Block]:
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


def backward(report: Report) -> Iterator[Block]:
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


def updates(report: Report) -> Iterator[Block]:
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
                    Cell(figures.known(value, figures.plain))
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
