"""``bnprobe verify``: compare the reports of two scans of one model."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike

from bnprobe._version import __version__
from bnprobe.config.load import shown
from bnprobe.errors import UsageError
from bnprobe.numbers import count, listed
from bnprobe.records import Layer, LayerComparison, Report, Tool, Verification
from bnprobe.wording import from_python, option

OUTPUT_SLACK = 1.1
"""Tolerated growth of the distance of the outputs, since both distances are measured on a sample of batches."""


@from_python
def verify(before: Report, after: Report) -> Verification:
    """Compare the report of a repaired model with that of the original one.

    The repair passes if no layer is newly flagged, no flagged layer is still flagged or was not measured again, the
    outputs in training and at inference are not farther apart than before, and the batch size is not larger. A flagged
    layer counts as repaired if it gives the same output in training and at inference by construction, and if no batch
    norm is left there; not so if ``--include``/``--exclude`` left it out. Two reports with the same figures pass, and
    the result says that nothing has changed.

    Args:
        before, after: Reports of scans of the same model.

    Raises:
        UsageError: The reports have no layer in common.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> before = bnprobe.scan(model, loader, batch_size=2)
        >>> after = bnprobe.scan(bnprobe.convert(model, before), loader, batch_size=2)
        >>> bnprobe.verify(before, after).ok
        True
    """
    require_report("before", before)
    require_report("after", after)
    return compare(before, after)


def require_report(name: str, report: object) -> None:
    """Refuse an argument that is no report.

    Raises:
        UsageError: Says how a file is read, where it is the name of one.
    """
    if not isinstance(report, Report):
        advice = f": Report.load({report!r}) reads it" if isinstance(report, str | PathLike) else ""
        raise UsageError(f"Expected the report of a scan for {name}, but got {shown(report)}{advice}.")


def compare(before: Report, after: Report) -> Verification:
    """As ``verify``, in the words of the command line.

    Raises:
        UsageError: The reports have no layer in common.
    """
    first, last = ({layer.name: layer for layer in report.layers} for report in (before, after))
    require_common(before, after)
    unjudged = {layer.name for layer in after.skipped if not layer.agrees} | last.keys()
    layers = tuple(
        _compared(name, first.get(name), last.get(name), name in unjudged) for name in in_order(list(first), list(last))
    )
    outputs = before.summary.output.relative_l2, after.summary.output.relative_l2
    problems = (
        *_partial(after),
        *_larger(before, after),
        *_flagged(layers),
        *_left_out(layers, after),
        *(() if _newly_tracked(first, last) else _outputs(*outputs)),
    )
    same = (before.layers, before.summary, before.skipped) == (after.layers, after.summary, after.skipped)
    unchanged = same and before.scan.batch_size == after.scan.batch_size and not after.scan.partial
    problems = () if unchanged else problems
    return Verification(
        tool=Tool("bnprobe", __version__),
        model=after.scan.model,
        passed=not problems,
        problems=problems,
        layers=layers,
        only_before=tuple(name for name in first if name not in last),
        only_after=tuple(name for name in last if name not in first),
        output_before=outputs[0],
        output_after=outputs[1],
        notes=tuple(_notes(before, after)),
        unchanged=unchanged,
    )


def _newly_tracked(before: dict[str, Layer], after: dict[str, Layer]) -> bool:
    """Whether layers without running statistics were given some: before, inference used batch statistics too."""
    return any(
        after[name].running_statistics and not before[name].running_statistics for name in before if name in after
    )


def require_common(
    before: Report, after: Report, give: str = "Give two reports of one model, before and after its repair."
) -> None:
    """Refuse reports that have no layer in common.

    Args:
        before, after: The reports.
        give: What to give instead, a sentence.

    Raises:
        UsageError: They have none; says whether they are of different models.
    """
    if not {layer.name for layer in before.layers} & {layer.name for layer in after.layers}:
        raise UsageError(_nothing_to_compare(before, after, give))


def _nothing_to_compare(before: Report, after: Report, give: str) -> str:
    known = [{*report.scan.unselected, *(layer.name for layer in report.layers)} for report in (before, after)]
    if known[0] & known[1]:
        return (
            "The reports have no layer in common: --include/--exclude selected different layers in the two scans."
            " Use the same options for both scans."
        )
    names = [report.layers[0].name if report.layers else "none" for report in (before, after)]
    return (
        "The reports are of different models: they have no layer in common. The first layers are"
        f" {names[0]} ({before.scan.model}) and {names[1]} ({after.scan.model}). {give}"
    )


def in_order(before: list[str], after: list[str]) -> Iterator[str]:
    """All names in network order; new names keep their place from the second report."""
    known = set(before)
    waiting = iter(after)
    shared = set(before) & set(after)
    for name in before:
        if name in shared:
            for other in waiting:
                if other == name:
                    break
                if other not in known:
                    yield other
        yield name
    yield from (other for other in waiting if other not in known)


def _compared(name: str, before: Layer | None, after: Layer | None, is_batch_norm: bool) -> LayerComparison:
    """A layer before and after; whether it ``is_batch_norm`` still that may have a mismatch, measured or not."""
    flagged_before, flagged_after = (layer is not None and layer.flagged for layer in (before, after))
    mismatch = None if after is None else _worse(after)
    return LayerComparison(
        name=name,
        before=None if before is None else _worse(before),
        after=mismatch,
        flagged_before=flagged_before,
        flagged_after=flagged_after,
        undecided_after=after is not None and after.undecided,
        lost=flagged_before and not flagged_after and mismatch is None and is_batch_norm,
    )


def _worse(layer: Layer) -> float | None:
    """The larger mismatch of both paths; None if neither could be measured."""
    return max((path.mismatch for path in (layer.train, layer.eval) if path is not None), default=None)


def _partial(after: Report) -> Iterator[str]:
    if after.scan.partial:
        yield f"The second scan ended early ({after.scan.stopped}), so the repair cannot be verified. Scan again."


def _larger(before: Report, after: Report) -> Iterator[str]:
    """Report a larger batch size: the mismatch falls as the batch grows, which would hide flagged layers."""
    size, now = before.scan.batch_size, after.scan.batch_size
    if now > size:
        yield (
            f"The second scan used a larger batch size ({now}, before {size}), which makes every layer look better."
            f" Scan again with {option('--batch-size', size)}."
        )


def _flagged(layers: tuple[LayerComparison, ...]) -> Iterator[str]:
    still = [layer.name for layer in layers if layer.flagged_before and layer.flagged_after]
    newly = [layer.name for layer in layers if layer.flagged_after and not layer.flagged_before]
    lost = [layer.name for layer in layers if layer.lost]
    if still:
        yield f"Still flagged: {listed(still)}."
    if newly:
        yield f"Newly flagged: {listed(newly)}."
    if lost:
        flagged = count(sum(layer.flagged_before for layer in layers), "flagged layer")
        were, their = ("was", "its") if len(lost) == 1 else ("were", "their")
        yield f"{len(lost)} of {flagged} {were} not measured again, so {their} mismatch is not known: {listed(lost)}."


def _left_out(layers: tuple[LayerComparison, ...], after: Report) -> Iterator[str]:
    unselected = set(after.scan.unselected)
    missed = [layer.name for layer in layers if layer.flagged_before and layer.name in unselected]
    if missed:
        yield f"Flagged before, and left out of the second scan by --include/--exclude: {listed(missed)}."


def _outputs(before: float | None, after: float | None) -> Iterator[str]:
    if before is not None and after is not None and after > OUTPUT_SLACK * before:
        yield (
            f"The outputs of training and inference are farther apart than before: {after:.3g}, before {before:.3g}"
            " (relative L2)."
        )
    if before is not None and after is None:
        yield "The outputs of training and inference could be compared before the repair, but not after it."


def differences(before: Report, after: Report, said: str = "") -> Iterator[str]:
    """What differs between two scans beside the weights, a sentence each, without what is ``said`` elsewhere."""
    one, other = before.scan, after.scan
    compared = (
        ("model", one.model, other.model),
        ("batch size", one.batch_size, other.batch_size),
        ("data", one.data, other.data),
        ("seed", one.seed, other.seed),
        ("autocast", one.autocast, other.autocast),
        ("dtype", one.dtype, other.dtype),
        ("version of bnprobe", before.tool.version, after.tool.version),
        ("version of torch", before.environment.torch, after.environment.torch),
    )
    for what, first, last in compared:
        if first != last and what != said:
            yield f"The {what} differs: {_value(first)} before, {_value(last)} after."


def _notes(before: Report, after: Report) -> Iterator[str]:
    one, other = before.scan, after.scan
    yield from differences(before, after, said="batch size" if other.batch_size > one.batch_size else "")
    if one.partial:
        yield f"The first scan ended early ({one.stopped})."
    if other.synthetic:
        yield "The second scan used synthetic inputs: its results may not hold for real data."
    yield from _thresholds(before, after)
    unselected = set(other.unselected)
    unproved = [layer.name for layer in before.layers if layer.name in unselected and not layer.flagged]
    if unproved:
        yield f"Not flagged before, and left out of the second scan by --include/--exclude: {listed(unproved)}."
    if _newly_tracked(*({layer.name: layer for layer in report.layers} for report in (before, after))):
        yield "Layers without running statistics have some now: before, training and inference used batch statistics."
    undecided = [layer.name for layer in after.layers if layer.undecided]
    if undecided:
        yield f"Undecided after the repair (more batches would decide): {listed(undecided)}."


def _thresholds(before: Report, after: Report) -> Iterator[str]:
    limits = {layer.name: layer.threshold for layer in before.layers}
    moved = [layer for layer in after.layers if limits.get(layer.name, layer.threshold) != layer.threshold]
    if moved:
        first = moved[0]
        yield (
            f"The threshold differs in {len(moved)} of {len(after.layers)} layers, first in {first.name}:"
            f" {limits[first.name]:g} before, {first.threshold:g} after."
        )


def _value(value: object) -> str:
    return "none" if value is None else str(value)
