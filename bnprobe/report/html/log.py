"""The page of a monitor's log: what was found and when, and the loss and the layers over the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bnprobe.numbers import count, grouped, joined, listed
from bnprobe.records import DEFAULT_THRESHOLD, LayerSample, MonitorFinding, MonitorLog, MonitorSample, SkippedLayer
from bnprobe.report import figures
from bnprobe.report import watch as words
from bnprobe.report.diagnoses import REMEDY
from bnprobe.report.html import step_charts
from bnprobe.report.html.page import (
    Block,
    Card,
    Cell,
    Chart,
    Column,
    Document,
    Facts,
    Figure,
    Row,
    Section,
    Table,
    Text,
    Tiles,
)
from bnprobe.report.html.parts import points, skipped_cards
from bnprobe.report.html.rules import manual_folds
from bnprobe.report.html.vega import LINES
from bnprobe.report.page import FINE, FLAGGED, UNMEASURED, WARNING, Page
from bnprobe.rules import rule_of, title_of
from bnprobe.rules.shares import NOISE_THRESHOLD
from bnprobe.stats.theory import equivalent_batch_size

_MOST_PARTS = 200
"""Points of a curve; of more samples each is a mean over some."""

_MOST_LINES = 5
"""So many layers have a curve each, the worst."""

_MOST_ROWS = 100
"""So many have a row in the map of layers, the worst."""

_LARGEST = 10_000.0
"""A larger n_eq is drawn here."""

_KINDS = (
    ("heat-1", 5.0, "n_eq below 5"),
    ("heat-2", NOISE_THRESHOLD, f"5 to {NOISE_THRESHOLD:.0f}"),
    ("heat-3", DEFAULT_THRESHOLD, f"{NOISE_THRESHOLD:.0f} to {DEFAULT_THRESHOLD:.0f}"),
    ("heat-4", 128.0, f"{DEFAULT_THRESHOLD:.0f} to 128"),
    ("heat-5", math.inf, "over 128"),
)
"""Colours, below which n_eq they stand, and their words."""

_NOT_FINITE = ("heat-0", "not finite")

_LOOKS = {FLAGGED: "flagged", WARNING: "undecided"}
"""Colours of findings."""

_CHANGED, _RESUMED = "ink", "unmeasured"
"""Colours of changes, and of where the run was resumed."""

_LIMITS = {f"n_eq {limit:.0f}": limit for limit in (DEFAULT_THRESHOLD, NOISE_THRESHOLD)}


def log_page(log: MonitorLog) -> Document:
    """The page of a log."""
    run = _Run.of(log) if log.samples else None
    return Document(
        title=words.title(log),
        sign=words.verdict_sign(log),
        verdict=f"{words.one_line(log)}.",
        sentences=tuple(_sentences(log)),
        top=(Tiles(tuple(_tiles(log))),) if log.samples else (),
        sections=(
            Section("findings", "What was found, and what to do", tuple(_findings(log.findings)), "Findings"),
            Section("loss", "Training against evaluation mode, over the run", tuple(_loss(run)) if run else (), "Loss"),
            Section("course", "The layers over the run", tuple(_course(run, log)) if run else ()),
            Section("layers", "The layers in the last sample", tuple(_layers(log)), "Last sample"),
            Section("events", "Findings and changes, in order", tuple(_events(log)), "In order"),
            Section("skipped", "Layers that are not watched", tuple(_skipped(log.skipped)), "Skipped"),
            Section("notes", "Notes", points(_notes(log))),
            Section("rules", "The rules that found something", tuple(_rules(log.findings)), "Rules"),
            Section("how", "How this was watched", (Facts(tuple(words.what_was_watched(log))),), "How watched"),
        ),
    )


def _sentences(log: MonitorLog) -> Iterator[str]:
    if few := words.few_samples(log):
        yield few
    changed = words.now_changed(log.changes)
    for action in sorted(set(changed.values())):
        names = [name for name, done in changed.items() if done == action]
        yield f"Changed at the moment ({action}): {figures.listed_in_line(names, show_all=False)}."


def _tiles(log: MonitorLog) -> Iterator[tuple[str, str, str]]:
    last = log.samples[-1]
    yield "Samples", f"{log.taken:,}", f"every {count(log.every, 'step')}, the last at step {last.step:,}"
    if last.loss is not None:
        train, evaluated = (words.or_unmeasured(loss, figures.score) for loss in (last.loss.train, last.loss.eval))
        yield "Loss in eval mode", evaluated, f"{train} in train mode, in the last sample"
    if last.output is not None:
        yield "Outputs apart", words.or_unmeasured(last.output, figures.relative), "in the last sample"
    if last.layers:
        worst = max(last.layers, key=lambda name: words.badness(last.layers[name]))
        yield "n_eq of the worst layer", words.equivalent(last.layers[worst]), f"{worst}, in the last sample"


# --- Findings ---------------------------------------------------------------------------------------------------------


def _findings(findings: Sequence[MonitorFinding]) -> Iterator[Block]:
    for found in words.by_rule(findings):
        last = found[-1]
        first = f"step {found[0].step:,} (alarm at step {found[0].alarm:,})"
        when = f"at {first}."
        if len(found) > 1:
            when = f"{count(len(found), 'time')}, from {first} to step {last.step:,}, whose words these are."
        paragraphs = (("", last.message), (REMEDY, last.remedy), ("Found:", when))
        yield Card(
            words.sign_of(last),
            _title(last),
            figures.listed_in_line(last.layers, show_all=False),
            tuple((word, text) for word, text in paragraphs if text),
            None if rule_of(last.rule) is None else (f"What {last.rule} checks, and why", f"rule-{last.rule}"),
        )


def _title(finding: MonitorFinding) -> str:
    title = title_of(finding.rule, finding.cause)
    return f"{title[:1].upper()}{title[1:]} ({finding.rule})"


def _rules(findings: Sequence[MonitorFinding]) -> Iterator[Block]:
    yield from manual_folds([(found[-1].rule, words.sign_of(found[-1])) for found in words.by_rule(findings)])


def _events(log: MonitorLog) -> Iterator[Block]:
    rows = [(each.step, each.rule, each.layers, each.message, words.sign_of(each)) for each in log.findings]
    rows += [(each.step, each.action, each.layers, "", "") for each in log.changes]
    if not rows:
        return
    columns = (Column("Step"), *(Column(heading, number=False) for heading in ("What", "Layers", "In words")))
    made = tuple(
        Row((Cell(f"{step:,}", sign=sign), Cell(what), Cell(figures.listed_in_line(layers, False)), Cell(message)))
        for step, what, layers, message, sign in sorted(rows, key=lambda row: row[0])
    )
    yield Table("Findings, and what the monitor changed", columns, made)


# --- The run in parts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Some samples in a row.

    Attributes:
        first, last: Their steps.
        train, eval: Mean loss; None: not known, NaN: never finite.
        output: Mean distance of the outputs.
        mismatches: Mean D of each layer.
    """

    first: int
    last: int
    train: float | None
    eval: float | None
    output: float | None
    mismatches: Mapping[str, float]

    @property
    def steps(self) -> str:
        return f"{self.first:,}" if self.first == self.last else f"{self.first:,} to {self.last:,}"

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2

    def n_eq(self, name: str) -> float | None:
        """Of a layer; None: it is not in these samples, NaN: never finite."""
        return _n_eq(self.mismatches.get(name))

    @property
    def middle_n_eq(self) -> float | None:
        """The median of the layers."""
        known = [mismatch for mismatch in self.mismatches.values() if math.isfinite(mismatch)]
        return _n_eq(median(known) if known else None)


def _n_eq(mismatch: float | None) -> float | None:
    """At most ``_LARGEST``."""
    if mismatch is None or not math.isfinite(mismatch):
        return mismatch
    return min(equivalent_batch_size(mismatch) or _LARGEST, _LARGEST)


def _part(samples: Sequence[MonitorSample]) -> _Part:
    losses = [sample.loss for sample in samples if sample.loss is not None]
    by_layer = grouped((name, layer.mismatch) for sample in samples for name, layer in sample.layers.items())
    return _Part(
        samples[0].step,
        samples[-1].step,
        _mean([loss.train for loss in losses]),
        _mean([loss.eval for loss in losses]),
        _mean([sample.output for sample in samples if sample.output is not None]),
        {name: _mean(values) or 0.0 for name, values in by_layer.items()},
    )


def _mean(values: Sequence[float]) -> float | None:
    """Of those that are finite; None of none at all, NaN where none is finite."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan if values else None


@dataclass(frozen=True)
class _Run:
    """A run in parts.

    Attributes:
        parts: In order.
        size: Samples in a part.
        names: The layers, from input to output.
        signs: Of layers with findings.
        course: What its charts have in common.
    """

    parts: tuple[_Part, ...]
    size: int
    names: tuple[str, ...]
    signs: Mapping[str, str]
    course: step_charts.Course

    @classmethod
    def of(cls, log: MonitorLog) -> _Run:
        """A log with samples."""
        size = math.ceil(len(log.samples) / _MOST_PARTS)
        parts = tuple(_part(log.samples[at : at + size]) for at in range(0, len(log.samples), size))
        names = dict.fromkeys(log.samples[-1].layers)
        for part in parts:
            names |= dict.fromkeys(part.mismatches)
        steps = [step for part in parts for step in (part.first, part.last)]
        steps += [each.step for each in log.findings] + [each.step for each in log.changes]
        first, last = min(steps), max(steps)
        around = max(log.every, 1) / 2 if len(parts) == 1 else 0
        marks = tuple(_marks(log, first, last))
        course = step_charts.Course(max(first - math.ceil(around), 0), last + math.ceil(around), marks)
        return cls(parts, size, tuple(names), words.signs_of_layers(log), course)

    @property
    def means(self) -> tuple[str, ...]:
        """What a point is, where it is more than a sample."""
        return (f"Each point is a mean over {count(self.size, 'sample')}.",) if self.size > 1 else ()

    def worst(self, most: int) -> list[str]:
        """The layers that were found, then those with most mismatch: over the run, or lately if that is more."""
        if len(self.names) <= most:
            return list(self.names)
        lately = self.parts[-math.ceil(len(self.parts) / 10) :]

        def badness(name: str) -> tuple[bool, float]:
            usual = [
                median(values)
                for parts in (self.parts, lately)
                if (values := [_or_infinite(part.mismatches[name]) for part in parts if name in part.mismatches])
            ]
            return name in self.signs, max(usual, default=0.0)

        return sorted(self.names, key=badness, reverse=True)[:most]


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _marks(log: MonitorLog, first: int, last: int) -> Iterator[step_charts.Mark]:
    """What happened, the most important first; the same at nearly the same step once."""
    column = max((last - first) / _MOST_PARTS, 1.0)
    found = grouped(((finding.rule, int(finding.step / column)), finding) for finding in log.findings)
    marks, seen = [], set()
    for (rule, _), findings in found.items():
        times = f", {count(len(findings), 'time')}" if len(findings) > 1 else ""
        where = listed(findings[0].layers, 3)
        look = _LOOKS.get(words.sign_of(findings[0]), "unmeasured")
        mark = step_charts.Mark(findings[0].step, rule, f"{_title(findings[0])}{times}", where, look)
        marks.append((0 if rule not in seen else 2, mark))
        seen.add(rule)
    changes = {(each.action, int(each.step / column)): each for each in reversed(log.changes)}
    for each in changes.values():
        marks.append((1, step_charts.Mark(each.step, each.action, each.action, listed(each.layers, 3), _CHANGED)))
    if first <= log.step <= last and log.step:
        marks.append((3, step_charts.Mark(log.step, "resumed", "The run was resumed", "", _RESUMED)))
    yield from (mark for _, mark in sorted(marks, key=lambda each: (each[0], each[1].step)))


def _mark_keys(run: _Run) -> Iterator[tuple[str, str]]:
    said = {"flagged": "error found", "undecided": "warning found", _CHANGED: "layers changed"}
    looks = {mark.look for mark in run.course.marks}
    yield from ((look, text) for look, text in said.items() if look in looks)


_WIDE = 25
"""As many columns as make a chart scroll rather than be too narrow for the labels of its marks."""


# --- Loss and outputs -------------------------------------------------------------------------------------------------


def _loss(run: _Run) -> Iterator[Block]:
    curves = {
        mode: [(part.middle, getattr(part, field)) for part in run.parts]
        for mode, field in (("train mode", "train"), ("eval mode", "eval"))
    }
    outputs = [(part.middle, part.output) for part in run.parts]
    values = [value for points in (*curves.values(), outputs) for _, value in points if value is not None]
    if not values:
        yield Text(("The loss could not be computed again in eval mode, and the outputs could not be compared.",))
        return
    charts = []
    losses = [value for points in curves.values() for _, value in points if value is not None]
    lines = [
        step_charts.Line(mode, tuple(curve), look) for (mode, curve), look in zip(curves.items(), LINES, strict=False)
    ]
    if losses:
        positive = all(value > 0 for value in losses if math.isfinite(value))
        spec = step_charts.lines(lines, "step", "loss", positive, course=run.course)
        heading = "The loss of the sampled batches, by the loop's own loss"
        charts.append(Chart(spec, f"Loss in both modes at {count(len(run.parts), 'point')} of the run.", heading))
    else:
        yield Text(("The loss could not be computed again in eval mode.",))
    if any(value is not None for _, value in outputs):
        line = step_charts.Line("outputs", tuple(outputs), LINES[3])
        spec = step_charts.lines(
            [line], "step", "apart", True, course=run.course, text=figures.relative, form="~%", height=130
        )
        heading = "How far the outputs of the two modes are apart (relative L2 distance)"
        charts.append(Chart(spec, "Relative distance of the outputs over the run.", heading))
    odd = any(not math.isfinite(value) for value in values)
    keys = tuple((line.look, line.name) for line in lines) if losses else ()
    yield Figure(
        "modes",
        "Loss and outputs in the two modes",
        tuple(charts),
        _table(run),
        (*run.means, *(["Crosses at the bottom: not finite."] if odd else [])),
        (*keys, *_mark_keys(run)),
        _WIDE,
    )


def _table(run: _Run) -> Table:
    columns = tuple(map(Column, ("Step", "Loss, train mode", "Loss, eval mode", "Outputs apart")))
    rows = tuple(
        Row(
            (
                Cell(part.steps),
                *(Cell(_known(loss, figures.score)) for loss in (part.train, part.eval)),
                Cell(_known(part.output, figures.relative)),
            )
        )
        for part in run.parts
    )
    return Table("Loss in both modes, and how far their outputs are apart", columns, rows)


def _known(value: float | None, write: Callable[[float], str]) -> str:
    return UNMEASURED if value is None else words.or_unmeasured(value, write)


# --- Layers -----------------------------------------------------------------------------------------------------------


def _course(run: _Run, log: MonitorLog) -> Iterator[Block]:
    if not run.names:
        yield Text((f"{words.NO_LAYER} any sample.",))
        return
    worst = run.worst(_MOST_LINES)
    short = Page(80, unicode=True).shorten(worst, 40)
    lines = [
        step_charts.Line(name, tuple((part.middle, part.n_eq(name)) for part in run.parts), look)
        for name, look in zip(worst, LINES, strict=False)
    ]
    keys = list(zip(LINES, short, strict=False))
    several = len(run.names) > len(worst)
    if several:
        middle = f"median of {count(len(run.names), 'layer')}"
        lines.append(step_charts.Line(middle, tuple((part.middle, part.middle_n_eq) for part in run.parts), "before"))
        keys.append(("before", middle))
    says = f"n_eq of {count(len(worst), 'layer')} over the run."
    spec = step_charts.lines(lines, "step", "n_eq", True, course=run.course, limits=_LIMITS, text=_in_words)
    noise, limit = (figures.plain(value) for value in (NOISE_THRESHOLD, DEFAULT_THRESHOLD))
    held = [name for name, layer in log.samples[-1].layers.items() if layer.frozen]
    yield Figure(
        "curves",
        f"n_eq of the {count(len(worst), 'worst layer')}" if several else "n_eq of every layer",
        (Chart(spec, says),),
        _curve_table(run, lines),
        (
            f"n_eq: {words.EQUIVALENT}.",
            f"Dotted: the limits below which a scan flags a layer, {noise} for noise of batches alone, {limit} for all"
            " else; between them in proportion.",
            *([f"In eval mode in the last sample: {listed(held, 3)}. {words.HELD}"] if held else []),
            *run.means,
        ),
        (*keys, *_mark_keys(run)),
        _WIDE,
    )
    if several:
        yield _map(run)


def _in_words(n_eq: float) -> str:
    return figures.equivalent_batch_size(None if n_eq >= _LARGEST else n_eq)


def _curve_table(run: _Run, lines: Sequence[step_charts.Line]) -> Table:
    columns = (Column("Step"), *(Column(line.name) for line in lines))
    rows = tuple(
        Row((Cell(part.steps), *(Cell(_known(line.points[place][1], _in_words)) for line in lines)))
        for place, part in enumerate(run.parts)
    )
    return Table("n_eq over the run", columns, rows)


def _map(run: _Run) -> Figure:
    """The layers from input to output, over steps."""
    shown = set(run.worst(_MOST_ROWS))
    names = [name for name in run.names if name in shown]
    middles = [(one.last + other.first) / 2 for one, other in zip(run.parts, run.parts[1:], strict=False)]
    edges = [run.course.first, *middles, run.course.last]
    stretches = [stretch for place, name in enumerate(names) for stretch in _stretches(place, name, run.parts, edges)]
    spec = step_charts.heat(names, [run.signs.get(name, FINE) for name in names], stretches, run.course)
    looks = {stretch.look for stretch in stretches}
    kinds = [(look, text) for look, _, text in _KINDS] + [_NOT_FINITE]
    left_out = len(run.names) - len(names)
    table = "the table below has their last figures"
    return Figure(
        "map",
        "n_eq of the layers, from input (top) to output",
        (Chart(spec, f"n_eq of {count(len(names), 'layer')} over the run, by colours; {table}."),),
        None,
        (
            *([f"{count(left_out, 'layer')} with less mismatch not drawn."] if left_out else []),
            *run.means,
        ),
        (*((look, text) for look, text in kinds if look in looks), *_mark_keys(run)),
        _WIDE,
    )


def _stretches(place: int, name: str, parts: Sequence[_Part], edges: Sequence[float]) -> Iterator[step_charts.Stretch]:
    """The parts of a layer, those of one kind in a row together."""
    begin, values = 0, [part.n_eq(name) for part in parts]
    looks = [_look(value) for value in values]
    for end in range(1, len(parts) + 1):
        if end < len(parts) and looks[end] == looks[begin]:
            continue
        if looks[begin]:
            steps = dict.fromkeys((f"{parts[begin].first:,}", f"{parts[end - 1].last:,}"))
            n_eq = _range([value for value in values[begin:end] if value is not None])
            yield step_charts.Stretch(place, edges[begin], edges[end], " to ".join(steps), n_eq, looks[begin])
        begin = end


def _look(n_eq: float | None) -> str:
    if n_eq is None:
        return ""
    return next((look for look, limit, _ in _KINDS if n_eq < limit), _NOT_FINITE[0])


def _range(values: Sequence[float]) -> str:
    if not math.isfinite(values[0]):
        return _NOT_FINITE[1]
    return " to ".join(dict.fromkeys((_in_words(min(values)), _in_words(max(values)))))


def _layers(log: MonitorLog) -> Iterator[Block]:
    if not log.samples:
        return
    last = log.samples[-1]
    if not last.layers:
        yield Text((f"{words.NO_LAYER} the last sample.",))
        return
    signs, changed = words.signs_of_layers(log), words.now_changed(log.changes)
    rules: dict[str, dict[str, None]] = {}
    for finding in log.findings:
        for name in finding.layers:
            rules.setdefault(name, {})[finding.rule] = None
    held = any(layer.frozen for layer in last.layers.values())
    columns = [Column("Layer", number=False), *map(Column, ("Depth", "n_eq", "D", "r", "d"))]
    columns += [Column("Mode", number=False)] if held else []
    columns += [Column("Found", number=False)] if rules else []
    columns += [Column("Changed", number=False)] if changed else []
    rows = tuple(
        Row(
            (
                Cell(name, sign=signs.get(name, "")),
                Cell(str(depth), depth),
                *_figure_cells(layer),
                *([Cell(words.mode(layer))] if held else []),
                *([Cell(joined(list(rules[name])) if name in rules else "")] if rules else []),
                *([Cell(changed.get(name, ""))] if changed else []),
            ),
            f"layer-{depth}",
        )
        for depth, (name, layer) in enumerate(last.layers.items(), start=1)
    )
    legend = (f"n_eq: {words.EQUIVALENT}.", "D, r and d: against the running statistics as they were before the step.")
    yield Table(f"{count(len(rows), 'layer')} at step {last.step:,}", tuple(columns), rows, (), legend)


def _figure_cells(layer: LayerSample) -> tuple[Cell, ...]:
    n_eq = layer.equivalent_batch_size
    known = math.isfinite(layer.mismatch)
    return (
        Cell(words.equivalent(layer), (_order(1e300 if n_eq is None else n_eq) if known else None)),
        Cell(words.or_unmeasured(layer.mismatch, figures.mismatch), _order(layer.mismatch)),
        Cell(words.or_unmeasured(layer.r, "{:.2f}".format), _order(layer.r)),
        Cell(words.or_unmeasured(layer.d, "{:.2f}".format), _order(layer.d)),
    )


def _order(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- The rest ---------------------------------------------------------------------------------------------------------


def _skipped(skipped: Mapping[str, str]) -> Iterator[Block]:
    yield from skipped_cards(SkippedLayer(name, "", reason) for name, reason in skipped.items())


def _notes(log: MonitorLog) -> Iterator[str]:
    if log.step:
        yield f"The run was resumed at step {log.step:,}: what was logged of later steps before is left out."
    if log.taken > len(log.samples):
        yield f"Of {count(log.taken, 'sample')} {len(log.samples):,} were read for the charts, evenly."
    if log.unreadable:
        yield f"{count(log.unreadable, 'line')} of the log could not be read: cut off, or damaged."
