"""Population statistics of each layer, over many samples as if they were one batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bnprobe.errors import EndOfPass, RepairError, UserCodeError
from bnprobe.measure.batch import CannotEmulateError, MicroBatch, bytes_of, join, pick, to_device
from bnprobe.measure.extremes import Extremes, checked_further
from bnprobe.measure.forward_pass import Pass, Recorded, Slot
from bnprobe.measure.memory import (
    Chunks,
    Footprint,
    Refusal,
    Result,
    fits_in_memory,
    is_out_of_memory,
    plan_samples,
    plan_small,
    samples_in_memory,
)
from bnprobe.measure.physical_batch import (
    Batching,
    Check,
    Emulation,
    check_samples,
    checked,
    footprint_of,
    not_emulated,
    self_check,
)
from bnprobe.measure.reader import KEPT_BYTES
from bnprobe.measure.restore import random_state
from bnprobe.measure.session import Progress, Session
from bnprobe.stats.moments import pool_moments
from bnprobe.wording import option


class Population:
    """Mean and variance per layer and channel, merged from passes over different samples (Chan et al. 1983), float64.

    The calls of a layer count as one population, as they do for its running statistics.

    Attributes:
        mixed: Whether samples were drawn at random for large physical batches, whose statistics are nearly those of
            the population; False if batches had to run as they are.
    """

    def __init__(self) -> None:
        self.mixed = True
        self._count: dict[int, float] = {}
        self._within: dict[int, Tensor] = {}
        self._batches: dict[int, float] = {}
        self._shared: set[int] = set()
        self._mean: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}

    def add(self, records: Mapping[Slot, Recorded], batches: float = 1.0) -> None:
        """Add the records of a pass over ``batches`` micro-batches."""
        for (index, call), record in records.items():
            self._shared |= {index} if call else set()
            self._batches[index] = self._batches.get(index, 0.0) + batches
            units = record.mean.shape[0]
            count = float(record.values * units)
            mean, variance = (pooled[0] for pooled in pool_moments(record.mean, record.variance, units))
            self._within[index] = self._within.get(index, torch.zeros_like(mean)) + count * variance
            self._merge(index, count, mean, variance)

    def statistics(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By index of the layer: mean and unbiased variance, shape (channels,), as the running buffers hold them."""
        return {
            index: (self._mean[index], self._squares[index] / max(count - 1, 1)) for index, count in self._count.items()
        }

    def averaged(self) -> dict[int, tuple[Tensor, Tensor]]:
        """The same with the biased variance of a pass in place of the pooled one: the mean over passes, by values."""
        return {index: (self._mean[index], self._within[index] / count) for index, count in self._count.items()}

    def values(self) -> dict[int, int]:
        """By index of the layer: values per channel."""
        return {index: round(count) for index, count in self._count.items()}

    def fewest_values(self) -> float:
        """Values per channel of a layer in one micro-batch, of the layer that has the fewest."""
        return min(count / self._batches[index] for index, count in self._count.items())

    def most_values(self) -> float:
        """The same of the layer that has the most."""
        return max(count / self._batches[index] for index, count in self._count.items())

    def shared(self) -> frozenset[int]:
        """Indices of the layers that a forward pass calls more than once."""
        return frozenset(self._shared)

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
    session: Session,
    micro_batches: Sequence[MicroBatch],
    batching: Batching,
    population: Population | None = None,
    frozen: frozenset[int] = frozenset(),
) -> tuple[Population, Footprint]:
    """Population statistics on the train path without random layers, and the memory that a sample takes.

    Every batch normalizes with its own statistics, all its samples together. It holds as many samples as ``batching``
    runs at once, drawn at random, so that a sorted loader does no harm; several batches of a small network run in one
    pass. What is merged is the mean of all values and their variance about that mean, as PreciseBN does (Wu & Johnson
    2021, arXiv 2105.07576, section 3.2), not the mean of the batches' variances. Where samples of different
    micro-batches cannot be mixed, or the model raises on batches of other sizes, the micro-batches run as they are.

    Args:
        session: Installed.
        micro_batches: On the host; the last one may be smaller.
        batching: How many fill a physical batch, and whether samples of different micro-batches may run together.
        population: What other samples gave, to be merged with; None: nothing.
        frozen: Indices of layers that normalize with batch statistics here, although training leaves them in eval mode.

    Returns:
        Of the selected layers that normalize with batch statistics and keep running ones.

    Raises:
        DeviceError, UserCodeError, DataError: As in any pass.
    """
    population, footprint = population or Population(), Footprint(0, 0)
    draws: bool | None = None

    def run(batch: MicroBatch, part: int | None = None) -> tuple[dict[Slot, Recorded], float]:
        nonlocal footprint, draws
        before = random_state() if draws is None else None
        own = part or batch.samples
        layouts = batching.emulation.layouts_of("steady") if own < batch.samples else {}
        pass_ = Pass(batch.samples, own, layouts=layouts, by_batch=frozen, plain=True)
        session.forward("steady", to_device(batch.data, session.device), pass_)
        if part is not None:
            batching.emulation.require_same_sizes("steady", pass_)
        draws = random_state() != before if draws is None else draws
        found = footprint_of(pass_)
        footprint = Footprint(max(footprint.total, found.total), max(footprint.largest, found.largest))
        return own_records(session, pass_), batch.samples / batching.batch_size

    def room() -> int:
        return 0 if draws else plan_small(footprint, session.device)  # what is drawn depends on what runs together

    found = None
    if batching.emulation.trusted:
        with suppress(CannotEmulateError, UserCodeError):
            found = _of_mixed(session, micro_batches, batching, run, room)
    if found is None:
        population.mixed = False
        alone = Chunks(session.device, batching.batch_size, 1)
        found = alone.run(micro_batches, lambda chunk: run(chunk[0]))
    for records, batches in found:
        population.add(records, batches)
    return population, footprint


def _of_mixed(
    session: Session,
    micro_batches: Sequence[MicroBatch],
    batching: Batching,
    run: Callable[[MicroBatch, int], Result],
    room: Callable[[], int],
) -> list[Result]:
    """What ``run`` gives for batches of samples drawn at random, each with its own statistics.

    Args:
        run: Given samples, and how many of them make a batch: the first batch alone, then as many as there is room for.
        room: Samples that may run together, known after the first batch.

    Raises:
        CannotEmulateError, UserCodeError: Samples of different micro-batches cannot run together.
    """
    sizes = [batch.samples for batch in micro_batches]
    whole = join([batch.data for batch in micro_batches], sizes)

    def refuse(error: Refusal) -> None:
        raise error  # a sample by itself is no batch

    def results_of(parts: list[list[int]], at_once: int) -> list[Result]:
        size = len(parts[0])

        def run_rows(rows: list[int]) -> Result:
            return run(MicroBatch(pick(whole, rows, sum(sizes)), len(rows)), min(size, len(rows)))

        return Chunks(session.device, 1, at_once * size).run([row for part in parts for row in part], run_rows, refuse)

    first, *others = _evenly(sum(sizes), batching.batch_size * batching.at_once)
    results = results_of([first], 1)
    for size, alike in groupby(others, key=len):
        together = max(1, room() // size)
        # A power of two, so that half of it, where memory is short, is whole batches still.
        results += results_of(list(alike), 2 ** (together.bit_length() - 1))
    return results


def _evenly(samples: int, most: int) -> list[list[int]]:
    """Rows of samples in random order, divided into parts.

    The parts are physical batches of ``most`` samples at most, whose sizes differ by one sample at most: none is left
    with a sample or two, which would normalize with each other alone.
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    return [part.tolist() for part in order.tensor_split(math.ceil(samples / most))]


def own_records(session: Session, pass_: Pass) -> dict[Slot, Recorded]:
    """What was recorded of layers that normalized with batch statistics and keep running ones."""
    layers = session.layers.layers
    return {
        slot: record
        for slot, record in pass_.records.items()
        if record.by_batch and layers[slot[0]].selected and layers[slot[0]].info.running_mean is not None
    }


LARGE = 256
"""Samples of a physical batch on the train path if memory allows; its statistics are near those of the population."""

ROUNDS = 50
"""Rounds over the layers after which statistics that still change count as not converging."""

LARGEST = 2**31
"""Bytes of the largest input of a layer up to which all the data may run as one physical batch: kernels count elements
in 32 bits."""

_CLOSE = 16
"""Units in the last place of a buffer within which statistics have converged."""


@dataclass(frozen=True)
class PopulationStatistics:
    """Statistics by index of the layer.

    Attributes:
        statistics: Mean and unbiased variance, float64 of shape (channels,), as the running buffers hold them.
        updates: Batches of the data that they stand for, each call of the layer counted.
        values: Per channel; the variance of fewer than two is 0.
        mixed: As in ``Population``. If so, the train path gives what the eval path gives, but for noise.
        passes: Over the data; most of those that serve one layer end as soon as it was called.
    """

    statistics: dict[int, tuple[Tensor, Tensor]]
    updates: dict[int, int]
    values: dict[int, int]
    mixed: bool
    passes: int = 1


def population_by_batch(
    session: Session, batches: Iterable[MicroBatch], progress: Progress, frozen: frozenset[int] = frozenset()
) -> PopulationStatistics:
    """Statistics on the train path without random layers: every physical batch normalizes with its own statistics.

    Physical batches hold up to ``LARGE`` samples drawn at random from a part of the data, where samples of different
    batches may run together; see ``steady_population``. One pass over the data.

    Args:
        session: Installed.
        batches: On the host, of any sizes.
        progress: Called with the batches done and the samples' number of batches, as far as known.
        frozen: As in ``steady_population``.

    Raises:
        DeviceError, UserCodeError, DataError: As in any pass.
    """
    population = Population()
    stream = iter(batches)
    opening = list(itertools.islice(stream, 2))
    size = opening[0].samples if opening else 1
    emulation, footprint = _checked(session, opening, self_check)
    samples = next((count for count in _halved(LARGE) if fits_in_memory(footprint, count, session.device)), 1)
    batching = Batching(size, emulation, max(1, samples // size))
    extremes = Extremes()
    extremes.widened_by(session, opening)  # by which it was checked
    done = 0
    for part in _parts(itertools.chain(opening, stream)):
        batching = replace(batching, emulation=checked_further(session, extremes, batching.emulation, part))
        steady_population(session, part, batching, population, frozen)
        done += len(part)
        progress(done, done)
    return PopulationStatistics(population.statistics(), population.updates(), population.values(), population.mixed)


def population_by_micro_batch(
    session: Session,
    batches: Iterable[MicroBatch],
    progress: Progress,
    frozen: frozenset[int] = frozenset(),
    *,
    averaged: bool,
) -> PopulationStatistics:
    """Statistics on the train path without random layers, in the batches of the data as they are.

    Each normalizes with its own statistics, as in training. One pass over the data.

    Args:
        session: Installed.
        batches, progress, frozen: As in ``population_by_batch``.
        averaged: Whether variances are averaged as the batches were normalized, biased, and so without the variance
            between batches (Wu & Johnson 2021, section 3.2, compare both); else they are pooled.

    Raises:
        RepairError: A layer gets a single value per channel in every batch, which its own statistics make 0.
        DeviceError, UserCodeError, DataError: As in any pass.
    """
    population, emulation = Population(), not_emulated("")
    for done, batch in enumerate(batches, 1):
        steady_population(session, [batch], Batching(batch.samples, emulation, 1), population, frozen)
        progress(done, done)
    values, updates = population.values(), population.updates()
    for layer in session.layers.layers:
        if layer.index in values and values[layer.index] <= updates[layer.index]:
            raise RepairError(
                f"{layer.name} gets a single value per channel in every batch, which the statistics of that batch turn"
                " into 0. Give larger batches, or recalibrate on another path. Nothing was changed."
            )
    statistics = population.averaged() if averaged else population.statistics()
    return PopulationStatistics(statistics, updates, values, population.mixed)


def population_by_layer(
    session: Session, batches: Iterable[MicroBatch], wanted: frozenset[int], progress: Progress
) -> PopulationStatistics:
    """The eval path: each layer's statistics with all layers before it on their new running statistics.

    The exact fixed point, which does not depend on how the samples are divided into batches. Where all samples may run
    as one physical batch that fits into memory, one forward pass gives it: each layer takes its statistics when it is
    called, and goes on with them. Otherwise layer after layer in the order of their calls, one pass over the data per
    layer, ended as soon as the layer was called. Where a layer is called several times per pass it may see what its own
    statistics changed: rounds over all layers are repeated until nothing moves.

    Args:
        session: Installed.
        batches: On the host, of any sizes; read once, or once for every layer.
        wanted: Indices of the layers whose statistics are taken; others normalize with the running ones they have.
        progress: Called with the batches done, and those of one round over the layers.

    Raises:
        RepairError: A layer's statistics do not converge.
        DeviceError, UserCodeError, DataError: As in any pass.
    """
    return _Rounds(session, batches, wanted, progress).run()


class _AsCalled(Mapping[Any, tuple[Tensor, Tensor]]):
    """Statistics of the wanted layers from what a pass over all samples has recorded of their calls so far.

    A pass records a call before it asks for the statistics that the layer is to use.
    """

    def __init__(self, records: Mapping[Slot, Recorded], wanted: frozenset[int]) -> None:
        self._records, self._wanted = records, wanted

    def __getitem__(self, key: Any) -> tuple[Tensor, Tensor]:
        if key not in self._wanted:
            raise KeyError(key)
        population = Population()
        population.add({(key, 0): self._records[key, 0]})
        return population.statistics()[key]

    def __iter__(self) -> Iterator[int]:
        return (index for index in self._wanted if (index, 0) in self._records)

    def __len__(self) -> int:
        return len(list(iter(self)))


class _Rounds:
    def __init__(
        self, session: Session, batches: Iterable[MicroBatch], wanted: frozenset[int], progress: Progress
    ) -> None:
        self._session, self._batches, self._wanted, self._progress = session, batches, wanted, progress
        self._chunks = Chunks(session.device, 1, 1)
        self._emulation = not_emulated("")
        self._opened: Iterator[MicroBatch] | None = None  # a reading that has begun
        self._extremes = Extremes()
        self._again: set[int] = set()  # layers called several times in a forward pass
        self._done = 0
        self._planned = 0
        self._passes = 0

    def run(self) -> PopulationStatistics:
        return self._at_once() or self._one_by_one()

    def _at_once(self) -> PopulationStatistics | None:
        """All the data as one physical batch; None where it cannot run so, or where that would give something else."""
        batches = self._within_memory()
        if batches is None:
            return None
        sizes = [batch.samples for batch in batches]
        pass_ = Pass(sum(sizes), sum(sizes), immediate=True)
        pass_.statistics = _AsCalled(pass_.records, self._wanted)
        try:
            self._forward(join([batch.data for batch in batches], sizes), pass_, None)
            if len(batches) > 1:
                self._emulation.require_same_sizes("eval", pass_)
        except (CannotEmulateError, UserCodeError):
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        found = {slot: record for slot, record in pass_.records.items() if slot[0] in self._wanted}
        by_batch = any(record.by_batch for record in pass_.records.values())
        if any(call for _, call in found) or (by_batch and len(batches) > 1):
            return None
        population = Population()
        population.add(found, len(batches))
        self._progress(len(batches), len(batches))
        return PopulationStatistics(population.statistics(), population.updates(), population.values(), mixed=True)

    def _within_memory(self) -> list[MicroBatch] | None:
        """All batches, where they may run together and fit into memory; a single one runs by itself in any case."""
        stream = iter(self._batches)
        batches = list(itertools.islice(stream, 2))
        room = self._plan(batches)
        samples, held = sum(batch.samples for batch in batches), sum(bytes_of(batch.data) or 0 for batch in batches)
        while samples <= room and held <= KEPT_BYTES and (batch := next(stream, None)) is not None:
            batches.append(batch)
            samples += batch.samples
            held += bytes_of(batch.data) or 0
        self._opened = itertools.chain(batches, stream)
        if len(batches) < 2:
            return batches
        if samples > room or held > KEPT_BYTES:
            return None
        self._check_again(batches)
        return batches if self._emulation.trusted else None

    def _one_by_one(self) -> PopulationStatistics:
        first = self._pass({}, self._wanted)
        order = list(first.statistics())
        self._planned = self._done * len(order)
        found = {index: first.statistics()[index] for index in order[:1]}
        for index in order[1:]:
            found[index] = self._take(index, found)
        rounds = 1
        while self._again and self._moved(order, found):
            rounds += 1
            if rounds > ROUNDS:
                raise RepairError(self._not_converged())
        return PopulationStatistics(found, first.updates(), first.values(), mixed=True, passes=self._passes)

    def _take(self, index: int, found: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        population = self._pass(found, frozenset({index}), None if index in self._again else index)
        return population.statistics()[index]

    def _moved(self, order: list[int], found: dict[int, tuple[Tensor, Tensor]]) -> bool:
        """One more round; whether any statistics changed by more than rounding."""
        moved = False
        for index in order:
            before, found[index] = found[index], self._take(index, found)
            moved = self._differ(index, before, found[index]) or moved
        return moved

    def _differ(self, index: int, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> bool:
        info = self._session.layers.layers[index].info
        assert info.running_mean is not None  # only such layers are wanted
        scale = after[1] + info.eps
        change = torch.maximum((after[0] - before[0]).abs() / scale.sqrt(), (after[1] - before[1]).abs() / scale)
        return not bool((change <= _CLOSE * torch.finfo(info.running_mean.dtype).eps).all())

    def _pass(
        self, statistics: Mapping[int, tuple[Tensor, Tensor]], wanted: frozenset[int], last: int | None = None
    ) -> Population:
        """One pass over the data; what the wanted layers saw. Every forward pass ends after the layer ``last``."""
        self._passes += 1
        population = Population()
        stream, self._opened = self._opened or iter(self._batches), None

        def run(chunk: list[MicroBatch]) -> None:
            sizes = [batch.samples for batch in chunk]
            samples = sum(sizes)
            pass_ = Pass(samples, samples, statistics=statistics)
            self._forward(join([batch.data for batch in chunk], sizes), pass_, last)
            if len(chunk) > 1:
                self._emulation.require_same_sizes("eval", pass_)
            found = {slot: record for slot, record in pass_.records.items() if slot[0] in wanted}
            population.add(found, len(chunk))
            self._again.update(index for index, call in found if call > 0)

        while chunk := list(itertools.islice(stream, self._chunks.at_once)):
            self._check_again(chunk)
            self._chunks.run(chunk, run)
            self._done += len(chunk)
            self._progress(self._done, max(self._done, self._planned))
        return population

    def _check_again(self, chunk: list[MicroBatch]) -> None:
        """Go on with the batches as they are if some of these show that the model depends on the largest sample."""
        self._emulation = checked_further(self._session, self._extremes, self._emulation, chunk)
        if not self._emulation.trusted:
            self._chunks.at_once = 1

    def _plan(self, opening: list[MicroBatch]) -> int:
        """Decide how many batches run at once, and return the number of samples up to which all of them may."""
        size, device = opening[0].samples if opening else 1, self._session.device
        self._emulation, footprint = _checked(self._session, opening, check_samples)
        self._extremes.widened_by(self._session, opening)  # by which it was checked
        if not self._emulation.trusted:
            self._chunks = Chunks(device, size, 1)
            return 0
        self._chunks = Chunks(device, size, max(1, plan_samples(footprint, device) // size))
        return min(samples_in_memory(footprint, device), LARGEST // max(footprint.largest, 1))

    def _forward(self, batch: Any, pass_: Pass, last: int | None) -> None:
        batch = to_device(batch, self._session.device)
        if last is None:
            self._session.forward("eval", batch, pass_)
            return
        handle = self._session.layers.layers[last].module.register_forward_hook(_end)
        try:
            self._session.forward("eval", batch, pass_)
        except EndOfPass:
            pass
        finally:
            handle.remove()

    def _not_converged(self) -> str:
        names = ", ".join(self._session.layers.layers[index].name for index in sorted(self._again))
        return (
            f"The running statistics did not converge in {ROUNDS} rounds with {option('--path', 'eval')},"
            f" because {names} is called"
            " several times per forward pass and its input depends on its own output. Use"
            f" {option('--path', 'train')}."
        )


def _end(module: object, inputs: object, output: object) -> None:
    raise EndOfPass


def _checked(session: Session, opening: list[MicroBatch], check: Check) -> tuple[Emulation, Footprint]:
    """Check on the first two batches whether batches may run together; also the memory of a sample."""
    if len({batch.samples for batch in opening}) != 1:
        return not_emulated("The first batches have different sizes."), Footprint(0, 0)
    return checked(session, [batch.data for batch in opening], opening[0].samples, check)


def _halved(count: int) -> Iterator[int]:
    while count:
        yield count
        count //= 2


def _parts(batches: Iterable[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """The batches in parts that fit into host memory."""
    part: list[MicroBatch] = []
    size = 0
    for batch in batches:
        part.append(batch)
        size += bytes_of(batch.data) or 0
        if size > KEPT_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
