"""The mismatch of each layer over the batch size, and the smallest size at which it passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bnprobe.records import BatchSizePoint, Layer, PathMeasurement, Report, Smallest, SweepLayer, SweepPoint
from bnprobe.rules.shares import flagging_limit
from bnprobe.stats.theory import equivalent_batch_size, mismatch_iid, standing

_STANDINGS: dict[str, Literal["passes", "undecided", "fails"]] = {
    "flagged": "fails",
    "undecided": "undecided",
    "clean": "passes",
}


def sweep_layer(layer: Layer, batch_size: int, trains: Sequence[Report]) -> SweepLayer:
    """Mismatch of one layer over the batch size.

    Args:
        layer: The layer as scanned at ``batch_size``, with the further sizes of the eval path.
        batch_size: The scanned batch size.
        trains: That scan, and one scan for each further size of the train path.
    """
    found = list(layer.batch_sizes)
    if layer.eval is not None:
        found.append(_measured(layer, layer.eval, batch_size, trains[0].scan.batches))
    others = [(report.scan, _named(report, layer.name)) for report in trains]
    trained = [
        _measured(other, other.train, scan.batch_size, scan.batches) for scan, other in others if other and other.train
    ]
    points = _points(found, layer.eval, batch_size)
    return SweepLayer(
        name=layer.name,
        kind=layer.kind,
        channels=layer.channels,
        threshold=layer.threshold,
        flagged=layer.flagged,
        undecided=layer.undecided,
        note=layer.note,
        eval=points,
        train=_points(trained, layer.train, batch_size),
        smallest=_smallest(points),
    )


def _measured(layer: Layer, path: PathMeasurement, batch_size: int, batches: int) -> BatchSizePoint:
    """A path of a layer as it was scanned and judged: one that runs in training only by the noise of its batches."""
    limit, noise = flagging_limit(layer), None if layer.share_intervals is None else layer.share_intervals.small_batch
    if layer.only_in == "train" and layer.shares is not None and noise is not None:
        mismatch = layer.shares.small_batch
        return BatchSizePoint(batch_size, batches, mismatch, noise, equivalent_batch_size(mismatch), limit)
    return BatchSizePoint(batch_size, batches, path.mismatch, path.interval, path.equivalent_batch_size, limit)


def _named(report: Report, name: str) -> Layer | None:
    return next((layer for layer in report.layers if layer.name == name), None)


def _points(
    measured: Sequence[BatchSizePoint], scanned: PathMeasurement | None, batch_size: int
) -> tuple[SweepPoint, ...]:
    """Points of the curve by increasing size, with the value for i.i.d. samples."""
    n_eq = scanned.equivalent_batch_size if scanned else None
    return tuple(
        SweepPoint(
            batch_size=point.batch_size,
            batches=point.batches,
            mismatch=point.mismatch,
            interval=point.interval,
            equivalent_batch_size=point.equivalent_batch_size,
            theory=0.0 if n_eq is None else mismatch_iid(n_eq * point.batch_size / batch_size),
            limit=point.limit,
            standing=_STANDINGS[standing([point.interval], point.limit)],
        )
        for point in sorted(measured, key=lambda point: point.batch_size)
    )


def smallest_of_all(scanned: Sequence[Layer], layers: Sequence[SweepLayer]) -> Smallest:
    """The smallest size at which every layer passes that can differ between training and inference.

    A layer that overflowed passes at no size. Frozen layers and layers without running statistics are ignored.
    """
    judged = [
        layer.smallest
        for layer, found in zip(layers, scanned, strict=True)
        if layer.flagged or (found.train is not None and found.eval is not None)
    ]
    return Smallest(_largest([one.surely for one in judged]), _largest([one.likely for one in judged]))


def _smallest(points: Sequence[SweepPoint]) -> Smallest:
    likely: list[int] = []
    for point in reversed(points):
        if point.mismatch > point.limit:
            break
        likely.append(point.batch_size)
    sure = [point.batch_size for point in points if point.batch_size in likely and point.standing == "passes"]
    return Smallest(surely=min(sure, default=None), likely=min(likely, default=None))


def _largest(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return max(known) if known and len(known) == len(sizes) else None
