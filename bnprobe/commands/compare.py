"""``bnprobe compare``: scans of one model side by side, layer by layer, and which differences are sure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from bnprobe._version import __version__
from bnprobe.commands.verify import differences, in_order, require_common, require_report
from bnprobe.config.load import shown
from bnprobe.errors import UsageError
from bnprobe.records import ComparedScan, Comparison, Interval, Layer, LayerPoint, LayerTrend, Report, Tool, Trend
from bnprobe.wording import from_python


@from_python
def compare(reports: Sequence[Report] | Mapping[str, Report]) -> Comparison:
    """Compare scans of one model, layer by layer: which differences are sure, and the course over time.

    Args:
        reports: Two or more, in the order of time; as a mapping with a name for each, else they are numbered.

    Raises:
        UsageError: There are fewer than two, something is no report, or two neighbours have no layer in common.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> reports = {f"batch size {size}": bnprobe.scan(model, loader, batch_size=size) for size in (8, 4)}
        >>> comparison = bnprobe.compare(reports)
        >>> [scan.name for scan in comparison.scans]
        ['batch size 8', 'batch size 4']
        >>> comparison.layers[0].trend
        'worse'
    """
    if not isinstance(reports, Mapping | list | tuple):
        raise UsageError(f"Expected a list of reports, or a dictionary of them by name, but got {shown(reports)}.")
    named = reports.items() if isinstance(reports, Mapping) else enumerate(reports, 1)
    pairs = [(str(name), report) for name, report in named]
    for name, report in pairs:
        require_report(f"report {name}", report)
    return compare_named(pairs)


def compare_named(reports: Sequence[tuple[str, Report]]) -> Comparison:
    """As ``compare``, of pairs of a name and a report, in the words of the command line.

    Raises:
        UsageError: There are fewer than two, or two neighbours have no layer in common.
    """
    if len(reports) < 2:
        raise UsageError("A comparison takes two reports or more.")
    for (_, one), (_, other) in pairwise(reports):
        require_common(one, other, "Give reports of scans of one model.")
    layers = [{layer.name: layer for layer in report.layers} for _, report in reports]
    names = list(layers[0])
    for later in layers[1:]:
        names = list(in_order(names, list(later)))
    first = reports[0][1]
    notes = [f"{name}: {note}" for name, report in reports[1:] for note in differences(first, report)]
    return Comparison(
        tool=Tool("bnprobe", __version__),
        scans=tuple(_scan(name, report) for name, report in reports),
        layers=tuple(_trend(name, [known.get(name) for known in layers]) for name in names),
        notes=tuple(notes),
    )


def _scan(name: str, report: Report) -> ComparedScan:
    points = {layer.name: point for layer in report.layers if (point := _point(layer)) is not None}
    worst = max(points, key=lambda layer: points[layer].mismatch, default=None)
    output = report.summary.output
    return ComparedScan(
        name=name,
        model=report.scan.model,
        checkpoint=report.scan.checkpoint,
        batch_size=report.scan.batch_size,
        layers=report.summary.layers,
        flagged=report.summary.flagged,
        undecided=report.summary.undecided,
        errors=sum(diagnosis.severity == "error" for diagnosis in report.diagnoses),
        worst=worst,
        mismatch=None if worst is None else points[worst].mismatch,
        equivalent_batch_size=None if worst is None else points[worst].equivalent_batch_size,
        output=output.relative_l2,
        loss=output.loss,
        metric=output.metric,
    )


def _point(layer: Layer | None) -> LayerPoint | None:
    """A layer on the path with the larger D; None where it was not measured."""
    paths = [path for path in (layer.train, layer.eval) if path is not None] if layer else []
    if layer is None or not paths:
        return None
    worse = max(paths, key=lambda path: path.mismatch)
    return LayerPoint(worse.mismatch, worse.interval, worse.equivalent_batch_size, layer.flagged, layer.undecided)


def _trend(name: str, layers: Sequence[Layer | None]) -> LayerTrend:
    points = tuple(map(_point, layers))
    ratio, interval, trend = _change(points[0], points[-1])
    return LayerTrend(name, points, ratio, interval, trend)


def _change(first: LayerPoint | None, last: LayerPoint | None) -> tuple[float | None, Interval | None, Trend]:
    """The last D over the first, its interval, and what that says.

    Intervals of D are those of its logarithm (docs/explanation/intervals.md), so that of a ratio of two scans reaches
    as far to a side as the root of the sum of the squares of what both reach (Zou and Donner 2008): exact for scans of
    independent batches, and too wide, on the safe side, for scans of the same batches. Where D has no upper end, the
    ratio has an end on one side only.
    """
    if first is None or last is None:
        return None, None, "unknown"
    if first.mismatch == last.mismatch:
        return (1.0 if first.mismatch else None), None, "same"
    if min(first.mismatch, last.mismatch) <= 0:
        return None, None, "unsure"
    ratio, reach = last.mismatch / first.mismatch, [_log_reach(point) for point in (first, last)]
    low = ratio * math.exp(-math.hypot(reach[1][0], reach[0][1]))
    high = ratio * math.exp(math.hypot(reach[1][1], reach[0][0]))
    interval = None if low == 0 and math.isinf(high) else (low, None if math.isinf(high) else high)
    return ratio, interval, "better" if high < 1 else "worse" if low > 1 else "unsure"


def _log_reach(point: LayerPoint) -> tuple[float, float]:
    """How far the 95% interval of ln D reaches down and up; infinite where it has no end."""
    low, high = point.interval
    down = math.log(point.mismatch / low) if low > 0 else math.inf
    return down, math.inf if high is None else math.log(high / point.mismatch)
