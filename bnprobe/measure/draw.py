"""How statistics vary with the choice of the data that they were taken of: without each part of it in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bnprobe.measure.batch import MicroBatch, pick
from bnprobe.measure.forward_pass import LayerStatistics
from bnprobe.measure.physical_batch import Batching
from bnprobe.stats.moments import pool_moments

PARTS = 4
"""Parts of the data of statistics. Without each in turn they are taken anew, in three passes over the data in all, or
where passes are dear put together from those of the parts, in one."""


@dataclass(frozen=True)
class Draw:
    """Which data statistics were taken of: how they vary with that.

    Attributes:
        without: Gives the statistics of all but one of some equal parts of the data, for each part.
        sampled: The part of a finite data set that they were taken of; 0: it is endless, or its size is not known.
    """

    without: Callable[[], Iterable[LayerStatistics]]
    sampled: float = 0.0


def draw_of(
    take: Callable[[Sequence[MicroBatch]], LayerStatistics],
    values: LayerStatistics,
    batches: Sequence[MicroBatch],
    batching: Batching,
    population: int | None,
    brief: bool,
) -> Draw:
    """How ``values``, the statistics of ``batches``, vary with the choice of these.

    Args:
        take: Gives the statistics of some micro-batches.
        batching: How they run.
        population: Samples of the finite set that they are drawn from; None: it is endless, or its size is not known.
        brief: In one pass over them, where that can be done.
    """
    parts = batches
    if len(batches) < PARTS and batching.emulation.trusted:  # few and large
        parts = [part for batch in batches for part in _divided(batch)]

    def without() -> Iterator[LayerStatistics]:
        if brief and len(parts) >= PARTS:
            each = [take(parts[place::PARTS]) for place in range(PARTS)]
            if all(part.keys() >= values.keys() for part in each):
                yield from _without_each(values, each)
                return
        for left_out in range(min(PARTS, len(parts))):
            yield take([batch for place, batch in enumerate(parts) if place % PARTS != left_out])

    samples = sum(batch.samples for batch in batches)
    return Draw(without, min(samples / population, 1.0) if population else 0.0)


def _without_each(values: LayerStatistics, parts: Sequence[LayerStatistics]) -> Iterator[LayerStatistics]:
    """About what ``values`` would be without each of equal parts of the data: moved as those of all parts pooled move.

    Taken anew they would vary much the same (docs/decisions/0040). Those of a part are of few samples in all layers,
    and their variances are unbiased: but they are so on both sides of what moves them.
    """
    whole = _pooled(parts)
    for place in range(len(parts)):
        moved, others = {}, _pooled([*parts[:place], *parts[place + 1 :]])
        for key in values:
            (mean, variance), (centre, spread), (other, other_spread) = values[key], whole[key], others[key]
            known = spread > 0
            scale = torch.where(known, variance / spread, 1.0)
            moved[key] = mean + (other - centre) * scale.sqrt(), torch.where(known, other_spread * scale, variance)
        yield moved


def _pooled(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """The statistics of equal parts of the data as those of one."""
    found = {}
    for key in parts[0]:
        means, variances = (torch.stack(values) for values in zip(*(part[key] for part in parts), strict=True))
        pooled = pool_moments(means, variances, len(parts))
        found[key] = pooled[0][0], pooled[1][0]
    return found


def _divided(batch: MicroBatch) -> list[MicroBatch]:
    """The samples of a micro-batch in ``PARTS`` parts; fewer where it has fewer samples."""
    rows = [list(range(start, batch.samples, PARTS)) for start in range(min(PARTS, batch.samples))]
    return [MicroBatch(pick(batch.data, part, batch.samples), len(part)) for part in rows]
