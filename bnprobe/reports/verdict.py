"""The closing verdict: what the scan found, in words, and the command to run next."""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.records import Interval, Layer, Report, Scan
from bnprobe.reports import figures, glyphs
from bnprobe.reports.command import with_options
from bnprobe.reports.standing import with_sign, worse_path, worst_first

SAVE = {"--format": "json", "--output": "report.json"}

_LARGEST_SUGGESTED = 64
_BATCHES_OF_LARGEST = 4


@dataclass(frozen=True)
class Step:
    """Something to do next: why, and the command (None: nothing that a command could do)."""

    why: str
    command: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The end of a report."""

    headline: str
    sign: str
    sentences: tuple[str, ...]
    step: Step


def verdict(report: Report, command: str) -> Verdict:
    """What to tell the reader at the end."""
    flagged = worst_first(with_sign(report.layers, glyphs.FLAGGED))
    undecided = worst_first(with_sign(report.layers, glyphs.UNDECIDED))
    fine = with_sign(report.layers, glyphs.FINE)
    if flagged:
        return _flagged(report, flagged, command)
    if undecided:
        return _undecided(report, undecided, command)
    return _clean(report, command) if fine else _nothing(report, command)


def _flagged(report: Report, flagged: list[Layer], command: str) -> Verdict:
    sentences = (_worst(flagged), _look_first(report, flagged[0]), _also_undecided(report), *_caveats(report))
    return Verdict(
        headline=f"{_share(len(flagged), report)} flagged: training and inference normalize differently.",
        sign=glyphs.FLAGGED,
        sentences=tuple(filter(None, sentences)),
        step=_interrupted_step(report, command) or _batch_size_step(report, command),
    )


def _undecided(report: Report, undecided: list[Layer], command: str) -> Verdict:
    return Verdict(
        headline=f"No layer is flagged, but {_share(len(undecided), report)} undecided.",
        sign=glyphs.UNDECIDED,
        sentences=(*(_straddling(layer) for layer in undecided[:3]), *_caveats(report)),
        step=_interrupted_step(report, command) or _more_batches_step(report.scan, command),
    )


def _clean(report: Report, command: str) -> Verdict:
    fine = with_sign(report.layers, glyphs.FINE)
    limits = {layer.threshold for layer in fine}
    limit = f"{figures.plain(limits.pop())} values" if len(limits) == 1 else "its limit"
    every = len(fine) == len(report.layers)
    which = "every layer" if every else f"{len(fine)} of {len(report.layers)} layers"
    verb = "behaves" if every or len(fine) == 1 else "behave"
    text = f"{which} {verb} as if the batch were at least {limit}, in training and at inference."
    keep = Step("To keep the figures:", with_options(command, SAVE))
    return Verdict(
        headline=f"So far {text}" if report.scan.partial else text[0].upper() + text[1:],
        sign=glyphs.FINE,
        sentences=_caveats(report),
        step=_interrupted_step(report, command) or keep,
    )


def _nothing(report: Report, command: str) -> Verdict:
    return Verdict(
        headline="No layer could be judged.",
        sign=glyphs.UNMEASURED,
        sentences=_caveats(report),
        step=_interrupted_step(report, command) or Step("The notes above say what stands in the way."),
    )


def _share(number: int, report: Report) -> str:
    return f"{number} of {figures.count(len(report.layers), 'layer')} {'is' if number == 1 else 'are'}"


def _worst(flagged: list[Layer]) -> str:
    first, others = flagged[0], flagged[1:3]
    tail = f" Next worst: {', '.join(_with_figure(layer) for layer in others)}." if others else ""
    if first.train is None or first.eval is None:
        path = "train" if first.train is None else "eval"
        return f"Worst is {first.name}, which could not be measured on the {path} path.{tail}"
    path = "train" if first.train.mismatch >= first.eval.mismatch else "eval"
    return f"Worst is {first.name}: it {_behaviour(first)} ({path} path).{tail}"


def _look_first(report: Report, worst: Layer) -> str:
    """Where the worst layer is off on the eval path only, what upstream layers do at inference may be why."""
    off = [layer for layer in report.layers if layer.flagged and _off_in_training(layer)]
    if not off or _off_in_training(worst) or worst.train is None:
        return ""
    return (
        f"{worst.name} is off on the eval path only, which what reaches it from earlier layers can cause:"
        f" look first at {off[0].name}, the first layer that is off on the train path too."
    )


def _off_in_training(layer: Layer) -> bool:
    n_eq = layer.train.equivalent_batch_size if layer.train else None
    return n_eq is not None and n_eq < layer.threshold


def _behaviour(layer: Layer) -> str:
    path = worse_path(layer.train, layer.eval)
    if path is not None and path.mismatch >= 2:
        return f"is further off than any batch size explains, D = {figures.mismatch(path.mismatch)}"
    limit = figures.plain(layer.threshold)
    return f"behaves as if the batch were {figures.path_equivalent(path)} values, and the limit is {limit}"


def _with_figure(layer: Layer) -> str:
    return f"{layer.name} (n_eq {figures.path_equivalent(worse_path(layer.train, layer.eval))})"


def _straddling(layer: Layer) -> str:
    for name, path in (("train", layer.train), ("eval", layer.eval)):
        if path is not None and _contains(path.equivalent_batch_size_interval, layer.threshold):
            span = figures.equivalent_interval(path.equivalent_batch_size_interval)
            limit = figures.plain(layer.threshold)
            return f"{layer.name}: n_eq is {span} (95%, {name} path), and the limit is {limit}."
    return f"{layer.name} is undecided."


def _contains(interval: Interval, value: float) -> bool:
    low, high = interval
    return low <= value and (high is None or value <= high)


def _also_undecided(report: Report) -> str:
    number = len(with_sign(report.layers, glyphs.UNDECIDED))
    return f"{figures.count(number, 'more layer')} undecided." if number else ""


def _caveats(report: Report) -> tuple[str, ...]:
    unmeasured = len(with_sign(report.layers, glyphs.UNMEASURED))
    scan = report.scan
    caveats = (
        (scan.partial, f"{scan.stopped.capitalize()}: only {figures.count(scan.batches, 'micro-batch')} measured."),
        (unmeasured > 0, f"{figures.count(unmeasured, 'layer')} could not be measured on both paths."),
        (bool(report.skipped), f"{figures.count(len(report.skipped), 'layer')} skipped."),
        (scan.synthetic, "The inputs were made up: this shows the noise of small batches, not your data."),
    )
    return tuple(text for applies, text in caveats if applies)


def _interrupted_step(report: Report, command: str) -> Step | None:
    return Step("To measure to the end:", command) if report.scan.partial else None


def _more_batches_step(scan: Scan, command: str) -> Step:
    # Four times the batches halve the intervals.
    more = str(4 * max(scan.batches, 1))
    if scan.stopped == "data_exhausted":
        text = "The data is used up: more of it, or another --threshold, would decide. To keep the figures:"
        return Step(text, with_options(command, SAVE))
    if scan.stopped == "requested":
        return Step("To decide, measure more batches:", with_options(command, {"--batches": more}))
    return Step("To decide, allow more batches:", with_options(command, {"--max-batches": more}))


def _batch_size_step(report: Report, command: str) -> Step:
    sizes = sorted({point.batch_size for layer in report.layers for point in layer.batch_sizes})
    larger = [size for size in sizes if size > report.scan.batch_size]
    enough = [size for size in larger if not under_limit(report.layers, size)]
    if enough:
        return Step(
            f"At batch size {enough[0]} no layer is under its limit on the eval path. To check both paths:",
            with_options(command, {"--batch-size": str(enough[0])}),
        )
    if larger:
        return Step(
            f"No batch size up to {larger[-1]} lifts every layer over its limit. To keep the figures:",
            with_options(command, SAVE),
        )
    to_try = _sizes_to_try(report.scan)
    if len(to_try) < 2:
        return Step("To keep the figures:", with_options(command, SAVE))
    options = {"--batch-sizes": ",".join(map(str, to_try))}
    needed = _BATCHES_OF_LARGEST * to_try[-1] // report.scan.batch_size
    if report.scan.batches < needed and report.scan.stopped != "data_exhausted":
        options["--batches"] = str(needed)
    return Step("To see what a larger batch would change:", with_options(command, options))


def under_limit(layers: tuple[Layer, ...], batch_size: int) -> list[Layer]:
    """The layers whose eval-path n_eq at a batch size is below their threshold."""
    return [
        layer
        for layer in layers
        for point in layer.batch_sizes
        if point.batch_size == batch_size
        and point.equivalent_batch_size is not None
        and point.equivalent_batch_size < layer.threshold
    ]


def _sizes_to_try(scan: Scan) -> list[int]:
    """Batch sizes from this one on, each twice the last; no larger than data that is known to be used up."""
    steps = max(3, (_LARGEST_SUGGESTED // scan.batch_size).bit_length() - 1)
    sizes = [scan.batch_size << step for step in range(steps + 1)]
    limit = scan.images if scan.stopped == "data_exhausted" else sizes[-1]
    return [size for size in sizes if size <= limit]
