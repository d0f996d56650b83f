"""Two reports of one model, compared: did the repair hold?"""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.errors import UsageError
from bnprobe.numbers import listed
from bnprobe.records import Layer, LayerComparison, Report, Verification

OUTPUT_SLACK = 1.1
"""A distance of the outputs up to so many times the one before counts as no more: both are of a sample of batches."""


def verify(before: Report, after: Report) -> Verification:
    """Hold the report of a repaired model against that of the model before.

    It passes if no layer is newly flagged, none that was flagged is so still or was not measured again, the outputs of
    the two paths are no farther apart than before, and the batch size is no larger. A flagged layer that is gone counts
    as repaired, unless ``--include``/``--exclude`` left it out: it may have become a norm that does not depend on the
    batch.

    Args:
        before, after: Reports of scans of the same model.

    Raises:
        UsageError: They have no layer in common.
    """
    first, last = ({layer.name: layer for layer in report.layers} for report in (before, after))
    if not first.keys() & last.keys():
        raise UsageError(_nothing_to_compare(before, after))
    layers = tuple(_compared(name, first.get(name), last.get(name)) for name in _in_order(list(first), list(last)))
    outputs = before.summary.output.relative_l2, after.summary.output.relative_l2
    problems = (
        *_partial(after),
        *_larger(before, after),
        *_flagged(layers, last),
        *_left_out(layers, after),
        *_outputs(*outputs),
    )
    return Verification(
        passed=not problems,
        problems=problems,
        layers=layers,
        only_before=tuple(name for name in first if name not in last),
        only_after=tuple(name for name in last if name not in first),
        output_before=outputs[0],
        output_after=outputs[1],
        notes=tuple(_notes(before, after)),
    )


def _nothing_to_compare(before: Report, after: Report) -> str:
    known = [{*report.scan.unselected, *(layer.name for layer in report.layers)} for report in (before, after)]
    if known[0] & known[1]:
        return (
            "The reports have no layer in common: --include/--exclude chose different layers in the two scans."
            " Scan both times with the same."
        )
    return _strangers(before, after)


def _strangers(before: Report, after: Report) -> str:
    names = [report.layers[0].name if report.layers else "none" for report in (before, after)]
    return (
        "The reports are of different models: they have no layer in common. The first layers are"
        f" {names[0]} ({before.scan.model}) and {names[1]} ({after.scan.model}). Give two reports of one model, before"
        " and after its repair."
    )


def _in_order(before: list[str], after: list[str]) -> Iterator[str]:
    """All names in network order: those that are new stand where the second report has them."""
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


def _compared(name: str, before: Layer | None, after: Layer | None) -> LayerComparison:
    return LayerComparison(
        name=name,
        before=None if before is None else _worse(before),
        after=None if after is None else _worse(after),
        flagged_before=before is not None and before.flagged,
        flagged_after=after is not None and after.flagged,
    )


def _worse(layer: Layer) -> float | None:
    """The mismatch on the worse path; None if neither could be measured."""
    return max((path.mismatch for path in (layer.train, layer.eval) if path is not None), default=None)


def _partial(after: Report) -> Iterator[str]:
    if after.scan.partial:
        yield f"The second scan was ended early ({after.scan.stopped}): it proves nothing. Scan again."


def _larger(before: Report, after: Report) -> Iterator[str]:
    """A mismatch falls as the batch grows, so that a larger one hides what was flagged."""
    size, now = before.scan.batch_size, after.scan.batch_size
    if now > size:
        yield (
            f"The batch size of the second scan is larger, and at a larger one every layer looks better: {size} before,"
            f" {now} after. Scan again with --batch-size {size}."
        )


def _flagged(layers: tuple[LayerComparison, ...], after: dict[str, Layer]) -> Iterator[str]:
    still = [layer.name for layer in layers if layer.flagged_before and layer.flagged_after]
    newly = [layer.name for layer in layers if layer.flagged_after and not layer.flagged_before]
    lost = [
        layer.name
        for layer in layers
        if layer.flagged_before and not layer.flagged_after and layer.after is None and layer.name in after
    ]
    if still:
        yield f"Still flagged: {listed(still)}."
    if newly:
        yield f"Newly flagged: {listed(newly)}."
    if lost:
        yield f"Flagged before, and not to be measured again: {listed(lost)}."


def _left_out(layers: tuple[LayerComparison, ...], after: Report) -> Iterator[str]:
    unselected = set(after.scan.unselected)
    missed = [layer.name for layer in layers if layer.flagged_before and layer.name in unselected]
    if missed:
        yield f"Flagged before, and left out of the second scan by --include/--exclude: {listed(missed)}."


def _outputs(before: float | None, after: float | None) -> Iterator[str]:
    if before is not None and after is not None and after > OUTPUT_SLACK * before:
        yield (
            f"The outputs of training and inference are farther apart than before: {before:.3g} then, {after:.3g} now"
            " (relative L2)."
        )
    if before is not None and after is None:
        yield "The outputs of training and inference could not be compared after the repair, and before they could."


def _notes(before: Report, after: Report) -> Iterator[str]:
    one, other = before.scan, after.scan
    compared = (
        ("model", one.model, other.model),
        ("batch size", one.batch_size, min(one.batch_size, other.batch_size)),  # a larger one is a problem
        ("data", one.data, other.data),
        ("seed", one.seed, other.seed),
        ("autocast", one.autocast, other.autocast),
        ("dtype", one.dtype, other.dtype),
        ("version of bnprobe", before.tool.version, after.tool.version),
        ("version of torch", before.environment.torch, after.environment.torch),
    )
    for what, first, last in compared:
        if first != last:
            yield f"The {what} differs: {_value(first)} before, {_value(last)} after."
    if one.partial:
        yield f"The first scan was ended early ({one.stopped})."
    if other.synthetic:
        yield "The second scan is of made-up images: what it says of real data is not known."
    yield from _thresholds(before, after)
    yield from _unproved(before, after)
    undecided = [layer.name for layer in after.layers if layer.undecided]
    if undecided:
        yield f"Undecided after the repair, more batches would tell: {listed(undecided)}."


def _thresholds(before: Report, after: Report) -> Iterator[str]:
    limits = {layer.name: layer.threshold for layer in before.layers}
    moved = [layer for layer in after.layers if limits.get(layer.name, layer.threshold) != layer.threshold]
    if moved:
        first = moved[0]
        yield (
            f"The threshold differs in {len(moved)} of {len(after.layers)} layers, first in {first.name}:"
            f" {limits[first.name]:g} before, {first.threshold:g} after."
        )


def _unproved(before: Report, after: Report) -> Iterator[str]:
    unselected = set(after.scan.unselected)
    names = [layer.name for layer in before.layers if layer.name in unselected and not layer.flagged]
    if names:
        yield f"Not flagged before, and left out of the second scan by --include/--exclude: {listed(names)}."


def _value(value: object) -> str:
    return "none" if value is None else str(value)
