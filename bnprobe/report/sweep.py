"""The report of ``bnprobe sweep``: mismatch against batch size, and which rate of the running average tracks best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from bnprobe.numbers import count, joined
from bnprobe.records import (
    DEFAULT_THRESHOLD,
    MomentumCurve,
    MomentumPoint,
    MomentumSweep,
    SweepLayer,
    SweepPoint,
    SweepReport,
)
from bnprobe.report import figures
from bnprobe.report.next_step import sweep_step
from bnprobe.report.page import CENTRE, FINE, FLAGGED, TIMES, UNDECIDED, Page, RenderOptions, pad, standing, to_string
from bnprobe.report.table import Column, Names, dropping, layer_names, table
from bnprobe.rules.shares import NOISE_THRESHOLD
from bnprobe.stats.theory import equivalent_batch_size

MOST_LAYERS = 25


def render(report: SweepReport, options: RenderOptions) -> str:
    """The report as text in lines of at most ``options.width`` cells."""
    page, whole = Page.of(options), options.verbose or options.show_all
    scanned, momentum = report.scan.batch_size, report.momentum
    most = len(report.layers) if options.show_all else MOST_LAYERS if whole else _ON_SCREEN
    parts = [
        _header(report, page),
        _chart(report.layers, scanned, page),
        _by_size(report.layers, page) if whole else [],
        _by_layer(report.layers, scanned, page, most),
        _by_train_size(report.layers, page),
        _rates(momentum, page) if momentum else [],
        _rates_by_layer(momentum, page, options.show_all) if momentum and whole else [],
        page.section("Notes", [*report.scan.notes, *report.notes]),
        [] if whole else page.paragraph(_left_out(report, page), "dim"),
        _closing(report, page, options.command),
    ]
    return to_string(parts, options.color)


_ON_SCREEN = 5
"""So many layers are listed where the report is to fit a screen, the worst."""


def _left_out(report: SweepReport, page: Page) -> str:
    layers = "more layers, " if sum(bool(layer.eval) for layer in report.layers) > _ON_SCREEN else ""
    rates = ", and the best rate of each layer" if report.momentum and len(report.momentum.layers) > 1 else ""
    return f"{page.whole} shows {layers}the worst layer at each size and how many fail there{rates}."


def one_line(report: SweepReport) -> str:
    """The result in one line."""
    partial = "PARTIAL: " if report.partial else ""
    flagged = sum(layer.flagged for layer in report.layers)
    layers = count(len(report.layers), "layer")
    return f"{partial}{flagged} of {layers} flagged at batch size {report.scan.batch_size}"


def _header(report: SweepReport, page: Page) -> list[Text]:
    return [*page.heading(title(report)), *page.labelled(what_was_run(report))]


def title(report: SweepReport) -> str:
    """What the report is of, and what wrote it."""
    partial = " (PARTIAL)" if report.partial else ""
    return f"{report.tool.name} {report.tool.version}: sweep of {report.scan.model}{partial}"


def what_was_run(report: SweepReport) -> list[tuple[str, str]]:
    """Data, weights, device and measurements, each with its label."""
    scan = report.scan
    batches = count(scan.batches, "micro-batch")
    regrouped = ", regrouped for every size" if any(len(layer.eval) > 1 for layer in report.layers) else ""
    return [
        ("data", figures.data(scan)),
        *([("checkpoint", scan.checkpoint)] if scan.checkpoint else []),
        ("device", f"{scan.device} ({report.environment.device_name}), {scan.dtype}, seed {scan.seed}"),
        ("measured", f"{batches} {TIMES} {scan.batch_size} = {count(scan.images, scan.sample)}{regrouped}"),
    ]


def _closing(report: SweepReport, page: Page, command: str) -> list[Text]:
    tracking = tracking_in_words(report.momentum) if report.momentum else ()
    lines = page.verdict(verdict_sign(report), f"{one_line(report)}.", [*conclusion(report), *tracking])
    step = sweep_step(report, command)
    return lines if step is None else [*lines, *page.paragraph(step.why), *page.command(step.command or "")]


def verdict_sign(report: SweepReport) -> str:
    """The sign of the verdict."""
    layers = report.layers
    return standing(any(layer.flagged for layer in layers), any(layer.undecided for layer in layers))


# --- Batch sizes ------------------------------------------------------------------------------------------------------

_SIGNS = {"fails": FLAGGED, "undecided": UNDECIDED, "passes": FINE}
_FLAT = 3.0
"""A mismatch so many times that of i.i.d. samples is not explained by the batch size."""

_NARROW = 64
"""Below so many cells there is a chart of one layer only."""

_FULL = "█"
_DECADES = 3.0
_BESIDE_BAR = 9
"""Cells of a sign and a value with their blanks."""


@dataclass(frozen=True)
class _Scale:
    """A logarithmic axis of D."""

    low: float
    high: float
    cells: int

    def place(self, value: float) -> int:
        """The cell in which a value lies, from 0."""
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return min(max(math.ceil(share * self.cells) - 1, 0), self.cells - 1)


BY_SIZE = "Mismatch D at inference against batch size, same samples"


def _chart(layers: Sequence[SweepLayer], scanned: int, page: Page) -> list[Text]:
    """D of the worst and the median layer at each size as bars, with a mark where i.i.d. samples would be."""
    drawn = _worst_and_median(layers, scanned)[: 1 if page.width < _NARROW else 2]
    if not drawn:
        return []
    sizes = sorted({point.batch_size for _, layer in drawn for point in layer.eval})
    labels = ["size", *map(str, sizes)]
    width = max(map(len, labels))
    room = (page.width - 2 - width - 2 * len(drawn)) // len(drawn)
    blocks = [_block(title, layer, sizes, _scale(drawn, room - _BESIDE_BAR), page) for title, layer in drawn]
    rows = zip([pad(label, width, right=True) for label in labels], *blocks, strict=True)
    lines = [Text("  " + "  ".join(row)) for row in rows]
    lines[0].stylize("dim")
    legend = (
        f"{_FULL} measured, on a log scale; {CENTRE} i.i.d. samples, from n_eq at size {scanned}",
        f"{FINE} passes, {UNDECIDED} undecided, {FLAGGED} fails (95%)",
    )
    return [
        *page.heading(BY_SIZE),
        *lines,
        *(line for text in legend for line in page.paragraph(text, style="dim", first="  ")),
    ]


def _by_size(layers: Sequence[SweepLayer], page: Page) -> list[Text]:
    """The worst layer at each size of the eval path, and how many layers pass."""
    points = [(layer, point) for layer in layers for point in layer.eval]
    if not points:
        return []
    return [*page.heading(f"{count(len(layers), 'layer')}, inference, by batch size"), *_size_table(points, page)]


def _by_train_size(layers: Sequence[SweepLayer], page: Page) -> list[Text]:
    """The same for the train path, where it was measured at more than one size."""
    points = [(layer, point) for layer in layers for point in layer.train]
    if len({point.batch_size for _, point in points}) < 2:
        return []
    return [*page.heading(TRAINED_SIZES), *_size_table(points, page)]


TRAINED_SIZES = "Training, one measurement for each size"


def _size_table(points: Sequence[tuple[SweepLayer, SweepPoint]], page: Page) -> list[Text]:
    *columns, worst = zip(*size_rows(points), strict=True)
    made = [Column(heading, cells) for heading, cells in zip(SIZE_HEADINGS, columns, strict=True)]
    names = replace(layer_names(worst, [layer.name for layer, _ in points], page, last=True), heading="worst layer")
    return table(names, dropping(made, ("undecided", "batches")), page)


SMALLEST_SIZES = "Batch size from which on a layer passes at inference (95%: significantly)"


def _by_layer(layers: Sequence[SweepLayer], scanned: int, page: Page, most: int) -> list[Text]:
    """The smallest batch size of each of the worst layers."""
    measured = [layer for layer in layers if layer.eval]
    worst = sorted(measured, key=lambda layer: at_size(layer, scanned).mismatch, reverse=True)
    kept = {layer.name for layer in worst[:most]}
    shown = [layer for layer in measured if layer.name in kept]
    if not shown:
        return []
    largest = max(point.batch_size for layer in shown for point in layer.eval)
    limits = [equivalent_batch_size(at_size(layer, scanned).limit) for layer in shown]
    columns = [
        Column(f"n_eq at {scanned}", [_equivalent(at_size(layer, scanned)) for layer in shown]),
        Column("limit", [figures.equivalent_batch_size(limit) for limit in limits]),
        Column("passes", [passing_size(layer.smallest.likely, largest) for layer in shown]),
        Column("at 95%", [passing_size(layer.smallest.surely, largest) for layer in shown]),
    ]
    names = layer_names([layer.name for layer in shown], [layer.name for layer in layers], page, last=True)
    left_out = len(measured) - len(shown)
    more = page.paragraph(_not_shown(left_out, page), first="  ")
    return [
        *page.heading(SMALLEST_SIZES),
        *table(names, dropping(columns, ("limit", columns[0].heading)), page),
        *page.paragraphs(what_limits_are(shown, scanned), "dim"),
        *(more if left_out else []),
    ]


def _not_shown(layers: int, page: Page) -> str:
    return f"{count(layers, 'layer')} with less mismatch not shown; {page.every} shows all."


def what_limits_are(shown: Sequence[SweepLayer], scanned: int) -> Iterable[str]:
    """What the limits are, where noise has one of its own."""
    if any(layer.threshold == DEFAULT_THRESHOLD for layer in shown):
        yield (
            f"limit: the n_eq below which a layer fails at size {scanned}, between {figures.plain(NOISE_THRESHOLD)} for"
            f" noise of batches alone and {figures.plain(DEFAULT_THRESHOLD)} for all else, in proportion"
        )


def passing_size(size: int | None, largest: int) -> str:
    """The smallest size that passes, or that none up to the largest does."""
    return str(size) if size else f"> {largest}"


def _equivalent(point: SweepPoint) -> str:
    return figures.equivalent_batch_size(point.equivalent_batch_size)


def conclusion(report: SweepReport) -> tuple[str, ...]:
    """The smallest batch size at which every layer passes, in words."""
    sizes = sorted({point.batch_size for layer in report.layers for point in layer.eval})
    if not sizes:
        return ("No layer could be measured at inference.",)
    found = report.smallest
    if found.likely is None:
        return _none_passes(report, sizes[-1])
    if found.surely == found.likely:
        least = ", the smallest measured" if found.likely == sizes[0] else ""
        return (f"The smallest batch size at which every layer passes at inference is {found.likely}{least}.",)
    significant = f"from {found.surely} on" if found.surely else f"at no size up to {sizes[-1]}"
    return (f"At inference every layer passes from batch size {found.likely} on, significantly (95%) {significant}.",)


def _none_passes(report: SweepReport, largest: int) -> tuple[str, ...]:
    missing = [layer for layer in report.layers if layer.flagged and not layer.eval]
    if missing:
        return (f"No batch size lets every layer pass: {missing[0].name} could not be measured at inference.",)
    failing = [layer for layer in report.layers if layer.eval and layer.smallest.likely is None]
    worst = max(failing, key=lambda layer: layer.eval[-1].mismatch, default=None)
    if worst is None:
        return ("No layer has running statistics that could differ from the batch's.",)
    last = worst.eval[-1]
    first = (
        f"No batch size up to {largest} lets every layer pass at inference: {len(failing)} of"
        f" {count(len(report.layers), 'layer')} still {'measures' if len(failing) == 1 else 'measure'} below"
        f" the limit, worst {worst.name} (n_eq {figures.equivalent_batch_size(last.equivalent_batch_size)})."
    )
    if not any(layer.eval[-1].standing == "fails" for layer in failing):
        only = count(last.batches, "micro-batch")
        first += f" None of them does so significantly (95%): only {only} of {last.batch_size} were measured."
    if last.mismatch <= _FLAT * last.theory:
        return (first,)
    return (
        first,
        f"At {largest}, i.i.d. samples would give it D = {figures.mismatch(last.theory)}, and it has"
        f" {figures.mismatch(last.mismatch)}: the batch size does not explain that, and a larger one alone"
        " does not mend it. bnprobe scan names the causes, and what it tried.",
    )


def _worst_and_median(layers: Sequence[SweepLayer], scanned: int) -> list[tuple[str, SweepLayer]]:
    ranked = sorted((layer for layer in layers if layer.eval), key=lambda layer: at_size(layer, scanned).mismatch)
    if not ranked:
        return []
    if len(ranked) < 3:
        return [("worst", ranked[-1])]
    return [("worst", ranked[-1]), ("median", ranked[(len(ranked) - 1) // 2])]


def at_size(layer: SweepLayer, size: int) -> SweepPoint:
    """The point of a size on the eval path; the first one where that was not measured."""
    return next((point for point in layer.eval if point.batch_size == size), layer.eval[0])


def _scale(drawn: Sequence[tuple[str, SweepLayer]], cells: int) -> _Scale:
    """From the smallest measured value to the largest, at most three decades, the same for all."""
    values = [point.mismatch for _, layer in drawn for point in layer.eval if point.mismatch > 0] or [1.0]
    high = max(values)
    return _Scale(max(min(values), high / 10**_DECADES) / 1.5, high, cells)


def _block(title: str, layer: SweepLayer, sizes: Sequence[int], scale: _Scale, page: Page) -> list[str]:
    """Lines of one layer, all of the same width: sign, bar, value; a blank one for a size that was not measured."""
    points = {point.batch_size: point for point in layer.eval}
    room = scale.cells + _BESIDE_BAR
    name = page.shorten([layer.name], room - len(title) - 2)[0]
    bars = [_bar(points[size], scale, page) if size in points else "" for size in sizes]
    return [pad(line, room) for line in (f"{title}: {name}", *bars)]


def _bar(point: SweepPoint, scale: _Scale, page: Page) -> str:
    length = scale.place(point.mismatch) + 1 if point.mismatch > 0 else 0
    cells = list(_FULL * length + " " * (scale.cells - length))
    cells[scale.place(point.theory)] = CENTRE
    value = pad(figures.mismatch(point.mismatch), 6, right=True)
    return page.clean(f"{_SIGNS[point.standing]} {''.join(cells)} {value}")


SIZE_HEADINGS = ("size", "batches", "worst n_eq", "fail", "undecided")


def size_rows(points: Sequence[tuple[SweepLayer, SweepPoint]]) -> Iterable[tuple[str, ...]]:
    """For each size: micro-batches, n_eq of the worst layer, how many layers fail, are undecided, the worst layer."""
    for size in sorted({point.batch_size for _, point in points}):
        here = [(layer, point) for layer, point in points if point.batch_size == size]
        worst, point = max(here, key=lambda pair: pair[1].mismatch / pair[1].limit)
        failing, undecided = (sum(p.standing == name for _, p in here) for name in ("fails", "undecided"))
        yield str(size), str(point.batches), _equivalent(point), f"{failing} of {len(here)}", str(undecided), worst.name


# --- Rates of the running average -------------------------------------------------------------------------------------

_BEST, _TIE = "*", "="
_Rates = tuple[float | None, ...]


def _rates(sweep: MomentumSweep, page: Page) -> list[Text]:
    """Mean mismatch over the layers at each rate."""
    points, best = sweep.model.points, sweep.model.best
    errors = [point.converged.standard_error for point in points]
    own = {curve.momentum for curve in sweep.layers}
    columns = [
        Column("", ["own" if point.rate in own else "" for point in points]),
        Column("rate", [rate_in_words(point.rate) for point in points], "point"),
        Column("eff. batches", ["" if p.effective_batches is None else f"{p.effective_batches:,.1f}" for p in points]),
        Column("loaded", [marked(point.loaded.mismatch, point, best.loaded) for point in points]),
        Column("converged", [marked(point.converged.mismatch, point, best.converged) for point in points]),
        Column("±", [figures.known(error, rate_mismatch) for error in errors]),
    ]
    shifted = [(point, point.shifted.mismatch) for point in points if point.shifted is not None]
    if shifted:
        late = f"> {sweep.batches - sweep.batches // 2}"
        columns += [
            Column("shifted", [marked(mismatch, point, best.shifted) for point, mismatch in shifted]),
            Column("recovery", [late if point.recovery is None else str(point.recovery) for point in points]),
        ]
    return [
        *page.heading(rates_title(sweep)),
        *table(Names([]), dropping(columns, ("eff. batches", "±", "recovery", "", "loaded")), page),
        *page.paragraphs(rates_legend(sweep), "dim"),
    ]


def rates_title(sweep: MomentumSweep) -> str:
    """What was replayed, and on what."""
    return f"Running average replayed on {count(sweep.batches, 'micro-batch')} of {sweep.batch_size}, in training"


BEST_RATES = "Best rate by layer; (+n): n more rates are not significantly worse"


def _rates_by_layer(sweep: MomentumSweep, page: Page, show_all: bool) -> list[Text]:
    """The best rate of each layer, where layers differ in it."""
    if len(sweep.layers) < 2:
        return []
    worst = sorted(sweep.layers, key=_own_mismatch, reverse=True)
    kept = {curve.layer for curve in (worst if show_all else worst[:MOST_LAYERS])}
    shown = [curve for curve in sweep.layers if curve.layer in kept]
    columns = [
        Column("own", [rate_in_words(curve.momentum) for curve in shown]),
        Column("D loaded", [rate_mismatch(_own_mismatch(curve)) for curve in shown]),
        Column("best loaded", [with_ties(curve.best.loaded) for curve in shown]),
        Column("best converged", [with_ties(curve.best.converged) for curve in shown]),
        *([Column("best shifted", [with_ties(curve.best.shifted) for curve in shown])] if _shifts(sweep) else []),
    ]
    names, network = ([curve.layer or "" for curve in curves] for curves in (shown, sweep.layers))
    layouts = dropping(columns, ("D loaded", "own", "best loaded"))
    left_out = _not_shown(len(sweep.layers) - len(shown), page)
    omitted = (f"{layer.name} ({layer.kind}) not replayed: {layer.reason}" for layer in sweep.omitted)
    return [
        *page.heading(BEST_RATES),
        *table(layer_names(names, network, page, last=True), layouts, page),
        *(page.paragraph(left_out, first="  ") if len(shown) < len(sweep.layers) else []),
        *page.paragraphs(omitted),
    ]


def tracking_in_words(sweep: MomentumSweep) -> tuple[str, ...]:
    """Which rate tracks best, in words."""
    best, rates_ = sweep.model.best, len(sweep.model.points)
    sentences = [
        f"Starting from the loaded statistics, {_verdict(best.loaded, rates_)}.",
        f"Starting from converged statistics, {_verdict(best.converged, rates_)}.",
    ]
    if _shifts(sweep):
        verdict = _verdict(best.shifted, rates_)
        sentences.append(f"When the data changes ({_change(sweep)}), {verdict}.{_recovered(sweep)}")
    return tuple(sentences)


def _verdict(best: _Rates, replayed: int) -> str:
    first, *ties = ("the cumulative average" if rate is None else rate_in_words(rate) for rate in best)
    if len(best) == replayed > 1:
        return "no rate tracks significantly (95%) better than another"
    tied = f"; {joined(ties)} {'is' if len(ties) == 1 else 'are'} not significantly worse (95%)" if ties else ""
    return f"{first} tracks best{tied}"


def _recovered(sweep: MomentumSweep) -> str:
    own = _own_point(sweep.model)
    if own is None:
        return ""
    name = f" {rate_in_words(own.rate)}, the layers' own momentum,"
    if own.recovery is None:
        return f"{name} has not recovered after {sweep.batches - sweep.batches // 2} micro-batches."
    return f"{name} takes {count(own.recovery, 'micro-batch')} to recover."


def rates_legend(sweep: MomentumSweep) -> Iterable[str]:
    """How to read the table of rates, a sentence each."""
    yield (
        "D of each micro-batch against the running statistics before it, mean over layers and the second half; ±:"
        f" standard error; {_BEST} best, {_TIE} not significantly worse (95%)"
    )
    yield "own: the layers' own momentum; eff. batches: (2 - rate) / rate"
    yield "loaded: starts from the model's statistics; converged: from the mean statistics of the first half"
    if not _shifts(sweep):
        yield "The weights are fixed here, which favours slow rates: --shift shows their cost."
        return
    yield f"shifted: from the middle on {_change(sweep)} of each channel"
    yield "recovery: micro-batches until D is within twice that without the shift"
    yield "The weights are fixed here; in training their changes have to be tracked too."


def with_ties(best: _Rates) -> str:
    """The best rate, and how many more are not significantly worse."""
    return rate_in_words(best[0]) + (f" (+{len(best) - 1})" if len(best) > 1 else "")


def _own_point(curve: MomentumCurve) -> MomentumPoint | None:
    if not curve.one_momentum:
        return None
    return next((point for point in curve.points if point.rate == curve.momentum), None)


def _own_mismatch(curve: MomentumCurve) -> float:
    point = _own_point(curve)
    return point.loaded.mismatch if point else 0.0


def _shifts(sweep: MomentumSweep) -> bool:
    return sweep.model.points[0].shifted is not None


def _change(sweep: MomentumSweep) -> str:
    parts = []
    if sweep.shift:
        parts.append(f"means {sweep.shift:+g} std")
    if sweep.scale != 1.0:
        parts.append(f"std {TIMES} {sweep.scale:g}")
    return " and ".join(parts) or "no change at all"


def rate_in_words(rate: float | None) -> str:
    """A rate, or that it is the cumulative average."""
    return "cumulative" if rate is None else f"{rate:g}"


def marked(value: float, point: MomentumPoint, best: _Rates) -> str:
    """D with the mark of the best rate, or of one that is not significantly worse."""
    mark = _BEST if point.rate == best[0] else _TIE if point.rate in best else " "
    return rate_mismatch(value) + mark


def rate_mismatch(value: float) -> str:
    """Four decimals: rates differ in the third."""
    return f"{value:.4f}" if 0.0001 <= value < 10 else f"{value:.2g}"
