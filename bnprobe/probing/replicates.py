"""Sums per replicate and channel, for what is told of the mismatch afterwards; and the pool of images.

A step adds micro-batches in turn to the replicates (``stats.jackknife``), so memory is O(channels) whatever their
number.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnprobe.distributed import EVERYTHING, Share
from bnprobe.probing.intercept import Slot
from bnprobe.stats.composition import Images
from bnprobe.stats.jackknife import REPLICATES
from bnprobe.stats.mismatch import Corrections

POOL_BYTES = 2**26
"""Most memory of the pool: 64 MiB hold 315 images of ResNet-50's 26560 channels."""

POOL_IMAGES = 1024
"""Most images of the pool: with more, its own noise no longer shows beside that of the micro-batches."""

Calls = tuple[Slot, ...]


@dataclass
class _Sums:
    """Of one sequence of calls, whose channels lie side by side."""

    counts: list[int]
    sums: Tensor
    squares: Tensor


class ReplicateSums:
    """Sums behind ``stats.ladder.BatchSums``, and of squared image means where images are known.

    Args:
        share: Which micro-batches these are: each goes to the replicate that it would go to in one process.

    Attributes:
        batches: Micro-batches added so far.
    """

    def __init__(self, share: Share = EVERYTHING) -> None:
        self._share = share
        self.batches = 0
        self._sums: dict[Calls, _Sums] = {}

    def add(self, slots: Calls, values: Corrections, bessel: Tensor) -> None:
        """Add the next micro-batches; ``bessel`` is n / (n - 1) of each column."""
        rows, columns = values.r.shape
        held = self._held(slots, columns, values.r)
        replicates = self.next(rows)
        for replicate in replicates:
            held.counts[replicate] += 1
        index = torch.tensor(replicates, device=values.r.device)
        rho_r = values.rho * values.r
        variance = rho_r * values.r
        summands = (values.d, values.d.square(), values.rho, rho_r, variance, variance * bessel)
        for position, summand in enumerate(summands):
            held.sums[:, position].index_add_(0, index, summand)
        self.batches += rows

    def add_images(self, slots: Calls, d: Tensor, size: int) -> None:
        """Add the image means (as d) of the micro-batches that ``add`` is called with next."""
        held = self._held(slots, d.shape[1], d)
        squares = d.square().unflatten(0, (-1, size)).sum(1)
        index = torch.tensor(self.next(squares.shape[0]), device=d.device)
        held.squares.index_add_(0, index, squares)

    def next(self, rows: int) -> list[int]:
        """Replicates of the next micro-batches."""
        return [position % REPLICATES for position in self.positions(rows)]

    def positions(self, rows: int) -> list[int]:
        """Positions of the next micro-batches among those of all processes."""
        return [self._share.position(self.batches + row) for row in range(rows)]

    def per_call(self, channels: Mapping[Slot, int]) -> dict[Slot, tuple[Tensor, Tensor, Tensor]]:
        """Counts (replicates,), sums (replicates, 6, channels) and image squares of each call, on the host."""
        found: dict[Slot, tuple[Tensor, Tensor, Tensor]] = {}
        for slots, held in self._sums.items():
            counts = torch.tensor(held.counts, dtype=torch.float64)
            widths = [channels[slot] for slot in slots]
            sums, squares = held.sums.cpu().split(widths, 2), held.squares.cpu().split(widths, 1)
            for slot, *parts in zip(slots, sums, squares, strict=True):
                nothing = tuple(torch.zeros_like(part) for part in (counts, *parts))
                before = found.get(slot, nothing)
                found[slot] = (before[0] + counts, before[1] + parts[0], before[2] + parts[1])
        return found

    def _held(self, slots: Calls, columns: int, like: Tensor) -> _Sums:
        if slots not in self._sums:
            sums, squares = like.new_zeros(REPLICATES, 6, columns), like.new_zeros(REPLICATES, columns)
            self._sums[slots] = _Sums([0] * REPLICATES, sums, squares)
        return self._sums[slots]


@dataclass(frozen=True)
class PoolSample:
    """What a pool holds, on the host; empty tensors where no images were known.

    Attributes:
        slots: The calls whose channels lie side by side.
        places: Place of each image in the pool, shape (images,), ascending.
        numbers: Its position among all images measured.
        replicate: The replicate of its micro-batch.
        origin: What ``mean`` is counted from, shape (columns,), float64.
        mean, variance: As in ``stats.composition.Images``, shape (images, columns).
    """

    slots: Calls = ()
    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    numbers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    replicate: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    origin: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    variance: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    @property
    def bytes(self) -> int:
        """Size of the images' moments."""
        return self.mean.nbytes + self.variance.nbytes

    def per_call(self, channels: Mapping[Slot, int]) -> dict[Slot, Images]:
        """The images of each call."""
        if not self.slots:
            return {}
        widths = [channels[slot] for slot in self.slots]
        parts = zip(self.slots, self.mean.split(widths, 1), self.variance.split(widths, 1), strict=True)
        return {slot: Images(mean, variance, self.replicate) for slot, mean, variance in parts}


@dataclass
class ImagePool:
    """Moments of images drawn at random from all that pass, each with the same chance (Vitter 1985, algorithm R).

    Kept in float32, from an origin near the data, in units of the running statistics. Forward passes that make other
    calls than the first one add nothing. In several processes every one draws for the images of all, alike, and keeps
    its own: together they keep what one process would.

    Attributes:
        seed: Of the drawing.
        slots: The calls, as in the first step.
        seen: Images that were drawn for.
    """

    seed: int
    slots: Calls = ()
    seen: int = 0
    _mean: Tensor | None = None
    _variance: Tensor | None = None
    _origin: Tensor | None = None
    _replicate: list[int] = field(default_factory=list)
    _number: list[int] = field(default_factory=list)
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def add(self, slots: Calls, d: Tensor, variance: Tensor, replicates: Sequence[int], numbers: Sequence[int]) -> None:
        """Add images.

        Args:
            d, variance: Their means as d, and variances over (running variance + eps), shape (images, columns).
            replicates: Replicate of each.
            numbers: Position of each among the images of all processes, ascending from call to call.
        """
        if self._mean is None:
            self._start(slots, d)
        if slots != self.slots or self._mean is None or self._variance is None or self._origin is None:
            return
        chosen = self._choose(numbers)
        if not chosen:
            return
        places = torch.tensor(list(chosen), device=d.device)
        rows = torch.tensor(list(chosen.values()), device=d.device)
        for place, row in chosen.items():
            self._replicate[place], self._number[place] = replicates[row], numbers[row]
        self._mean[places] = (d[rows] - self._origin).float()
        self._variance[places] = variance[rows].float()

    def sample(self) -> PoolSample:
        """The pool, on the host."""
        if self._mean is None or self._variance is None or self._origin is None:
            return PoolSample()
        places = torch.tensor([place for place, number in enumerate(self._number) if number >= 0], dtype=torch.int64)
        held = places.to(self._mean.device)
        return PoolSample(
            self.slots,
            places,
            torch.tensor(self._number)[places],
            torch.tensor(self._replicate)[places],
            self._origin.cpu(),
            self._mean[held].cpu(),
            self._variance[held].cpu(),
        )

    def _start(self, slots: Calls, d: Tensor) -> None:
        room = max(1, min(POOL_IMAGES, POOL_BYTES // (8 * d.shape[1])))
        self.slots = slots
        self._origin = d.mean(0)
        self._mean = d.new_zeros(room, d.shape[1], dtype=torch.float32)
        self._variance = torch.zeros_like(self._mean)
        self._replicate, self._number = [0] * room, [-1] * room

    def _choose(self, numbers: Sequence[int]) -> dict[int, int]:
        """Place in the pool -> row of the step; a later image may take the place of an earlier one."""
        assert self._mean is not None  # add() has started the pool
        room, chosen, place = self._mean.shape[0], dict[int, int](), 0
        for row, number in enumerate(numbers):
            while self.seen <= number:
                place = self.seen if self.seen < room else self._random.randrange(self.seen + 1)
                self.seen += 1
                if place < room:
                    self._number[place] = -1
                    chosen.pop(place, None)
            if place < room:
                chosen[place] = row
        return chosen
