"""The report of ``bnprobe scan``: what was run, the layers, the output, and whatever else was measured."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from statistics import median

from rich.text import Text

from bnprobe.numbers import count, grouped, listed, percent, plural
from bnprobe.records import (
    WITHIN_SCAN,
    WITHOUT_RANDOM,
    Composition,
    Distribution,
    Domains,
    ExtraPass,
    Layer,
    Output,
    PathMeasurement,
    PathValues,
    Report,
    Scan,
    SelfCheck,
    SkippedLayer,
)
from bnprobe.report import figures, further
from bnprobe.report.baseline import known
from bnprobe.report.diagnoses import closing, closing_lines
from bnprobe.report.findings import counted
from bnprobe.report.layers import MEANINGS, MOST_CALLS, layer_table, legend, select, unmeasured, with_sign
from bnprobe.report.mismatch import shares
from bnprobe.report.next_step import advised_step, under_limit
from bnprobe.report.page import TIMES, UNDECIDED, UNMEASURED, Page, RenderOptions, to_string
from bnprobe.report.table import Column, TableLayout, layer_names, table
from bnprobe.rules import title_of
from bnprobe.stats.theory import mismatch_iid

MOST_LAYERS = 25
"""A network with more layers shows its worst, unless all are asked for."""

_NAMES_LISTED = 6
_MOST_NOTES = 10


def render(report: Report, options: RenderOptions) -> str:
    """The report as text in lines of at most ``options.width`` cells."""
    page, show_all = Page.of(options), options.show_all
    shown = list(report.layers) if show_all else select(report.layers, MOST_LAYERS)
    end = closing(report, options.command)
    parts = [
        header(report, page),
        page.verdict(end.sign, end.headline if end.sign == UNDECIDED else f"{one_line(report)}."),
        _layers(report.layers, shown, page, show_all),
        shares(report, shown, page),
        page.paragraphs(likeness(report, show_all), first=""),
        clipping(report.layers, page, show_all),
        _skipped(report, page, show_all),
        _layer_notes(report.layers, page, show_all),
        at_batch_sizes(report.layers, page),
        _output(report.summary.output, page, scores=not report.summary.gaps),
        further.gaps(report.summary.gaps, page, report.scan.sample),
        further.backward(report, page, show_all),
        further.updates(report, page, show_all),
        page.section("Notes on the scan", report.scan.notes),
        page.section(COST, cost(report.scan), rest="    "),
        known(report.baseline, page, show_all),
        further.remedies(report, page, advised_step(report, options.command), end.step),
        closing_lines(end, report, page, show_all),
    ]
    return to_string(parts, options.color)


def one_line(report: Report) -> str:
    """The result in one line, e.g. "6 of 9 layers flagged, 1 error: batches too small".

    Where no layer is flagged, the findings come first.
    """
    partial = f"PARTIAL, {report.scan.stopped}: " if report.scan.partial else ""
    summary = report.summary
    found = counted(diagnosis.severity for diagnosis in report.diagnoses if diagnosis.severity != "info")
    flagged = f"{summary.flagged} of {count(summary.layers, 'layer')} flagged"
    undecided = [f"{summary.undecided} undecided"] if summary.undecided else []
    if not found:
        return partial + ", ".join([flagged, *undecided])
    first = title_of(report.diagnoses[0].rule, report.diagnoses[0].cause)
    if summary.flagged:
        return f"{partial}{', '.join([flagged, *undecided, *found])}: {first}"
    return f"{partial}{', '.join(found)}: {first}; {', '.join(['no layer flagged', *undecided])}"


# --- What was scanned, and how ----------------------------------------------------------------------------------------


ON_SCREEN = ("taken", "data", "checkpoint", "measured")
"""What a report of one screen says of the run."""


def header(report: Report, page: Page, labels: Container[str] | None = None) -> list[Text]:
    """What was scanned, and what was run: all of it, or what has these labels."""
    rows = [(label, text) for label, text in what_was_run(report) if labels is None or label in labels]
    return [*page.heading(title(report)), *page.labelled(rows)]


def title(report: Report) -> str:
    """What the report is of, and what wrote it."""
    partial = " (PARTIAL)" if report.scan.partial else ""
    return f"{report.tool.name} {report.tool.version}: scan of {report.scan.model}{partial}"


def what_was_run(report: Report) -> list[tuple[str, str]]:
    """Data, weights, device and measurements, each with its label."""
    scan = report.scan
    taken = [f"{role}: {words}" for role, words in scan.taken.items()]
    roles = {why: [f"no {role}" for role, its in scan.missing.items() if its == why] for why in scan.missing.values()}
    taken += [f"{' and '.join(each)}: {why}" for why, each in roles.items()]
    return [
        *([("taken", "; ".join(taken))] if taken else []),
        ("data", figures.data(scan)),
        *([("held-out", _held_out(scan, scan.held_out))] if scan.held_out else []),
        *([("checkpoint", scan.checkpoint)] if scan.checkpoint else []),
        ("device", _device(report)),
        ("measured", _measured(scan)),
        ("emulation", _emulation(scan)),
    ]


def _held_out(scan: Scan, source: str) -> str:
    """Where the held-out data came from, and how much of it was measured."""
    where, measured = figures.with_samples(source, scan), scan.held_out_images
    known = measured is None or where.endswith(f"({count(measured, scan.sample)})")
    return where if known else f"{where}; {count(measured or 0, scan.sample)} measured"


def _device(report: Report) -> str:
    scan, environment = report.scan, report.environment
    kind = scan.dtype if scan.autocast is None else f"{scan.dtype}, autocast to {scan.autocast}"
    return f"{scan.device} ({environment.device_name}), {kind}, torch {environment.torch}, seed {scan.seed}"


_WORTH_SAYING = 0.5
"""Part of the time of the paths from which on that of all measurements is said, too."""


def _measured(scan: Scan) -> str:
    batches, samples = count(scan.batches, "micro-batch"), count(scan.images, scan.sample)
    sizes = f"{TIMES} {scan.batch_size}" if scan.size_range is None else "of {} to {}".format(*scan.size_range)
    after = sum(extra.seconds for extra in scan.passes if extra.name not in WITHIN_SCAN)
    total = f", {scan.seconds + after:.1f} s in all" if after >= _WORTH_SAYING * scan.seconds else ""
    text = f"{batches} {sizes} = {samples} in {scan.seconds:.1f} s{total}; {_stopped(scan)}"
    return f"{text}; {count(scan.left_out, scan.sample)} left over" if scan.left_out else text


def _stopped(scan: Scan) -> str:
    if scan.partial:
        return f"PARTIAL, {scan.stopped}"
    if scan.stopped == "data_exhausted" and scan.batches_requested:
        return f"all the data, {scan.batches_requested} micro-batches were requested"
    return {
        "requested": "as requested",
        "decided": "every layer decided",
        "max_batches": "stopped at --max-batches",
        "data_exhausted": "all the data",
    }[scan.stopped]


def _emulation(scan: Scan) -> str:
    used = (
        f"{count(scan.physical_batch, scan.sample)} at once" if scan.emulated else "none, micro-batches run one by one"
    )
    checked = "" if scan.self_check is None else f" Self-check {_self_check(scan.self_check)}"
    return f"{used}. {scan.emulation}{checked}"


def _self_check(check: SelfCheck) -> str:
    error = max(check.output_error, check.statistic_error)
    compared = f"in float64, {_COMPARED}" if check.float64 else _COMPARED
    random = "steady" in check.paths
    if not check.passed:
        if random and "train" in check.paths:
            compared = "with random layers, replacing a micro-batch changes the others; they"
        where = f", first in {check.first_layer}" if check.first_layer else ""
        return f"failed: {compared} differ by {error:.0e}{where}."
    agree = f"agree {f'to {error:.0e}' if error else 'exactly'}"
    if random:
        return f"passed: without random layers, {compared} {agree}; with them, none changes another."
    only = "" if "train" in check.paths else " at inference"
    return f"passed: {compared} {agree}{only}."


_COMPARED = "micro-batches run together and one by one"


COST = "Measured besides"


def cost(scan: Scan) -> list[str]:
    """Measurements beside those of training and inference, with their reason and cost, and the regrouped samples."""
    sentences = [_pass(extra, scan.sample) for extra in scan.passes]
    if (pool := scan.pool) is not None:
        sentences.append(
            f"{plural(scan.sample)} regrouped at random: {count(pool.images, scan.sample)}, {figures.size(pool.bytes)},"
            f" in {count(pool.regrouped, 'micro-batch')} (to measure non-i.i.d. batches)"
        )
    return sentences


_PASSES = {
    WITHOUT_RANDOM: "training without random layers",
    "impact": "output change",
    "what-if": "remedies without training",
    "chance": "outputs of other samples",
}
"""Words for the names of passes in the JSON report."""


def _pass(extra: ExtraPass, sample: str) -> str:
    reason = extra.reason.removesuffix(".")
    why = f" ({reason})" if reason else ""
    # What could not be tried took time, but no sample of its own.
    samples = f"{count(extra.images, sample)}, " if extra.images else ""
    return f"{_PASSES.get(extra.name, extra.name)}: {samples}{extra.seconds:.1f} s{why}"


# --- Layers -----------------------------------------------------------------------------------------------------------


_CALLS_LEFT_OUT = (
    f"Of a layer that is called more than {MOST_CALLS} times per forward pass, the worst call is shown; --all shows"
    " all."
)


def _layers(layers: Sequence[Layer], shown: Sequence[Layer], page: Page, show_all: bool) -> list[Text]:
    """How many layers there are and how many carry each sign, the table, what it leaves out, and how to read it."""
    if not layers:
        return []
    names = {layer.name for layer in shown}
    hidden = [layer for layer in layers if layer.name not in names]
    folded = not show_all and any(len(layer.calls) > MOST_CALLS for layer in shown)
    left_out = f"{count(len(hidden), 'layer')} with less mismatch not shown ({_by_sign(hidden)}); --all shows all."
    return [
        *page.heading(layers_by_sign(layers)),
        *layer_table(shown, layers, page, show_all),
        *(page.paragraph(left_out) if hidden else []),
        *(page.paragraph(_CALLS_LEFT_OUT) if folded else []),
        *legend(layers, page),
    ]


def layers_by_sign(layers: Sequence[Layer]) -> str:
    """How many layers there are, and how many carry each sign."""
    kinds = {layer.kind for layer in layers}
    noun = f"{kinds.pop()} layer" if len(kinds) == 1 else "layer"
    return f"{count(len(layers), noun)}: {_by_sign(layers)}"


def _by_sign(layers: Sequence[Layer]) -> str:
    frozen, others = unmeasured(layers)
    found = [(sign, len(with_sign(layers, sign)), meaning) for sign, meaning in MEANINGS.items()]
    found += [(UNMEASURED, frozen, "frozen, alike in both modes"), (UNMEASURED, others, "not measured in both modes")]
    return ", ".join(f"{sign} {number} {meaning}" for sign, number, meaning in found if number)


def _skipped(report: Report, page: Page, show_all: bool) -> list[Text]:
    """Layers that could not be judged, by reason."""
    groups = skipped_by_reason(report.skipped)
    lines = page.heading("Skipped") if groups else []
    for (kind, reason), names in groups.items():
        what = f"{names[0]} ({kind})" if len(names) == 1 else f"{len(names)} {TIMES} {kind}"
        lines += page.paragraph(f"{what}: {reason}", first="  ", rest="    ")
        lines += page.paragraph(_listed(names, show_all), first="    ") if len(names) > 1 else []
    return lines


def skipped_by_reason(skipped: Iterable[SkippedLayer]) -> dict[tuple[str, str], list[str]]:
    """Names of the layers that could not be judged, by class name and reason."""
    return grouped(((layer.kind, layer.reason), layer.name) for layer in skipped)


def _layer_notes(layers: Iterable[Layer], page: Page, show_all: bool) -> list[Text]:
    """What else is to be known of layers, and the other names of shared ones."""
    groups = layers_by_note(layers)
    shown = list(groups.items()) if show_all else list(groups.items())[:_MOST_NOTES]
    lines = page.section(
        "Notes on layers", (f"{_listed(names, show_all)}: {note}" for note, names in shown), rest="    "
    )
    if len(shown) < len(groups):
        left_out = count(len(groups) - len(shown), "more note")
        lines += page.paragraph(f"{left_out}; --all shows all.", first="  ")
    return lines


def layers_by_note(layers: Iterable[Layer]) -> dict[str, list[str]]:
    """Names of layers by what else is to be known of them: a note, or the other names of a shared one."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        if layer.note:
            groups.setdefault(layer.note, []).append(layer.name)
        if layer.aliases:
            groups[f"The same layer as {', '.join(layer.aliases)}."] = [layer.name]
    return groups


def _listed(names: Sequence[str], show_all: bool) -> str:
    return listed(names, len(names) if show_all else _NAMES_LISTED)


def at_batch_sizes(layers: tuple[Layer, ...], page: Page) -> list[Text]:
    """The worst layer at each batch size asked for."""
    sizes = sorted({point.batch_size for layer in layers for point in layer.batch_sizes})
    if not sizes:
        return []
    worst, values, under = zip(*(_at_size(layers, size) for size in sizes), strict=True)
    columns = [
        Column("size", [str(size) for size in sizes]),
        Column("worst n_eq", values, "point"),
        Column("below limit", under),
    ]
    lines = table(layer_names(worst, [layer.name for layer in layers], page, last=True), [TableLayout(columns)], page)
    return [*page.heading("Other batch sizes: mismatch at inference, same samples"), *lines]


def _at_size(layers: tuple[Layer, ...], size: int) -> tuple[str, str, str]:
    points = [(layer, point) for layer in layers for point in layer.batch_sizes if point.batch_size == size]
    worst, point = max(points, key=lambda pair: pair[1].mismatch / pair[1].limit)
    value = figures.equivalent_batch_size(point.equivalent_batch_size)
    return worst.name, value, f"{len(under_limit(layers, size))} of {len(points)}"


# --- How alike the samples of a batch are, and the calls of a shared layer --------------------------------------------

_SIGNIFICANT = 0.01
"""Corrected p-values below this are significant."""

_SLIGHT = 0.05
"""A larger intraclass correlation would matter if it were significant."""

_MOST_SHARED = 5


def likeness(report: Report, show_all: bool) -> list[str]:
    """What the composition of batches and shared layers mean, a sentence each."""
    return [*_composition(report), *_domains(report.layers, show_all)]


def effective_samples(composition: Composition, batch_size: int) -> float:
    """Samples drawn at random that determine the mean as well as one batch does."""
    return batch_size / max(composition.design_effect, 1e-9)


def _composition(report: Report) -> list[str]:
    measured = [(layer, layer.composition) for layer in report.layers if layer.composition is not None]
    if not measured:
        return []
    size = report.scan.batch_size
    alike = [(layer, found) for layer, found in measured if found.p_value < _SIGNIFICANT]
    if not alike:
        most = max(0.0, *(found.intraclass_correlation for _, found in measured))
        more = "no more" if most < _SLIGHT else "not significantly more"
        return [
            f"The samples of a batch of {size} are {more} alike than samples drawn at random"
            f" (intraclass correlation at most {most:.2f}, {count(len(measured), 'layer')})."
        ]
    worst, found = max(alike, key=lambda pair: pair[1].intraclass_correlation)
    effective = effective_samples(found, size)
    typical = f"{median(effective_samples(other, size) for _, other in alike):.2g}"
    middle = f" (median of these layers: {typical})" if typical != f"{effective:.2g}" else ""
    return [
        f"The samples of a batch of {size} are alike in {len(alike)} of {count(len(measured), 'layer')}:"
        f" their intraclass correlation (0: drawn at random, 1: all the same) is up to"
        f" {found.intraclass_correlation:.2f}, in {worst.name}. There, a batch is worth only {_samples(effective)}"
        f" drawn at random{middle}."
    ]


def _samples(number: float) -> str:
    """As a figure; only exactly "1" is singular."""
    return f"{number:.2g} sample{'' if f'{number:.2g}' == '1' else 's'}"


def _domains(layers: Sequence[Layer], show_all: bool) -> list[str]:
    found = [(layer, layer.domains) for layer in layers if layer.domains is not None]
    apart = [(layer, domains) for layer, domains in found if domains.mismatch > mismatch_iid(layer.threshold)]
    if not apart:
        return []
    apart.sort(key=lambda pair: pair[1].mismatch, reverse=True)
    shown = apart if show_all else apart[:_MOST_SHARED]
    more = f" and {len(apart) - len(shown)} more (--all)" if len(shown) < len(apart) else ""
    distances = ", ".join(_distance(layer, domains) for layer, domains in shown)
    return [
        f"Called several times per forward pass, on different data: {distances}{more}. D is the distance of each call's"
        " statistics from those of all calls together, which the running statistics hold. In the bars this is part of"
        " the share of non-i.i.d. batches."
    ]


def _distance(layer: Layer, domains: Domains) -> str:
    span = figures.span(domains.interval)
    around = f"; 95%: {span}" if span else ""
    return f"{layer.name} ({layer.calls_per_forward} calls, D = {figures.mismatch(domains.mismatch)}{around})"


# --- What Batch Renorm's usual limits would clip ----------------------------------------------------------------------

MOST_CLIPPED = 5
"""So many layers are listed, those of which most would be clipped, unless all are asked for."""

_NOTABLE = 0.01
"""Fraction of values from which clipping is worth a line, however much of it i.i.d. data explain."""

_EXCESS, _SLACK = 2.0, 0.005
"""Below that, clipping is worth a line if it is so many times what i.i.d. data explain, and this fraction more."""


def clipping(layers: Sequence[Layer], page: Page, show_all: bool) -> list[Text]:
    """The flagged layers of which Batch Renorm would clip much in training; nothing if there are none.

    Args:
        layers: All layers.
        page: What the lines are written on.
        show_all: Every such layer, not only the worst.
    """
    found = most_clipped(layers)
    if not found:
        return []
    shown = found if show_all else found[:MOST_CLIPPED]
    columns = [
        Column("r", [percent(path.r.clipped) for _, path in shown]),
        Column("by chance", [clipped_by_chance(path, path.r) for _, path in shown]),
        Column("d", [percent(path.d.clipped) for _, path in shown]),
        Column("by chance", [clipped_by_chance(path, path.d) for _, path in shown]),
    ]
    chance = by_chance([path for _, path in shown])
    more = f"; --all shows {count(len(found) - len(shown), 'more layer')}" if len(shown) < len(found) else ""
    names = layer_names([name for name, _ in shown], [layer.name for layer in layers], page)
    return [
        *page.heading(CLIPPING),
        *table(names, [TableLayout(columns)], page),
        *page.paragraph(f"{chance}{more}", style="dim", first="  "),
    ]


CLIPPING = "Values that Batch Renorm (r_max 3, d_max 5) would clip in training"


def most_clipped(layers: Iterable[Layer]) -> list[tuple[str, PathMeasurement]]:
    """The flagged layers of which Batch Renorm would clip much in training, the worst first, with their train path."""
    flagged = [(layer.name, layer.train) for layer in layers if layer.flagged and layer.train is not None]
    found = [(name, path) for name, path in flagged if _notable(path.r) or _notable(path.d)]
    return sorted(found, key=_most_clipped, reverse=True)


def by_chance(paths: Sequence[PathMeasurement]) -> str:
    """What `clipped_by_chance` is, as a legend."""
    beyond = f" ({UNMEASURED}: no size of batch explains the mismatch)" if any(map(_is_beyond_chance, paths)) else ""
    return f"by chance: as much as independent values in batches of n_eq would have clipped{beyond}"


def clipped_by_chance(path: PathMeasurement, values: Distribution) -> str:
    """What noise of batches would have clipped; of a mismatch that is no noise, nothing is expected by chance."""
    return UNMEASURED if _is_beyond_chance(path) else percent(values.clipped_iid)


def _is_beyond_chance(path: PathMeasurement) -> bool:
    return path.mismatch >= mismatch_iid(1)


def _most_clipped(layer: tuple[str, PathMeasurement]) -> float:
    _, path = layer
    return max(path.r.clipped, path.d.clipped)


def _notable(values: Distribution) -> bool:
    return values.clipped > _NOTABLE or values.clipped > _EXCESS * values.clipped_iid + _SLACK


# --- The output -------------------------------------------------------------------------------------------------------


def _output(found: Output, page: Page, scores: bool) -> list[Text]:
    """How far training and inference are apart at the model's output.

    Args:
        found: The figures.
        page: What the lines are written on.
        scores: With loss and metric; without, where another part shows them in more detail.
    """
    return page.section(OUTPUT, output_in_words(found, scores))


OUTPUT = "Output: training against inference, on the same samples"


def output_in_words(found: Output, scores: bool) -> list[str]:
    """How far training and inference are apart at the model's output, a sentence each; see ``_output``."""
    both = [*_in_both_modes("Loss", found.loss), *_in_both_modes("Metric", found.metric)] if scores else []
    return [text for text in (*_output_figures(found), *both, found.note) if text]


def _output_figures(found: Output) -> list[str]:
    sentences = []
    if found.relative_l2 is not None:
        sentences.append(f"The outputs are {figures.relative(found.relative_l2)} apart (relative L2).")
    if found.argmax_changed is not None:
        changed = percent(found.argmax_changed) if found.argmax_changed else "none"
        what = "The predicted class changes" if found.predicts_labels else "The largest of the outputs is another one"
        sentences.append(f"{what} for {changed} of the samples.")
    if found.kl_divergence is not None and found.predicts_labels:
        sentences.append(f"KL divergence of the class distributions: {found.kl_divergence:.3g} nats.")
    if found.repeat:
        apart = figures.relative(found.repeat)
        sentences.append(f"Two eval-mode passes over the same samples are {apart} apart: it is random at inference.")
    return sentences


def _in_both_modes(name: str, values: PathValues | None) -> list[str]:
    if values is None:
        return []
    train, evaluated = figures.plain(values.train), figures.plain(values.eval)
    return [f"{name}: {train} in training, {evaluated} at inference."]
