"""The page of a repair: what was changed, how it compares with its baselines, how training went, what to do with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnprobe.numbers import count
from bnprobe.records import MEASURES, Arm, Measure, Proof, RepairRecord, Run
from bnprobe.report import figures
from bnprobe.report import repair as words
from bnprobe.report.html import charts, step_charts
from bnprobe.report.html.page import (
    Block,
    Card,
    Cell,
    Chart,
    Column,
    Command,
    Document,
    Facts,
    Figure,
    Fold,
    Row,
    Section,
    Table,
    Text,
    Tiles,
)
from bnprobe.report.html.parts import environment, points, reproduce
from bnprobe.report.html.vega import LINES
from bnprobe.report.html.verify import compared_layers
from bnprobe.report.page import ARROW, UNMEASURED, RenderOptions
from bnprobe.report.repair import RepairReport
from bnprobe.report.verify import compared_scans


def repair_page(report: RepairReport, options: RenderOptions) -> Document:
    """The page of a repair; of its record alone, without scans and files."""
    record = report.record
    sign, verdict = words.verdict(record)
    proof = [record.proof.message] if record.proof and record.proof.message else []
    scanned = compared_scans(report.before, report.after, words.replaced(record)) if report.before else []
    return Document(
        title=words.title(record),
        sign=sign,
        verdict=verdict,
        sentences=(*proof, *(words.flags(record, report.after) if report.after or not record.plan else [])),
        top=(Tiles(tuple(_tiles(record))), *points(words.warnings(record)), *points(words.requirements(record))),
        sections=(
            Section("arms", "Against its baselines", tuple(_arms(record.proof)) if record.proof else ()),
            Section("training", "Training", tuple(_training(record.proof)) if record.proof else ()),
            Section("changed", "What was changed", tuple(_changed(record)), "Changes"),
            Section("layers", "Every layer, before and after", tuple(compared_layers(scanned)), "Layers"),
            Section("notes", "Notes", points(record.notes)),
            Section("use", "Using the weights", tuple(_use(report))),
            Section("how", "How this was done", tuple(_how(record, options))),
        ),
    )


def _tiles(record: RepairRecord) -> Iterator[tuple[str, str, str]]:
    if record.flagged_before is not None and record.flagged_after is not None:
        yield "Layers flagged", f"{record.flagged_before} {ARROW} {record.flagged_after}", "before and after"
    if record.plan is not None:
        changed = len(record.plan.changes)
        total = changed + len(record.plan.refused) + record.plan.untouched
        yield "Layers converted", f"{changed} of {total}", record.plan.to
    if record.recalibrated:
        yield "Layers recalibrated", str(len(record.recalibrated)), ""
    if record.proof is not None:
        yield from _score_tiles(record.proof)


def _score_tiles(proof: Proof) -> Iterator[tuple[str, str, str]]:
    values = {arm.name: arm.of(proof.measure) for arm in proof.arms}
    repaired, control = values.get(proof.repaired), values.get(proof.control or "")
    if repaired is None:
        return
    against = f"{proof.control}: {figures.estimate(control)}" if control is not None else ""
    yield proof.measure.capitalize(), figures.estimate(repaired), against


# --- The arms ---------------------------------------------------------------------------------------------------------


def _arms(proof: Proof) -> Iterator[Block]:
    order: tuple[Measure, ...] = ("metric", "loss") if proof.measure == "metric" else ("loss", "metric")
    measures = [measure for measure in order if any(arm.of(measure) for arm in proof.arms)]
    if measures:
        yield Figure(
            "comparison",
            words.comparison(proof),
            tuple(
                Chart(
                    charts.estimates([_arm_bar(arm, measure, proof) for arm in proof.arms]),
                    f"The {measure} of {count(len(proof.arms), 'model')}.",
                    measure.capitalize(),
                )
                for measure in measures
            ),
            _arm_table(proof, measures),
            _reading(proof),
            (("after", "the repair"), ("line-2", "its baseline"), ("before", "others")),
        )
    yield from (Text((text,)) for text in words.gain(proof))
    yield from points([*words.clipped(proof), *words.diverged(proof.arms)])


def _reading(proof: Proof) -> tuple[str, ...]:
    runs = ("Thick line: 95% interval of the mean; ticks: single seeds.",)
    several = any(len(arm.runs) > 1 for arm in proof.arms)
    legend = dict(words.arms_legend(proof))
    legend.pop(words.WRITTEN)
    baseline = legend.pop(words.BASELINE, "")
    said = [f"{baseline[:1].upper()}{baseline[1:]}."] if baseline else []
    return (*(runs if several else ()), *said, *(f"{term.capitalize()}: {text}." for term, text in legend.items()))


def _arm_bar(arm: Arm, measure: Measure, proof: Proof) -> charts.Bar:
    look = "after" if arm.name == proof.repaired else "line-2" if arm.name == proof.control else "before"
    seeds = [value for run in arm.runs if (value := run.score.of(measure)) is not None] if len(arm.runs) > 1 else []
    return charts.estimate_bar(arm.name, arm.of(measure), look, seeds)


def _arm_table(proof: Proof, measures: Sequence[Measure]) -> Table:
    columns = [Column("Model", number=False), *(Column(measure.capitalize()) for measure in measures)]
    trained = any(arm.trained for arm in proof.arms)
    columns += [Column("Best step"), Column("Steps"), Column("Ended", number=False)] if trained else []
    rows = []
    for arm in proof.arms:
        cells = [Cell(figures.known(arm.of(measure), figures.estimate)) for measure in measures]
        if trained and arm.trained:
            spans = [words.span([run.best_step for run in arm.runs]), words.span([run.steps for run in arm.runs])]
            cells += [*map(Cell, spans), Cell(words.ended(arm.runs))]
        elif trained:
            cells += [Cell("")] * 3
        rows.append(Row((Cell(arm.name), *cells)))
    return Table("Scores of the models", tuple(columns), tuple(rows))


# --- Training ---------------------------------------------------------------------------------------------------------


def _training(proof: Proof) -> Iterator[Block]:
    trained = _trained_apart(proof.arms)
    if not trained:
        return
    looks = dict(zip((arm.name for arm in trained), LINES, strict=False))
    kinds = [("train", "Loss in training, means over steps", "loss")]
    kinds += [(measure, f"{measure.capitalize()} on held-out data", measure) for measure in MEASURES]
    drawn = []
    for kind, heading, unit in kinds:
        lines = [line for arm in trained for run in arm.runs for line in _lines(arm, run, kind, looks)]
        if lines:
            logarithmic = unit == "loss"
            says = f"{heading}, against the step, for {count(len(trained), 'model')}."
            drawn.append(Chart(step_charts.lines(lines, "step", unit, logarithmic), says, heading))
    yield Figure(
        "curves",
        "Training curves, a line for each seed",
        tuple(drawn),
        _run_table(trained),
        ("Held-out data here are those that choose the step whose weights are kept; the scores above are on others.",),
        tuple((look, name) for name, look in looks.items()),
    )


def _trained_apart(arms: Sequence[Arm]) -> list[Arm]:
    """The arms that were trained, without those that only change what another has trained."""
    found: list[Arm] = []
    for arm in arms:
        curves = [run.curve for run in arm.runs]
        if any(curves) and all(curves != [run.curve for run in other.runs] for other in found):
            found.append(arm)
    return found


def _lines(arm: Arm, run: Run, kind: str, looks: dict[str, str]) -> Iterator[step_charts.Line]:
    curve = run.curve
    if curve is None or arm.name not in looks:
        return
    steps, values = {
        "train": (curve.steps, curve.losses),
        "loss": (curve.evaluated_at, curve.evaluation_losses),
        "metric": (curve.evaluated_at, curve.evaluation_metrics),
    }[kind]
    points = tuple(zip(steps, values, strict=True))
    if any(value is not None for _, value in points):
        yield step_charts.Line(arm.name, points, looks[arm.name], str(run.seed))


def _run_table(trained: Sequence[Arm]) -> Table:
    columns = (
        Column("Model", number=False),
        *map(Column, ("Seed", "Steps", "Best step", "Last loss", "Loss", "Metric", "Time")),
        Column("Ended", number=False),
    )
    rows = []
    for arm in trained:
        for run in arm.runs:
            last = run.curve.losses[-1] if run.curve and run.curve.losses else None
            scores = (last, run.score.loss, run.score.metric)
            texts = [figures.known(value, figures.score) for value in scores]
            counted = [str(run.seed), f"{run.steps:,}", f"{run.best_step:,}"]
            cells = [*counted, *texts, figures.duration(run.seconds), words.ended([run])]
            rows.append(Row((Cell(arm.name), *map(Cell, cells))))
    return Table("Every run", columns, tuple(rows))


# --- What was changed, and what to do with it -------------------------------------------------------------------------


def _changed(record: RepairRecord) -> Iterator[Block]:
    plan = record.plan
    if plan is not None and plan.changes:
        yield Text((words.conversion(plan),))
        yield from points(words.conversions(plan, show_all=False))
        columns = tuple(Column(heading, number=False) for heading in ("Layer", "Was", "Is", "Why"))
        rows = tuple(Row(tuple(map(Cell, (one.name, one.kind, one.to, one.reason)))) for one in plan.changes)
        yield Fold("Every converted layer", (Table("Converted layers", columns, rows),), note=str(len(rows)))
    if plan is not None:
        for (kind, reason), names in plan.refused_by_reason().items():
            yield Card(UNMEASURED, f"Refused: {figures.listed_in_line(names, show_all=False)}", kind, (("", reason),))
    if record.recalibrated:
        converted = words.recalibrates_the_converted(record)
        yield Text((words.RECALIBRATED_FIRST if converted else f"{words.recalibration(record)}.",))
        if not converted:
            yield Fold("Their names", points(record.recalibrated))


def _use(report: RepairReport) -> Iterator[Block]:
    record, files = report.record, report.files
    if record.weights is None:
        yield Text((words.NOT_WRITTEN,))
        return
    yield Facts(tuple(words.written(record, record.weights, files)))
    yield Command(words.loading(record), tuple(words.python_lines(record, record.weights, files)))
    for why, command in words.commands(record, record.weights, files):
        yield Command(why, (command,))


def _how(record: RepairRecord, options: RenderOptions) -> Iterator[Block]:
    yield Facts((*words.what_was_run(record), *environment(record.environment)))
    yield from reproduce(record.command or options.command)
