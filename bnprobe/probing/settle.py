"""Population statistics of every layer, as the weights are now, on either path."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnprobe.errors import RepairError, UserCodeError
from bnprobe.probing.batches import count_images, join, tensors_of, to_device
from bnprobe.probing.chunks import Chunks
from bnprobe.probing.drive import Progress
from bnprobe.probing.emulation import Emulation, check_images, self_check
from bnprobe.probing.intercept import Pass
from bnprobe.probing.memory import Footprint, fits, is_out_of_memory, plan_images
from bnprobe.probing.population import Population, steady_population
from bnprobe.probing.reread import KEPT_BYTES, Reread
from bnprobe.probing.runner import Runner

LARGE = 256
"""Images of a physical batch on the train path, memory allowing: its statistics are near the population's."""

ROUNDS = 50
"""Rounds over the layers after which statistics that still move are given up."""

_CLOSE = 16
"""Units in the last place of a buffer within which statistics have settled."""

_ALONE = Emulation(trusted=False, reason="", check=None, layouts={})

Check = Callable[[Runner, list[Any], int], tuple[Emulation, Footprint]]


@dataclass(frozen=True)
class Settled:
    """Statistics by index of the layer.

    Attributes:
        statistics: Mean and unbiased variance, float64 of shape (channels,), as the running buffers hold them.
        updates: Batches of the data that they stand for, each call of the layer counted.
        values: Per channel; the variance of fewer than two is 0.
    """

    statistics: dict[int, tuple[Tensor, Tensor]]
    updates: dict[int, int]
    values: dict[int, int]


def settle_by_batch(runner: Runner, batches: Reread, progress: Progress) -> Settled:
    """The train path without dropout and the like: every physical batch normalizes with its own statistics.

    Physical batches hold up to ``LARGE`` images drawn at random from a part of the data, where images of different
    batches may run together; see ``steady_population``. One pass over the data.

    Args:
        runner: Installed.
        batches: On the host, of any sizes.
        progress: Called with the batches done and the images' number of batches, as far as known.

    Raises:
        DeviceError, UserCodeError, DataError: As in any pass.
    """
    population = Population()
    stream = iter(batches)
    opening = list(itertools.islice(stream, 2))
    size = _images(opening[0]) if opening else 1
    emulation, image = checked(runner, opening, self_check)
    images = next((count for count in _halved(LARGE) if fits(image, count, runner.device)), 1)
    done = 0
    for part in _parts(itertools.chain(opening, stream)):
        steady_population(runner, part, size, max(1, images // size), emulation, population)
        done += len(part)
        progress(done, done)
    return Settled(population.statistics(), population.updates(), population.values())


def settle_by_layer(runner: Runner, batches: Reread, wanted: frozenset[int], progress: Progress) -> Settled:
    """The eval path: each layer's statistics with all layers before it on their new running statistics.

    Layer after layer in the order of their calls: the exact fixed point, which does not depend on how the images are
    divided into batches. One pass over the data per layer, ended as soon as the layer was called. Where a layer is
    called several times per pass it may see what its own statistics changed: rounds over all layers are repeated until
    nothing moves.

    Args:
        runner: Installed.
        batches: On the host, of any sizes; read once for every layer.
        wanted: Indices of the layers whose statistics are taken; others normalize with the running ones they have.
        progress: Called with the batches done, and those of one round over the layers.

    Raises:
        RepairError: A layer's statistics do not settle.
        DeviceError, UserCodeError, DataError: As in any pass.
    """
    return _Rounds(runner, batches, wanted, progress).run()


class _Rounds:
    def __init__(self, runner: Runner, batches: Reread, wanted: frozenset[int], progress: Progress) -> None:
        self._runner, self._batches, self._wanted, self._progress = runner, batches, wanted, progress
        self._chunks: Chunks | None = None
        self._again: set[int] = set()  # layers called several times in a forward pass
        self._done = 0
        self._planned = 0

    def run(self) -> Settled:
        first = self._pass({}, self._wanted)
        order = list(first.statistics())
        self._planned = self._done * len(order)
        settled = {index: first.statistics()[index] for index in order[:1]}
        for index in order[1:]:
            settled[index] = self._take(index, settled)
        rounds = 1
        while self._again and self._moved(order, settled):
            rounds += 1
            if rounds > ROUNDS:
                raise RepairError(self._unsettled())
        return Settled(settled, first.updates(), first.values())

    def _take(self, index: int, settled: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        population = self._pass(settled, frozenset({index}), None if index in self._again else index)
        return population.statistics()[index]

    def _moved(self, order: list[int], settled: dict[int, tuple[Tensor, Tensor]]) -> bool:
        """One more round; whether any statistics changed by more than rounding."""
        moved = False
        for index in order:
            before, settled[index] = settled[index], self._take(index, settled)
            moved = self._differ(index, before, settled[index]) or moved
        return moved

    def _differ(self, index: int, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> bool:
        info = self._runner.layers.layers[index].info
        assert info.running_mean is not None  # only such layers are wanted
        scale = after[1] + info.eps
        change = torch.maximum((after[0] - before[0]).abs() / scale.sqrt(), (after[1] - before[1]).abs() / scale)
        return not bool((change <= _CLOSE * torch.finfo(info.running_mean.dtype).eps).all())

    def _pass(
        self, statistics: Mapping[int, tuple[Tensor, Tensor]], wanted: frozenset[int], last: int | None = None
    ) -> Population:
        """One pass over the data; what the wanted layers saw. Every forward pass ends after the layer ``last``."""
        population = Population()
        stream = iter(self._batches)
        if self._chunks is None:
            opening = list(itertools.islice(stream, 2))
            self._chunks = self._plan(opening)
            stream = itertools.chain(opening, stream)

        def run(chunk: list[Any]) -> None:
            images = sum(map(_images, chunk))
            pass_ = Pass(images, images, statistics=statistics)
            self._forward(join(chunk), pass_, last)
            found = {slot: record for slot, record in pass_.records.items() if slot[0] in wanted}
            population.add(found, len(chunk))
            self._again.update(index for index, call in found if call > 0)

        while chunk := list(itertools.islice(stream, self._chunks.at_once)):
            self._chunks.run(chunk, run)
            self._done += len(chunk)
            self._progress(self._done, max(self._done, self._planned))
        return population

    def _plan(self, opening: list[Any]) -> Chunks:
        size = _images(opening[0]) if opening else 1
        emulation, image = checked(self._runner, opening, check_images)
        at_once = plan_images(image, self._runner.device) // size if emulation.trusted else 1
        return Chunks(self._runner.device, size, max(1, at_once))

    def _forward(self, batch: Any, pass_: Pass, last: int | None) -> None:
        batch = to_device(batch, self._runner.device)
        if last is None:
            self._runner.forward("eval", batch, pass_)
            return
        handle = self._runner.layers.layers[last].module.register_forward_hook(_end)
        try:
            self._runner.forward("eval", batch, pass_)
        except _EndOfPass:
            pass
        finally:
            handle.remove()

    def _unsettled(self) -> str:
        names = ", ".join(self._runner.layers.layers[index].name for index in sorted(self._again))
        return (
            f"The running statistics did not settle in {ROUNDS} rounds on the eval path: {names} is called several"
            " times per pass, and what it sees depends on its own statistics. Use the train path."
        )


class _EndOfPass(BaseException):
    """What was to be seen of a forward pass was seen; no error that the user's model might catch."""


def _end(module: object, inputs: object, output: object) -> None:
    raise _EndOfPass


def checked(runner: Runner, opening: list[Any], check: Check) -> tuple[Emulation, Footprint]:
    """Whether images of different batches may run together, by the first two batches, and what an image takes."""
    unknown = Footprint(0, 0)
    sizes = {_images(batch) for batch in opening}
    if len(opening) < 2 or len(sizes) > 1:
        return _ALONE, unknown
    try:
        return check(runner, [to_device(batch, runner.device) for batch in opening], sizes.pop())
    except UserCodeError:
        if runner.autocast is None:
            raise
        return _ALONE, unknown  # the check runs without autocast, and the model does not
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _ALONE, unknown


def _images(batch: Any) -> int:
    return count_images(batch) or 1


def _halved(count: int) -> Iterator[int]:
    while count:
        yield count
        count //= 2


def _parts(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """The batches in parts that fit into host memory."""
    part: list[Any] = []
    size = 0
    for batch in batches:
        part.append(batch)
        size += sum(tensor.nbytes for tensor in tensors_of(batch))
        if size > KEPT_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
