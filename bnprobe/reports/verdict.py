"""The closing verdict: what the scan found, in words, and the command to run next."""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.records import Interval, Layer, Report, Severity
from bnprobe.reports import figures, glyphs, nextstep
from bnprobe.reports.causes import SIGNS
from bnprobe.reports.nextstep import Step
from bnprobe.reports.standing import with_sign, worse_path, worst_first


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
    worst = "" if report.diagnoses else _worst(flagged)
    sentences = (worst, _also_undecided(report), *_caveats(report))
    return Verdict(
        headline=f"{_share(len(flagged), report)} flagged: training and inference normalize differently.",
        sign=glyphs.FLAGGED,
        sentences=tuple(filter(None, sentences)),
        step=_step(report, command, nextstep.batch_size_step(report, command)),
    )


def _undecided(report: Report, undecided: list[Layer], command: str) -> Verdict:
    return Verdict(
        headline=f"No layer is flagged, but {_share(len(undecided), report)} undecided.",
        sign=glyphs.UNDECIDED,
        sentences=(*(_straddling(layer) for layer in undecided[:3]), *_caveats(report)),
        step=_step(report, command, nextstep.more_batches_step(report.scan, command), only_errors=True),
    )


def _clean(report: Report, command: str) -> Verdict:
    serious = _worst_severity(report)
    if serious is not None:
        return _found_all_the_same(report, serious, command)
    fine = with_sign(report.layers, glyphs.FINE)
    limits = {layer.threshold for layer in fine}
    limit = f"{figures.plain(limits.pop())} values" if len(limits) == 1 else "its limit"
    every = len(fine) == len(report.layers)
    which = "every layer" if every else f"{len(fine)} of {len(report.layers)} layers"
    verb = "behaves" if every or len(fine) == 1 else "behave"
    text = f"{which} {verb} as if the batch were at least {limit}, in training and at inference."
    return Verdict(
        headline=f"So far {text}" if report.scan.partial else text[0].upper() + text[1:],
        sign=glyphs.FINE,
        sentences=_caveats(report),
        step=_step(report, command, nextstep.keep_step(command)),
    )


def _found_all_the_same(report: Report, serious: Severity, command: str) -> Verdict:
    number = figures.count(sum(diagnosis.severity != "info" for diagnosis in report.diagnoses), "thing")
    verb = "is" if number == "1 thing" else "are"
    so_far = "So far no" if report.scan.partial else "No"
    return Verdict(
        headline=f"{so_far} layer is flagged for its mismatch, but {number} {verb} not right.",
        sign=SIGNS[serious],
        sentences=_caveats(report),
        step=_step(report, command, nextstep.keep_step(command)),
    )


def _step(report: Report, command: str, otherwise: Step, only_errors: bool = False) -> Step:
    """Finish what was cut short, then follow the diagnosis, unless it is no more than a hint."""
    serious = _worst_severity(report)
    followed = serious == "error" or (serious == "warning" and not only_errors)
    return nextstep.interrupted_step(report, command) or (
        nextstep.diagnosed_step(report, command) if followed else otherwise
    )


def _worst_severity(report: Report) -> Severity | None:
    """The worst severity of the diagnoses; None if there are none, or only hints."""
    found = {diagnosis.severity for diagnosis in report.diagnoses}
    return "error" if "error" in found else "warning" if "warning" in found else None


def _nothing(report: Report, command: str) -> Verdict:
    return Verdict(
        headline="No layer could be judged.",
        sign=glyphs.UNMEASURED,
        sentences=_caveats(report),
        step=_step(report, command, Step("The notes above say what stands in the way.")),
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
