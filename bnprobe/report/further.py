"""The parts of a scan's report that need a loss, held-out data or training steps: gaps, remedies, backward, updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from rich.cells import cell_len
from rich.text import Text

from bnprobe.numbers import count, grouped, plural
from bnprobe.records import (
    MEASURES,
    Backward,
    Estimate,
    FreeRemedy,
    Gap,
    Goal,
    GradientAngle,
    Layer,
    Measure,
    Remedy,
    Report,
    Updates,
    leading,
)
from bnprobe.report import figures
from bnprobe.report.next_step import NextStep
from bnprobe.report.page import DEGREE, Page
from bnprobe.report.table import Column, Mark, Names, TableLayout, arrows, dropping, layer_names, table
from bnprobe.rules import effect

# --- Gaps -------------------------------------------------------------------------------------------------------------

LEVELS_AND_STEPS = {
    "training": "training data, as in training",
    "training_noise": "all but BatchNorm to eval mode",
    "without_noise": "training data, BatchNorm in train mode",
    "inconsistency": "from batch to running statistics",
    "inference": "training data, as at inference",
    "generalization": "from training to held-out data",
    "held_out": "held-out data, as at inference",
}
"""From training down to held-out data, each level followed by the step to the next."""

_NOISE = ("training_noise", "without_noise")
_HELD_OUT = ("generalization", "held_out")

_STEPS = {
    "training_noise": "that of switching all but BatchNorm to eval mode (dropout, or outputs that only training has)",
    "inconsistency": "that from batch to running statistics",
    "generalization": "that from training to held-out data, both in eval mode",
}

_MAIN_PART = 0.5
"""A step is named as the largest where it is more than this part of all steps together."""


def gaps(found: Sequence[Gap], page: Page, sample: str = "sample") -> list[Text]:
    """The levels and steps with their intervals, a column for each measure, and which step is the largest.

    Args:
        found: One for each measure.
        page: What the lines are written on.
        sample: What a sample is.
    """
    if not found:
        return []
    fields = gap_fields(found)
    columns = [Column(gap.measure, _gap_cells(gap, fields, page)) for gap in found]
    marks = [Mark(style="dim" if field in _STEPS else "") for field in fields]
    labels = [f"{'  ' if field in _STEPS else ''}{LEVELS_AND_STEPS[field]}" for field in fields]
    names = Names(labels, heading="", marks=marks)
    room = page.width - names.indent - sum(2 + column.width(page) for column in columns)
    # Labels are worth more than columns side by side.
    tables = [columns] if names.longest(page) <= room else [[column] for column in columns]
    return [
        *page.heading(gap_title(found)),
        *(line for each in tables for line in table(names, [TableLayout(each)], page)),
        *page.paragraphs(gap_samples(found[0], sample), "dim"),
        *page.paragraphs(largest_steps(found)),
    ]


def gap_title(found: Sequence[Gap]) -> str:
    """From where to where the steps go."""
    return f"From training to {'held-out data' if _is_held_out(found) else 'inference'}, step by step"


def gap_fields(found: Sequence[Gap]) -> list[str]:
    """Those of ``LEVELS_AND_STEPS`` that were measured, without steps that change nothing."""
    noisy = any(gap.training_noise or gap.training_noise_interval for gap in found)
    left_out = (*(() if noisy else _NOISE), *(() if _is_held_out(found) else _HELD_OUT))
    return [field for field in LEVELS_AND_STEPS if field not in left_out]


def _is_held_out(found: Sequence[Gap]) -> bool:
    return any(gap.held_out is not None for gap in found)


def gap_estimate(gap: Gap, field: str) -> Estimate | None:
    """A level or a step, with its interval; None where it was not measured."""
    value, interval = getattr(gap, field), getattr(gap, f"{field}_interval", None)
    return None if value is None else Estimate(value, interval)


def is_step(field: str) -> bool:
    """Whether a field is a step and no level."""
    return field in _STEPS


def _gap_cells(gap: Gap, fields: Sequence[str], page: Page) -> list[str]:
    values = [gap_estimate(gap, field) for field in fields]
    return figures.estimates(values, page, signed=[field in _STEPS for field in fields])


def gap_samples(gap: Gap, sample: str) -> list[str]:
    """How many samples the figures are means over, a sentence; nothing where that is not known."""
    if not gap.samples:
        return []
    held_out = "" if gap.held_out_samples is None else f" and {gap.held_out_samples:,} held-out"
    return [f"On {gap.samples:,} training{held_out} {plural(sample)}; ± is the 95% interval of a step."]


def largest_steps(found: Sequence[Gap]) -> list[str]:
    """Which significant step makes up more than half of all, and whether it is for the better; what agrees together."""
    if not any(_is_significant(gap, step) for gap in found for step in _STEPS):
        return ["No step is significant (95%) on these samples."] if found[0].samples else []
    measures = grouped((_largest_step(gap), gap) for gap in found)
    return [
        f"The largest step is {_STEPS[step]}: {_directions(named, step)}." for step, named in measures.items() if step
    ]


def _directions(found: Sequence[Gap], step: str) -> str:
    """What a step does to each measure; better or worse where the direction of the metric is known."""
    verbs: dict[str, list[str]] = {}
    for gap in found:
        rises = (getattr(gap, step) or 0.0) > 0
        known = gap.measure == "loss" or gap.goal_is_known
        better = rises == (gap.goal == "max" and gap.measure == "metric")
        verb = ("improves" if better else "gets worse") if known else "rises" if rises else "falls"
        verbs.setdefault(verb, []).append(f"the {gap.measure}")
    plurals = {"improves": "improve", "gets worse": "get worse", "rises": "rise", "falls": "fall"}
    return " and ".join(
        f"{' and '.join(names)} {verb if len(names) == 1 else plurals[verb]}" for verb, names in verbs.items()
    )


def _largest_step(gap: Gap) -> str | None:
    sizes = {field: abs(getattr(gap, field) or 0.0) for field in _STEPS}
    largest = max(sizes, key=lambda field: sizes[field])
    return largest if _is_significant(gap, largest) and sizes[largest] > _MAIN_PART * sum(sizes.values()) else None


def _is_significant(gap: Gap, step: str) -> bool:
    return effect.excludes_zero(getattr(gap, f"{step}_interval"))


# --- Remedies that need no training -----------------------------------------------------------------------------------

_DOING: dict[FreeRemedy, str] = {
    "recalibrated": "Recalibrating",
    "evaluation statistics": "Recalibrating on the held-out data",
    "batch statistics": "Normalizing at inference with batch statistics",
    "instance statistics": "Normalizing at inference with the statistics of each sample",
    "instance renorm": "Converting to instance renorm",
    "example weighing": "Converting to example weighing",
    "statistics per call": "Giving every call statistics of its own",
    "micro-batch statistics, averaged": "Averaging running statistics over micro-batches",
    "micro-batch statistics, pooled": "Pooling running statistics over micro-batches",
}

_NAMES = {"evaluation statistics": "recalibrated on held-out data"}
"""Words for names of the JSON report."""


def remedies(report: Report, page: Page, advised: NextStep | None = None, last: NextStep | None = None) -> list[Text]:
    """The remedies, best first, and the best in words.

    Args:
        advised: The command for what is surely better; it is shown unless it is the ``last`` word of the report anyway.
        last: What the report ends with.
    """
    if not report.remedies:
        return []
    title, ordered, best = remedies_in_words(report)
    return [
        *page.heading(title),
        *page.paragraphs([best]),
        *_remedy_table(ordered, plural(report.scan.sample), page),
        *page.paragraphs(remedy_notes(ordered, report), "dim"),
        *([] if advised is None or advised == last else page.paragraph(advised.why, first="  ")),
        *([] if advised is None or advised == last else page.command(advised.command or "")),
    ]


def remedies_in_words(report: Report) -> tuple[str, list[Remedy], str]:
    """A title, the remedies, best first, and what the best does; that is empty where it cannot be told."""
    found, goal, measure = report.remedies, goal_of_metric(report), _ranked_by(report)
    judged = measure == "loss" or effect.goal_of(report.summary.gaps, report.summary.chance) is not None
    ordered = best_first(found, measure, goal)
    sizes = sorted({remedy.images for remedy in found if not remedy.cut_short} or {found[0].images})
    half = f", or on the {sizes[0]:,} of every other batch, which chose nothing" if len(sizes) > 1 else ""
    what = plural(report.scan.sample)
    data = f"held-out {what}" if found[0].scored_on == "held-out" else f"training {what} that gave no statistics"
    title = f"What remedies without training would give, on {sizes[-1]:,} {data}{half}"
    return title, ordered, best_in_words(ordered, measure, goal) if judged else ""


def remedy_notes(ordered: Sequence[Remedy], report: Report) -> list[str]:
    """What remedies cost, and why their values before differ from those of the steps, a sentence each."""
    return [text for text in (_costs(ordered), _other_samples(ordered, report)) if text]


def _costs(found: Sequence[Remedy]) -> str:
    """What remedies cost where they are used, a sentence; empty where nothing is known."""
    groups = grouped((remedy.cost, remedy_name(remedy)) for remedy in found)
    told = [f"{cost} ({', '.join(names)})" for cost, names in groups.items() if cost]
    return f"They cost {'; '.join(told)}." if told else ""


def _other_samples(found: Sequence[Remedy], report: Report) -> str:
    """Why the values before differ from those of the steps; empty where they do not."""
    most = max(remedy.images for remedy in found)  # the others are said to be some of these
    level = "held_out" if found[0].scored_on == "held-out" else "inference"
    for gap in report.summary.gaps:
        number = gap.held_out_samples if level == "held_out" else gap.samples
        before = {remedy.before.of(gap.measure) for remedy in found if remedy.images == most} - {None}
        steps = getattr(gap, level)
        if number and steps is not None and any(_score(value) != _score(steps) for value in before):
            what, where = plural(report.scan.sample), found[0].scored_on
            return f"Not the same {what} as for the steps above ({number:,} {where} {what}): their values differ."
    return ""


def remedy_name(remedy: Remedy) -> str:
    """What it is called."""
    return _NAMES.get(remedy.name, remedy.name)


def goal_of_metric(report: Report) -> Goal:
    """Whether a larger or a smaller metric is better."""
    return next((gap.goal for gap in report.summary.gaps if gap.measure == "metric"), "max")


def _ranked_by(report: Report) -> Measure:
    """What the remedies are compared by."""
    known = {measure for remedy in report.remedies for measure in remedy.after.known}
    return leading(known, all(gap.goal_is_known for gap in report.summary.gaps)) or "loss"


def best_first(found: Sequence[Remedy], measure: Measure, goal: Goal = "max") -> list[Remedy]:
    """By one of the measures; those without it last."""
    sign = -1 if goal == "max" and measure == "metric" else 1
    return sorted(found, key=lambda remedy: math.inf if (value := remedy.after.of(measure)) is None else sign * value)


def best_in_words(ordered: Sequence[Remedy], measure: Measure, goal: Goal = "max") -> str:
    """What the best remedy does, e.g. "Recalibrating takes the loss from 1.92 to 0.08 (95%: by -1.9 to -1.8).".

    A change whose interval contains 0 is no gain: then it is the best of those whose gain is sure. One that is sure
    but too little to act on is called so; and where the loss ranks, what the metric does is said, too.
    """
    best = ordered[0]
    start, end = ends(best, measure)
    now = ends(max(ordered, key=lambda remedy: remedy.images), measure)[0]
    if end is None:
        return "None of them could be scored."
    if start is None:
        return f"{doing(best.name)} takes the {measure} from a value that is not finite to {figures.score(end)}."
    lowers = measure == "loss" or goal == "min"
    sure = next((remedy for remedy in ordered if _gains(remedy, measure, lowers)), None)
    if sure is None:
        what = f"lowers the {measure}" if lowers else f"raises the {measure}"
        surely = "" if change_of(best, measure) is None else " surely"
        return f"None of them{surely} {what}, which is {figures.score(start if now is None else now)} now."
    start, end = ends(sure, measure)
    change = change_of(sure, measure)
    interval = (
        "" if change is None or change.interval is None else f" (95%: by {figures.signed_interval(change.interval)})"
    )
    little = ", which is little" if _is_little(sure, measure, goal) else ""
    more = "" if sure is best else "; what gains more in the table is not sure"
    return (
        f"{doing(sure.name)} takes the {measure} from {figures.score(start or 0.0)} to {figures.score(end or 0.0)}"
        f"{interval}{little}{_beside(sure, measure)}{more}."
    )


def _is_little(remedy: Remedy, measure: Measure, goal: Goal) -> bool:
    """Whether a gain is smaller than what two trainings of the same network differ by."""
    start, end = ends(remedy, measure)
    wanted: Goal = "min" if measure == "loss" else goal
    return start is not None and end is not None and effect.floors_better(measure, wanted, start, end) < 1.0


def _beside(remedy: Remedy, measure: Measure) -> str:
    """What the metric does where remedies are ranked by the loss, a clause."""
    start, end = ends(remedy, "metric")
    if measure == "metric" or start is None or end is None:
        return ""
    before, after = figures.score(start), figures.score(end)
    return f"; the metric stays at {after}" if before == after else f"; the metric goes from {before} to {after}"


def ends(remedy: Remedy, measure: Measure) -> tuple[float | None, float | None]:
    """What a remedy starts from, and what it gives."""
    return (remedy.control or remedy.before).of(measure), remedy.after.of(measure)


def change_of(remedy: Remedy, measure: Measure) -> Estimate | None:
    """What a remedy does to a score, with its interval."""
    return remedy.loss_change if measure == "loss" else remedy.metric_change


def _gains(remedy: Remedy, measure: Measure, lowers: bool) -> bool:
    start, end = ends(remedy, measure)
    return start is not None and end is not None and is_gain(change_of(remedy, measure), end - start, lowers)


def is_gain(change: Estimate | None, difference: float, lowers: bool) -> bool:
    """Whether a change is for the better, and surely so where an interval was computed."""
    if change is None:  # of a report of an earlier version
        return difference < 0 if lowers else difference > 0
    if change.interval is None:
        return False
    low, high = change.interval
    return high is not None and high < 0 if lowers else low > 0


def doing(name: str) -> str:
    """A remedy as the subject of a sentence."""
    for known, words in _DOING.items():
        if name.startswith(known):
            return words + name.removeprefix(known).replace(", batches", " of batches")
    return name[:1].upper() + name[1:]


def how_done(remedy: Remedy) -> str:
    """How it was done, in how many layers, and its baseline."""
    baseline = ""
    if remedy.control is not None:
        values = [("loss", remedy.control.loss), ("metric", remedy.control.metric)]
        given = [f"{measure} {figures.score(value)}" for measure, value in values if value is not None]
        baseline = f"baseline: {', '.join(given)}" if given else ""
        if given and remedy.recalibrated:
            baseline = f"baseline, recalibrated as well: {', '.join(given)}"
    few = count(remedy.images, f"{remedy.scored_on} sample")
    short = f"worse on {few}, and scored on no more" if remedy.cut_short else ""
    return "; ".join(filter(None, (remedy.detail, baseline, short)))


def _remedy_table(ordered: Sequence[Remedy], what: str, page: Page) -> list[Text]:
    """The scores; how it was done stands beside them where there is room, else below."""
    counts = {"layers": [len(remedy.layers) for remedy in ordered], what: [remedy.images for remedy in ordered]}
    varying = [Column(name, [f"{each:,}" for each in found]) for name, found in counts.items() if len({*found}) > 1]
    columns = [*varying, *_score_columns(ordered, page)]
    lines = table(Names([remedy_name(remedy) for remedy in ordered], heading="remedy"), [TableLayout(columns)], page)
    how = [page.clean(how_done(remedy)) for remedy in ordered]
    if max(map(cell_len, how)) + 2 <= page.width - cell_len(lines[0].plain):
        beside = [line + Text(f"  {text}", "dim") for line, text in zip(lines[1:], how, strict=True)]
        return [lines[0], *beside]
    told = [f"{remedy_name(remedy)}: {text}" for remedy, text in zip(ordered, how, strict=True) if text]
    return [*lines, *page.paragraphs(told, "dim", rest="    ")]


def _score_columns(ordered: Sequence[Remedy], page: Page) -> list[Column]:
    """Baseline and after, for loss and metric; none where there is nothing to show."""
    columns = []
    for measure in MEASURES:
        pairs = [ends(remedy, measure) for remedy in ordered]
        if any(value is not None for pair in pairs for value in pair):
            columns.append(Column(measure, arrows([(_score(start), _score(end)) for start, end in pairs], page)))
    return columns


def _score(value: float | None) -> str:
    return figures.known(value, figures.score)


# --- Backward pass and training steps ---------------------------------------------------------------------------------

MOST_LAYERS = 5
"""So many layers are listed, the worst, unless all are asked for."""

_ONCE = 0.01
"""Updates per step, and rates relative to the configured one, within this are as they should be."""

_ALIGNED = 0.99


BACKWARD = "Backward pass: noise of the batch statistics of the gradient"


def backward(report: Report, page: Page, show_all: bool) -> list[Text]:
    """The layers whose backward statistics are noisiest, and what that does to the gradient."""
    found = [(layer, layer.backward) for layer in report.layers if layer.backward is not None]
    angle = report.summary.gradient_angle
    if not found and angle is None:
        return []
    found.sort(key=lambda pair: pair[1].noise, reverse=True)
    shown = found if show_all else found[:MOST_LAYERS]
    lines = page.heading(BACKWARD)
    if shown:
        columns = [
            Column("n_eq backward", [figures.equivalent_batch_size(noise.equivalent_batch_size) for _, noise in shown]),
            Column("95%", [noise_interval(noise) for _, noise in shown], "left"),
        ]
        lines += _layer_table([layer for layer, _ in shown], report.layers, columns, page)
        lines += _more(len(found) - len(shown), "with less noise", page)
    return [*lines, *(page.paragraph(angle_in_words(angle), first="  ") if angle is not None else [])]


UPDATES = "Running statistics over real training steps"


def as_configured(layers: int) -> str:
    """That all layers are updated as they should be."""
    return f"Updated once per step and call, at the configured rate, in all {count(layers, 'layer')}."


def largest_drift(found: Sequence[tuple[Layer, Updates]]) -> str:
    """Which layer's running mean moved most, and by how much."""
    worst, moved = max(found, key=lambda pair: pair[1].drift)
    drift = f"{figures.plain(float(f'{moved.drift:.2g}'))} standard deviations per step (root mean square)"
    return f"Largest drift: the running mean of {worst.name} moved by {drift}."


def updates(report: Report, page: Page, show_all: bool) -> list[Text]:
    """How real training steps moved the running statistics: the layers where that is not as configured."""
    found = [(layer, layer.updates) for layer in report.layers if layer.updates is not None]
    if not found:
        return []
    odd = [pair for pair in found if not is_as_configured(*pair)]
    shown = found if show_all else odd[:MOST_LAYERS]
    lines = page.heading(UPDATES)
    if not odd:
        lines += page.paragraph(as_configured(len(found)), first="  ")
    if shown:
        moves = [moved for _, moved in shown]
        columns = [
            Column("updates per step", [figures.plain(moved.per_step) for moved in moves]),
            Column("repeated", [figures.plain(moved.repeated) for moved in moves]),
            Column("rate", [_rate(moved.rate) for moved in moves]),
            Column("configured", [_rate(moved.configured) for moved in moves]),
            Column("drift", [f"{moved.drift:.2g}" for moved in moves]),
        ]
        lines += _layer_table([layer for layer, _ in shown], report.layers, columns, page)
        lines += _more(0 if show_all else len(odd) - len(shown), "not as configured", page)
    sentences = [largest_drift(found)]
    if shown:
        sentences.insert(0, "rate: measured weight of the batch of a step; configured: that of the layer's momentum")
    if any(moved.repeated > _ONCE for _, moved in odd):
        sentences.insert(0, "repeated: updates from a batch that was already used in the same step")
    return [*lines, *page.paragraphs(sentences)]


def noise_interval(noise: Backward) -> str:
    """The interval of n_eq of the backward pass."""
    if noise.interval is None:
        return ""
    low, high = noise.interval
    # Noise and n_eq run in opposite directions: n_eq = 2 / noise.
    return figures.equivalent_interval((0.0 if high is None else 2 / max(high, 1e-12), 2 / max(low, 1e-12)))


def angle_in_words(angle: GradientAngle) -> str:
    """What batch statistics do to the gradient."""
    single, averaged = _degrees(angle.cosine), _degrees(angle.mean_cosine)
    batches = count(angle.batches, "micro-batch")
    meaning = (
        "batch noise, which averages out"
        if angle.mean_cosine >= _ALIGNED
        else "a bias, if it stays with more micro-batches; averaging over steps does not remove a bias"
    )
    return (
        f"The angle between the gradient with batch statistics and the one with population statistics is {single}"
        f" (cosine {angle.cosine:.3f}, mean over {batches}), and {averaged} (cosine {angle.mean_cosine:.3f}) between"
        f" their averages over all of these: {meaning}."
    )


def _degrees(cosine: float) -> str:
    return f"{math.degrees(math.acos(min(max(cosine, -1.0), 1.0))):.0f}{DEGREE}"


def is_as_configured(layer: Layer, moved: Updates) -> bool:
    """Once per step and call, at the configured rate; calls on different data add up to a larger one."""
    once = abs(moved.per_step - layer.calls_per_forward) <= _ONCE and moved.repeated <= _ONCE
    if moved.rate is None or moved.configured is None:
        return once
    expected = 1 - (1 - moved.configured) ** layer.calls_per_forward
    return once and abs(moved.rate - expected) <= _ONCE * max(expected, 1e-12)


def _rate(rate: float | None) -> str:
    return figures.known(rate, figures.plain)


def _layer_table(
    layers: Sequence[Layer], network: Sequence[Layer], columns: Sequence[Column], page: Page
) -> list[Text]:
    """Columns are dropped where the page is too narrow, the last first; points stand in line."""
    aligned = [replace(column, align="point") if column.align == "right" else column for column in columns]
    expendable = [column.heading for column in aligned[:0:-1]]
    names = layer_names([layer.name for layer in layers], [layer.name for layer in network], page)
    return table(names, dropping(aligned, expendable), page)


def _more(number: int, what: str, page: Page) -> list[Text]:
    text = f"{count(number, 'more layer')} {what}; --all shows all."
    return page.paragraph(text, first="  ", style="dim") if number > 0 else []
