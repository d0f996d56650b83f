"""The state of a training run that a monitor watches: the loss in both modes, the worst layers, what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

from rich.text import Text

from bnprobe.numbers import count, finite_or_none, grouped, joined, listed
from bnprobe.records import RECALIBRATE, UNDO, LayerSample, MonitorChange, MonitorFinding, MonitorLog, MonitorSample
from bnprobe.report import figures
from bnprobe.report.charts import sparkline
from bnprobe.report.json import to_text
from bnprobe.report.page import FINE, SEVERITY_SIGNS, STYLES, UNMEASURED, Page, RenderOptions, to_string
from bnprobe.report.table import Column, Mark, Names, TableLayout, dropping, layer_names, table
from bnprobe.rules import title_of

_ON_SCREEN = 9
"""So many layers are shown, the worst."""

_NAMED = 3
"""So many layers have their names in a sentence."""

EQUIVALENT = "on this batch the layer behaves as if its statistics came from so many independent values"
"""What n_eq is."""

HELD = "A layer in eval mode uses its running statistics, which training leaves as they are."
"""Of layers that training holds in eval mode."""

NO_LAYER = "No layer with running statistics was called in"
"""The last sample, or any: there is nothing to show."""

_FINDINGS = 3
"""So many findings are shown, the latest; each rule once."""

_TO_FIND = 15
"""Samples that the tests of a monitor take to find a D of twice its limit, about."""

_CURVE = 24
"""Cells of a curve, where they are not more than a quarter of the line."""

_LARGE = 1024.0
"""The top of the curves of n_eq, which are on a logarithmic scale."""


def render(log: MonitorLog, options: RenderOptions) -> str:
    """The state as text in lines of at most ``options.width`` cells."""
    page = Page.of(options)
    parts = [_header(log, page)]
    if log.samples:
        last = log.samples[-1]
        parts += [
            _loss(log.samples, last, page),
            _layers(log, last, page, len(last.layers) if options.show_all else _ON_SCREEN),
        ]
    return to_string([*parts, _findings(log, page) if log.version else []], options.color)


def render_json(log: MonitorLog, options: RenderOptions) -> str:
    """The log as JSON; a figure that is not finite is null."""
    return to_text(finite_or_none(asdict(log)), ascii_only=not options.unicode)


def title(log: MonitorLog) -> str:
    """What is trained, and watched by what."""
    return f"bnprobe {log.version}: training of {log.model}" if log.version else log.path


def one_line(log: MonitorLog) -> str:
    """What was found, when and where, e.g. "Non-i.i.d. batches (BN202), at step 246, in bn1 and bn2"."""
    if not log.version:
        return "The run has not begun"
    if not log.findings:
        return f"No finding in {count(log.taken, 'sample')}" if log.taken else "No sample was taken yet"
    found = [_in_short(findings) for findings in by_rule(log.findings)]
    more = len(found) - _FINDINGS
    text = "; ".join([*found[:_FINDINGS], *([count(more, "more cause")] if more > 0 else [])])
    return f"{text[:1].upper()}{text[1:]}"


def _in_short(findings: Sequence[MonitorFinding]) -> str:
    last = findings[-1]
    steps = sorted(finding.step for finding in findings)
    when = f"at step {steps[0]:,}"
    if len(steps) > 1:
        when = f"{len(steps):,} times from step {steps[0]:,} to {steps[-1]:,}"
    where = ""
    if last.layers:
        where = f", in {joined(last.layers) if len(last.layers) <= _NAMED else count(len(last.layers), 'layer')}"
    return f"{title_of(last.rule, last.cause)} ({last.rule}), {when}{where}"


def verdict_sign(log: MonitorLog) -> str:
    """That of the worst finding; without a sample unmeasured."""
    found = {sign_of(finding) for finding in log.findings}
    return next((each for each in STYLES if each in found), FINE if log.taken else UNMEASURED)


def sign_of(finding: MonitorFinding) -> str:
    """The sign of its severity; a newer version may have others."""
    return next((sign for severity, sign in SEVERITY_SIGNS.items() if severity == finding.severity), UNMEASURED)


def by_rule(findings: Sequence[MonitorFinding]) -> list[list[MonitorFinding]]:
    """The findings of each rule together, the worst rules first, then those that were found first."""
    found = grouped((finding.rule, finding) for finding in findings)
    return sorted(found.values(), key=lambda each: list(STYLES).index(sign_of(each[-1])))


def _latest(findings: Sequence[MonitorFinding]) -> list[MonitorFinding]:
    """The latest finding of each rule, the newest first."""
    return sorted((each[-1] for each in by_rule(findings)), key=lambda each: each.step, reverse=True)


def now_changed(changes: Sequence[MonitorChange]) -> dict[str, str]:
    """What was done, by the names of the layers that it was done to and that are still so."""
    changed: dict[str, str] = {}
    for change in changes:
        changed = {name: action for name, action in changed.items() if name not in change.layers}
        if change.action not in (RECALIBRATE, UNDO):
            changed |= dict.fromkeys(change.layers, change.action)
    return changed


def _header(log: MonitorLog, page: Page) -> list[Text]:
    if not log.version:
        return page.verdict(UNMEASURED, f"{log.path} is empty: the run has not begun.")
    return [*page.heading(title(log)), *page.labelled(what_was_watched(log))]


def what_was_watched(log: MonitorLog) -> list[tuple[str, str]]:
    """Labels and values of the header."""
    resumed = f", resumed at step {log.step:,}" if log.step else ""
    if log.samples:
        last = log.samples[-1]
        size = "" if last.samples is None else f", of {count(last.samples, 'sample')}"
        sampled = f"every {count(log.every, 'step')}; the last at step {last.step:,}{size}"
    else:
        sampled = f"every {count(log.every, 'step')}; none yet"
    rows = [("log", log.path), ("sampled", f"{sampled}{resumed}")]
    if log.skipped:
        rows.append(("skipped", f"{count(len(log.skipped), 'layer')}: {listed(sorted(log.skipped), 3)}"))
    changed = now_changed(log.changes)
    for action in sorted(set(changed.values())):
        rows.append((action, listed([name for name, done in changed.items() if done == action], 3)))
    if log.unreadable:
        rows.append(("damaged", count(log.unreadable, "line")))
    return rows


def _loss(samples: Sequence[MonitorSample], last: MonitorSample, page: Page) -> list[Text]:
    """The loss of the sampled batches in both modes, on one scale, and how far the outputs are apart."""
    known = [sample.loss for sample in samples if sample.loss is not None]
    apart = "" if last.output is None else f"Outputs of the last batch differ by {figures.relative(last.output)}."
    if last.loss is None or not known:
        return page.paragraph(f"The loss could not be computed again in eval mode. {apart}".rstrip())
    finite = [value for loss in known for value in (loss.train, loss.eval) if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    curves = [[loss.train for loss in known], [loss.eval for loss in known]]
    columns = [
        Column("last", [or_unmeasured(curve[-1], figures.score) for curve in curves], "point"),
        Column("over the run", [sparkline(curve, low, high, _cells(page)) for curve in curves], "left"),
    ]
    names = Names(["in train mode", "in eval mode"], heading="loss")
    return [*table(names, [TableLayout(columns)], page), *page.paragraph(apart, first="  ")]


def few_samples(log: MonitorLog) -> str:
    """What finding nothing is worth in a run of few samples; nothing of others."""
    if log.findings or not 0 < log.taken <= _TO_FIND:
        return ""
    return (
        f"After {count(log.taken, 'sample')} this says little: a D of twice its limit takes about {_TO_FIND} to be"
        " found. In a short run give the monitor a smaller every."
    )


def _findings(log: MonitorLog, page: Page) -> list[Text]:
    """The latest finding of each rule, with the step of the first one."""
    findings, latest = log.findings, _latest(log.findings)
    if not latest:
        return page.verdict(FINE, "Nothing was found so far.", [few_samples(log)])
    lines = []
    for finding in latest[:_FINDINGS]:
        where = f" in {listed(finding.layers, 3)}" if finding.layers else ""
        steps = [each.step for each in findings if each.rule == finding.rule]
        again = f", {count(len(steps), 'time')}, the last at step {steps[-1]:,}" if len(steps) > 1 else ""
        block = page.paragraph(
            f"step {steps[0]:,}: {finding.rule}{where}{again}", "bold", first=f"{page.clean(sign_of(finding))} "
        )
        block[0].stylize(STYLES[sign_of(finding)], 0, 1)
        lines += [*block, *page.paragraphs([finding.message, f"Remedy: {finding.remedy}"])]
    more = len(latest) - _FINDINGS
    return lines + (page.paragraph(f"{count(more, 'more rule')} before.", "dim", first="  ") if more > 0 else [])


def _layers(log: MonitorLog, last: MonitorSample, page: Page, most: int) -> list[Text]:
    """The layers with the smallest n_eq in the last sample."""
    worst = sorted(last.layers, key=lambda name: badness(last.layers[name]), reverse=True)[:most]
    if not worst:
        return page.paragraph(f"{NO_LAYER} the last sample.")
    found, changed = signs_of_layers(log), now_changed(log.changes)
    marks = [Mark(found[name], STYLES[found[name]]) if name in found else Mark() for name in worst]
    shown = [last.layers[name] for name in worst]
    held = any(layer.frozen for layer in shown)
    columns = [
        Column("n_eq", [equivalent(layer) for layer in shown], "point"),
        Column("D", [or_unmeasured(layer.mismatch, figures.mismatch) for layer in shown], "point"),
        Column("r", [or_unmeasured(layer.r, "{:.2f}".format) for layer in shown], "point"),
        Column("d", [or_unmeasured(layer.d, "{:.2f}".format) for layer in shown], "point"),
        *([Column("mode", [mode(layer) for layer in shown], "left")] if held else []),
        *([Column("changed", [changed.get(name, "") for name in worst], "left")] if changed.keys() & worst else []),
        Column("n_eq over the run", [_curve(log.samples, name, _cells(page)) for name in worst], "left"),
    ]
    names = layer_names(worst, list(last.layers), page, marks)
    more = len(last.layers) - len(worst)
    legend = f"n_eq: {EQUIVALENT}; curves are on a log scale from 1 to 1,000."
    if held:
        legend += f" {HELD}"
    return [
        *page.heading(f"{count(len(last.layers), 'layer')} in the last sample{', the worst' if more else ''}"),
        *table(names, dropping(columns, ("d", "r", "D", "mode", "changed")), page),
        *page.paragraph(legend, "dim"),
    ]


def signs_of_layers(log: MonitorLog) -> dict[str, str]:
    """The sign of the latest finding in each layer that has one whose cause is not known to be gone."""
    over = {name: change.step for change in log.changes if change.action == UNDO for name in change.layers}
    return {
        name: sign_of(finding)
        for finding in log.findings
        for name in finding.layers
        if finding.step > over.get(name, -1)
    }


def badness(layer: LayerSample) -> float:
    """D; of what is not a number more than any."""
    return math.inf if math.isnan(layer.mismatch) else layer.mismatch


def or_unmeasured(value: float, write: Callable[[float], str]) -> str:
    """A figure as it is written, or the sign for one that is not finite."""
    return write(value) if math.isfinite(value) else UNMEASURED


def mode(layer: LayerSample) -> str:
    """In which training has it."""
    return "eval" if layer.frozen else "train"


def equivalent(layer: LayerSample) -> str:
    """n_eq, or the sign for one that is not known."""
    value = layer.equivalent_batch_size
    if not math.isfinite(layer.mismatch) or (value is not None and not math.isfinite(value)):
        return UNMEASURED
    return figures.equivalent_batch_size(value)


def _cells(page: Page) -> int:
    return min(_CURVE, page.width // 4)


def _curve(samples: Sequence[MonitorSample], name: str, cells: int) -> str:
    values = [_height(sample.layers[name]) for sample in samples if name in sample.layers]
    return sparkline(values, 0.0, math.log(_LARGE), cells)


def _height(layer: LayerSample) -> float:
    if math.isnan(layer.mismatch):
        return math.nan
    value = layer.equivalent_batch_size
    return math.log(_LARGE) if value is None else math.log(max(value, 1.0))
