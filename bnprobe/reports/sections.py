"""The parts of the terminal report around the table of layers; each returns its lines, or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.text import Text

from bnprobe.records import Layer, Output, PathValues, Report, Scan, SelfCheck
from bnprobe.reports import figures
from bnprobe.reports.glyphs import TIMES
from bnprobe.reports.layout import Page, pad
from bnprobe.reports.nextstep import under_limit
from bnprobe.reports.standing import MEANINGS, with_sign

_NAMES_LISTED = 6
_MOST_NOTES = 10


def header(report: Report, page: Page) -> list[Text]:
    """What was scanned, and how."""
    scan = report.scan
    partial = " (PARTIAL)" if scan.partial else ""
    title = page.heading(f"{report.tool.name} {report.tool.version}: scan of {scan.model}{partial}")
    rows = [
        ("data", f"{scan.data} (synthetic)" if scan.synthetic else scan.data),
        *([("checkpoint", scan.checkpoint)] if scan.checkpoint else []),
        ("device", _device(report)),
        ("measured", _measured(scan)),
        ("emulation", _emulation(scan)),
    ]
    return [*title, *page.labelled(rows)]


def tally(layers: Sequence[Layer], page: Page) -> list[Text]:
    """How many layers there are, of which kind, and how many carry each sign."""
    kinds = {layer.kind for layer in layers}
    noun = f"{kinds.pop()} layer" if len(kinds) == 1 else "layer"
    return page.heading(f"{figures.count(len(layers), noun)}: {_by_sign(layers)}")


def hidden(layers: Sequence[Layer], shown: Sequence[Layer], page: Page) -> list[Text]:
    """What the table leaves out."""
    names = {layer.name for layer in shown}
    left_out = [layer for layer in layers if layer.name not in names]
    if not left_out:
        return []
    text = f"{figures.count(len(left_out), 'layer')} with less mismatch not shown"
    return page.paragraph(f"{text} ({_by_sign(left_out)}); --all shows every one.")


def skipped(report: Report, page: Page, show_all: bool) -> list[Text]:
    """Layers that could not be judged, by reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in report.skipped:
        groups.setdefault((layer.kind, layer.reason), []).append(layer.name)
    lines = page.heading("Skipped") if groups else []
    for (kind, reason), names in groups.items():
        what = f"{names[0]} ({kind})" if len(names) == 1 else f"{len(names)} {TIMES} {kind}"
        lines += page.paragraph(f"{what}: {reason}", first="  ", rest="    ")
        lines += page.paragraph(_listed(names, show_all), first="    ") if len(names) > 1 else []
    return lines


def notes(layers: Iterable[Layer], page: Page, show_all: bool) -> list[Text]:
    """What else is to be known of layers, and the other names of shared ones."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        if layer.note:
            groups.setdefault(layer.note, []).append(layer.name)
        if layer.aliases:
            groups[f"The same layer as {', '.join(layer.aliases)}."] = [layer.name]
    shown = list(groups.items()) if show_all else list(groups.items())[:_MOST_NOTES]
    lines = page.heading("Notes on layers") if groups else []
    for note, names in shown:
        lines += page.paragraph(f"{_listed(names, show_all)}: {note}", first="  ", rest="    ")
    if len(shown) < len(groups):
        left_out = figures.count(len(groups) - len(shown), "more note")
        lines += page.paragraph(f"{left_out}; --all shows every one.", first="  ")
    return lines


def batch_sizes(layers: tuple[Layer, ...], page: Page) -> list[Text]:
    """The worst layer at each batch size asked for."""
    sizes = sorted({point.batch_size for layer in layers for point in layer.batch_sizes})
    if not sizes:
        return []
    rows = [("size", "worst n_eq", "below limit", "layer")]
    rows += [_batch_size_row(layers, size) for size in sizes]
    columns = [[page.clean(cell) for cell in column] for column in zip(*rows, strict=True)]
    columns[1] = [columns[1][0], *figures.points_in_line(columns[1][1:])]
    widths = [max(map(cell_len, column)) for column in columns[:3]]
    names = page.shorten(columns[3], page.width - sum(widths) - 8)
    lines = page.heading("Other batch sizes, eval path, same images")
    for *cells, name in zip(*columns[:3], names, strict=True):
        padded = [pad(cell, width, right=True) for cell, width in zip(cells, widths, strict=True)]
        lines.append(Text("  " + "  ".join([*padded, name])))
    return lines


def output(found: Output, page: Page, scores: bool = True) -> list[Text]:
    """How far the two paths are apart at the model's output.

    Args:
        found: The figures.
        page: What the lines are written on.
        scores: With loss and metric; without, where another part shows them in more detail.
    """
    sentences = [*_output_figures(found), *(_scores(found) if scores else []), *([found.note] if found.note else [])]
    lines = [line for text in sentences for line in page.paragraph(text, first="  ")]
    return [*page.heading("Output, train path against eval path on the same images"), *lines] if lines else []


def scan_notes(scan: Scan, page: Page) -> list[Text]:
    """Further facts that bear on the result."""
    lines = [line for note in scan.notes for line in page.paragraph(note, first="  ")]
    return [*page.heading("Notes on the scan"), *lines] if lines else []


def _by_sign(layers: Iterable[Layer]) -> str:
    numbers = ((mark, len(with_sign(layers, mark)), meaning) for mark, meaning in MEANINGS.items())
    return ", ".join(f"{mark} {number} {meaning}" for mark, number, meaning in numbers if number)


def _device(report: Report) -> str:
    scan, environment = report.scan, report.environment
    kind = scan.dtype if scan.autocast is None else f"{scan.dtype}, autocast to {scan.autocast}"
    return f"{scan.device} ({environment.device_name}), {kind}, torch {environment.torch}, seed {scan.seed}"


def _measured(scan: Scan) -> str:
    batches = figures.count(scan.batches, "micro-batch")
    images = figures.count(scan.images, "image")
    text = f"{batches} {TIMES} {scan.batch_size} = {images} in {scan.seconds:.1f} s; {_stopped(scan)}"
    return f"{text}; {figures.count(scan.left_out, 'image')} left over" if scan.left_out else text


def _stopped(scan: Scan) -> str:
    if scan.partial:
        return f"PARTIAL, {scan.stopped}"
    if scan.stopped == "data_exhausted" and scan.batches_requested:
        return f"all the data, {scan.batches_requested} were asked for"
    return {
        "requested": "as requested",
        "decided": "every layer decided",
        "max_batches": "the most allowed",
        "data_exhausted": "all the data",
    }[scan.stopped]


def _emulation(scan: Scan) -> str:
    used = f"{scan.physical_batch} images at once" if scan.emulated else "none, real micro-batches"
    checked = "" if scan.self_check is None else f" Self-check {_self_check(scan.self_check)}"
    return f"{used}. {scan.emulation}{checked}"


def _self_check(check: SelfCheck) -> str:
    error = max(check.output_error, check.statistic_error)
    if check.passed:
        return f"passed: real micro-batches agree {f'to {error:.0e}' if error else 'exactly'}."
    where = f", first in {check.first_layer}" if check.first_layer else ""
    return f"failed: real micro-batches differ by {error:.0e}{where}."


def _listed(names: Sequence[str], show_all: bool) -> str:
    listed = names if show_all else names[:_NAMES_LISTED]
    more = f" and {len(names) - len(listed)} more" if len(listed) < len(names) else ""
    return ", ".join(listed) + more


def _batch_size_row(layers: tuple[Layer, ...], size: int) -> tuple[str, str, str, str]:
    points = [(layer, point) for layer in layers for point in layer.batch_sizes if point.batch_size == size]
    worst, point = max(points, key=lambda pair: pair[1].mismatch)
    under = len(under_limit(layers, size))
    value = figures.equivalent_batch_size(point.equivalent_batch_size)
    return str(size), value, f"{under} of {len(points)}", worst.name


def _output_figures(found: Output) -> list[str]:
    sentences = []
    if found.relative_l2 is not None:
        sentences.append(f"The outputs are {figures.relative(found.relative_l2)} apart (relative L2).")
    if found.argmax_changed is not None:
        changed = figures.percent(found.argmax_changed)
        sentences.append(f"The predicted class changes for {changed} of the images.")
    if found.kl_divergence is not None:
        sentences.append(f"KL divergence of the class distributions: {found.kl_divergence:.3g} nats.")
    return sentences


def _scores(found: Output) -> list[str]:
    return _both_paths("Loss", found.loss) + _both_paths("Metric", found.metric)


def _both_paths(name: str, values: PathValues | None) -> list[str]:
    if values is None:
        return []
    train, evaluated = figures.plain(values.train), figures.plain(values.eval)
    return [f"{name}: {train} on the train path, {evaluated} on the eval path."]
