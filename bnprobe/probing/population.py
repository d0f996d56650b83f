"""Statistics of each layer's input over many images, as if all were one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnprobe.probing.batches import CannotEmulateError, count_images, join, map_leaves, to_device
from bnprobe.probing.chunks import Chunks
from bnprobe.probing.emulation import Emulation
from bnprobe.probing.intercept import Pass, Recorded, Slot
from bnprobe.probing.memory import Footprint
from bnprobe.probing.runner import Runner
from bnprobe.stats.moments import pool_moments


class Population:
    """Mean and variance per layer and channel, merged from passes over different images (Chan et al. 1983), float64.

    The calls of a layer count as one population, as they do for its running statistics.
    """

    def __init__(self) -> None:
        self._count: dict[int, float] = {}
        self._batches: dict[int, float] = {}
        self._mean: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}

    def add(self, records: Mapping[Slot, Recorded], batches: float = 1.0) -> None:
        """Add what a pass recorded, which stands for so many micro-batches."""
        for (index, _), record in records.items():
            self._batches[index] = self._batches.get(index, 0.0) + batches
            units = record.mean.shape[0]
            mean, variance = (pooled[0] for pooled in pool_moments(record.mean, record.variance, units))
            self._merge(index, float(record.values * units), mean, variance)

    def statistics(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By index of the layer: mean and unbiased variance, shape (channels,), as the running buffers hold them."""
        return {
            index: (self._mean[index], self._squares[index] / max(count - 1, 1)) for index, count in self._count.items()
        }

    def values(self) -> dict[int, int]:
        """By index of the layer: values per channel."""
        return {index: round(count) for index, count in self._count.items()}

    def updates(self) -> dict[int, int]:
        """By index of the layer: micro-batches that it was called on, each call counted; a part of one counts fully."""
        return {index: math.ceil(batches - 1e-6) for index, batches in self._batches.items()}

    def _merge(self, index: int, count: float, mean: Tensor, variance: Tensor) -> None:
        if index not in self._count:
            self._count[index], self._mean[index], self._squares[index] = 0.0, torch.zeros_like(mean), 0 * variance
        before = self._count[index]
        total = before + count
        difference = mean - self._mean[index]
        self._squares[index] += count * variance + difference.square() * (before * count / total)
        self._mean[index] += difference * (count / total)
        self._count[index] = total


def steady_population(
    runner: Runner,
    micro_batches: Sequence[Any],
    batch_size: int,
    at_once: int,
    emulation: Emulation,
    population: Population | None = None,
) -> tuple[Population, Footprint]:
    """Population statistics on the train path without dropout and the like, and what an image takes in memory.

    Every physical batch normalizes with its own statistics, all its images together, and holds images drawn at random,
    so that a sorted loader does no harm. What is merged is the mean of all values and their variance about that mean,
    as PreciseBN does (Wu & Johnson 2021, arXiv 2105.07576, section 3.2), not the mean of the batches' variances. Where
    images of different micro-batches cannot be mixed, the micro-batches run as they are.

    Args:
        runner: Installed.
        micro_batches: Of ``batch_size`` images, the last one perhaps of fewer, on the host.
        at_once: Micro-batches that fill a physical batch.
        emulation: Whether images of different micro-batches may run together.
        population: What other images gave, to be merged with; None: nothing.

    Returns:
        Of the selected layers that normalize with batch statistics in training and keep running ones.

    Raises:
        DeviceError, UserCodeError, DataError: As in any pass.
    """
    population, image = population or Population(), Footprint(0, 0)

    def run(batch: Any) -> None:
        nonlocal image
        images = count_images(batch) or batch_size
        pass_ = Pass(images, images, plain=True)
        runner.forward("steady", to_device(batch, runner.device), pass_)
        population.add(own_records(runner, pass_), images / batch_size)
        sizes = [record.bytes // images for record in pass_.records.values()]
        image = Footprint(max(image.total, sum(sizes)), max([image.largest, *sizes]))

    joined = _joined(micro_batches) if emulation.trusted else None
    if joined is None:
        Chunks(runner.device, batch_size, 1).run(micro_batches, lambda chunk: run(chunk[0]))
    else:
        batch, images = joined
        units, parts = _evenly(images, batch_size * at_once)
        Chunks(runner.device, 1, len(units) // parts).run(
            units, lambda chunk: run(pick(batch, [row for unit in chunk for row in unit], images))
        )
    return population, image


def _evenly(images: int, most: int) -> tuple[list[list[int]], int]:
    """Rows of images in random order, in units of one image or two, and how many parts the units divide into.

    The parts are physical batches of ``most`` images at most, whose sizes differ by one image at most: none is left
    with an image or two, which would normalize with each other alone.
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split(math.ceil(images / most))
    return [unit.tolist() for part in parts for unit in part.tensor_split(images // len(parts))], len(parts)


def pick(batch: Any, rows: list[int], images: int) -> Any:
    """Some images of a batch of so many: of tensors and of lists that count the images; all else is kept."""
    if isinstance(batch, Tensor):
        return batch[rows] if batch.dim() > 0 and batch.shape[0] == images else batch
    if type(batch) is dict:
        return {key: pick(value, rows, images) for key, value in batch.items()}
    if type(batch) is list and len(batch) == images and not any(isinstance(i, Tensor | Mapping | list) for i in batch):
        return [batch[row] for row in rows]
    if type(batch) in (list, tuple):
        return type(batch)(pick(item, rows, images) for item in batch)
    if isinstance(batch, Mapping | list | tuple):
        return map_leaves(batch, lambda leaf: pick(leaf, rows, images))
    return batch


def _joined(micro_batches: Sequence[Any]) -> tuple[Any, int] | None:
    """All images in one batch, and their number; None if they cannot be."""
    try:
        batch = join(list(micro_batches))
    except CannotEmulateError:
        return None
    images = count_images(batch)
    return None if images is None else (batch, images)


def own_records(runner: Runner, pass_: Pass) -> dict[Slot, Recorded]:
    """What was recorded of layers that update running statistics in training."""
    layers = runner.layers.layers
    return {
        slot: record
        for slot, record in pass_.records.items()
        if record.by_batch and layers[slot[0]].selected and layers[slot[0]].info.running_mean is not None
    }
