"""The statistics that a scan gathers over micro-batches: one class each, and a row in ``STATISTICS``.

Other packages add rows to it (entry points of the group ``bnprobe.statistics``).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnprobe.measure.forward_pass import Slot
from bnprobe.measure.statistic import Calls, CallTable, Columns, SampleStep, Statistic, Step, sent
from bnprobe.registry import Registry
from bnprobe.stats.composition import Images
from bnprobe.stats.histogram import D_AXIS, R_AXIS, Axis
from bnprobe.stats.intervals import REPLICATES, Sums
from bnprobe.stats.ladder import SUMS, BatchSums, summands
from bnprobe.stats.theory import D_MAX, R_MAX

POOL_BYTES = 2**26
"""Upper limit on the memory of the pool: 64 MiB hold 315 samples of ResNet-50's 26560 channels."""

POOL_SAMPLES = 1024
"""Upper limit on the samples in the pool; with more, its noise is negligible beside that of the micro-batches."""


class Mismatch(Statistic):
    """D of each call: mean over channels, and over the groups of a micro-batch.

    ``first_bad`` is the physical batch in which a non-finite value was first seen.
    """

    name = "mismatch"
    scopes = frozenset({"train", "steady", "eval", "held-out", "other sizes"})
    reported = False
    never: ClassVar[int] = torch.iinfo(torch.int64).max

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.declare("powers", "sum", shape=(4,))
        self.declare("first_bad", "min", dtype=torch.int64, empty=self.never)

    def update(self, step: Step) -> None:
        per_call, call = step.mismatch_of_call, step.columns.call
        self.accumulate("powers", call, _powers(per_call))
        good = per_call < torch.inf  # never of NaN; D is not negative
        number = sent(step.numbers, good.device).unsqueeze(1)
        self.accumulate("first_bad", call, number.masked_fill(good, self.never).amin(0))

    def every(self, table: CallTable) -> dict[Slot, tuple[Sums, int | None]]:
        """The sums of each call, and the physical batch of the first non-finite value, None if all are finite."""
        steps = [None if bad == self.never else bad for bad in self["first_bad"].tolist()]
        return dict(zip(table.calls, zip(_sums(self["powers"]), steps, strict=True), strict=True))


class LayerMismatch(Statistic):
    """D of each layer: the calls of a micro-batch are averaged before they are squared.

    Where samples are known one by one, so is what each adds to D by itself, to second order: for b samples,
    (d^2 + rho w^2 / 4) / b^2 with the sample's mean d and the deviation w of its mean square.
    """

    name = "layer mismatch"
    scopes = Mismatch.scopes
    reported = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        for state in ("powers", "powers of parts"):
            self.declare(state, "sum", per="layer", shape=(4,))

    def update(self, step: Step) -> None:
        per_layer = step.columns.per_layer(step.mismatch_of_call)
        self.accumulate("powers", step.columns.layer, _powers(per_layer))

    def update_samples(self, step: SampleStep) -> None:
        columns, squares = step.columns, step.squares
        rho = columns.variance / columns.square_std
        parts = (step.variance + squares).sub_(rho).square_().mul_(rho / 4).add_(squares)
        per_layer = columns.per_layer(columns.per_call(parts)) / step.batch_size**2
        self.accumulate("powers of parts", columns.layer, _powers(per_layer))

    def every(self, table: CallTable) -> dict[int, Sums]:
        """The sums of each layer by its index."""
        parts = (each if each.count else None for each in _sums(self["powers of parts"]))
        every = zip(table.layers, _sums(self["powers"]), parts, strict=True)
        return {index: replace(sums, parts=own) for index, sums, own in every if sums.count}


@dataclass(frozen=True)
class Values:
    """Sums over the values of r or d."""

    count: float
    total: float
    square: float
    clipped: float
    low: float
    high: float
    histogram: NDArray[np.int64]

    def __add__(self, other: Values) -> Values:
        return Values(
            self.count + other.count,
            self.total + other.total,
            self.square + other.square,
            self.clipped + other.clipped,
            min(self.low, other.low),
            max(self.high, other.high),
            self.histogram + other.histogram,
        )


class CorrectionValues(Statistic):
    """Moments, extremes, histogram and clipped count of r or d, over channels and groups."""

    reported = False
    scopes = Mismatch.scopes
    axis: ClassVar[Axis]

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        for state in ("total", "square", "clipped"):
            self.declare(state, "sum", per="channel")
        self.declare("low", "min", per="channel")
        self.declare("high", "max", per="channel")
        self.declare("histogram", "sum", shape=(self.axis.bins,), dtype=torch.int64)

    def add(self, columns: Columns, values: Tensor, squares: Tensor, clipped: Tensor) -> None:
        """Add values, their squares, and whether they are clipped; shapes (groups, columns)."""
        channel = columns.channel
        self.accumulate("total", channel, values.sum(0))
        self.accumulate("square", channel, squares.sum(0))
        self.accumulate("clipped", channel, clipped.sum(0, dtype=torch.float64))
        self.accumulate("low", channel, values.amin(0))
        self.accumulate("high", channel, values.amax(0))
        bins = self.axis.index(values).add_(columns.state_of_column, alpha=self.axis.bins).flatten()
        self["histogram"].view(-1).index_add_(0, bins, torch.ones_like(bins))

    def every(self, table: CallTable) -> dict[Slot, Values]:
        """The sums of each call."""
        if not table.calls:
            return {}
        segments = table.segments(list(table.calls))
        totals = torch.stack([self[name] for name in ("total", "square", "clipped")]).cpu()
        ends = torch.stack([self["low"], -self["high"]]).cpu()
        sums, (lows, negatives) = segments.mean(totals) * segments.sizes, segments.least(ends).tolist()
        found = [
            Values(float(histogram.sum()), total, square, clipped, low, -negative, histogram)
            for (total, square, clipped), low, negative, histogram in zip(
                sums.T.tolist(), lows, negatives, self["histogram"].cpu().numpy(), strict=True
            )
        ]
        return dict(zip(table.calls, found, strict=True))


class CorrectionR(CorrectionValues):
    """r, and how often Batch Renorm's usual limit would clip it."""

    name = "r"
    axis = R_AXIS

    def update(self, step: Step) -> None:
        r = step.values.r
        self.add(step.columns, r, r.square(), (r > R_MAX) | (r < 1 / R_MAX))


class CorrectionD(CorrectionValues):
    """d, and how often Batch Renorm's usual limit would clip it."""

    name = "d"
    axis = D_AXIS

    def update(self, step: Step) -> None:
        d = step.values.d
        self.add(step.columns, d, step.values.d_squared, d.abs() > D_MAX)


class MismatchSums(Statistic):
    """Sums per replicate and channel, from which the mismatch is known against any other statistics.

    Micro-batches are added in turn to the replicates (see ``stats.intervals``).
    """

    name = "batch moments"
    scopes = Mismatch.scopes
    reported = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.declare("counts", "sum", shape=(REPLICATES,))
        self.declare("eps", "max", per="channel", empty=0.0)
        for state in (*SUMS, "sample squares"):
            self.declare(state, "sum", per="channel", shape=(REPLICATES,))

    def update(self, step: Step) -> None:
        columns, replicate = step.columns, step.replicate_of_row
        counts = [float(step.groups * step.replicates.count(number)) for number in range(REPLICATES)]
        counted = sent(counts, columns.eps.device, columns.eps.dtype)
        self.accumulate("counts", columns.call, counted.expand(columns.call.numel(), -1))
        self.accumulate("eps", columns.channel, columns.relative_eps)
        for name, summand in summands(step.values, columns.bessel).items():
            self._add_rows(name, columns, replicate, summand)

    def update_samples(self, step: SampleStep) -> None:
        squares = step.squares.unflatten(0, (-1, step.batch_size)).sum(1)
        index = sent(step.replicates, squares.device)
        self._add_rows("sample squares", step.columns, index, squares)

    def side_by_side(self, table: CallTable, slots: Sequence[Slot]) -> tuple[BatchSums, Tensor]:
        """The sums of one call of each of many layers.

        Returns:
            The sums, and the squared means of samples (as d) summed, shape (replicates, channels).
        """
        place, calls = table.place(slots), [table.calls[slot] for slot in slots]
        found = {name: self[name][..., place].cpu() for name in ("eps", *SUMS, "sample squares")}
        squares = found.pop("sample squares")
        return BatchSums(table.segments(slots), self["counts"][calls].T.cpu(), **found), squares

    def _add_rows(self, name: str, columns: Columns, replicate: Tensor, rows: Tensor) -> None:
        if columns.channel is None:
            self[name].index_add_(0, replicate, rows)
        else:
            added = rows.new_zeros(REPLICATES, rows.shape[1]).index_add_(0, replicate, rows)
            self.accumulate(name, columns.channel, added)


class SamplePool(Statistic):
    """Moments of samples drawn at random from all that pass, each with the same chance (Vitter 1985, algorithm R).

    Kept in float32, from an origin near the data, in units of the running statistics. Forward passes that make other
    calls than the first one add nothing. In several processes every one draws for the samples of all, alike, and keeps
    its own: together they keep what one process would.

    Attributes:
        table: Where the calls of the first step stand.
        place: The places that there is a row for: all, or on the host those that are taken.
        number: Position of the sample in each of them among all samples measured; -1: the place is free.
        replicate: The replicate of its micro-batch.
        mean, variance: As in ``stats.composition.Images``, shape (rows, columns); the mean from ``origin``.
        origin: Shape (columns,), float64.
    """

    name = "sample pool"
    scopes = frozenset({"eval"})
    reported = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.table = CallTable()
        self.place: list[int] = []
        self.number: list[int] = []
        self.replicate: list[int] = []
        self.origin = torch.zeros(0, dtype=torch.float64)
        self.mean = self.variance = torch.zeros(0, 0)
        self._random = random.Random(seed)
        self._seen = 0

    def update_samples(self, step: SampleStep) -> None:
        if not self.number:
            self._start(step)
        if step.columns.slots != self.slots:
            return
        size = step.batch_size
        numbers = [position * size + sample for position in step.positions for sample in range(size)]
        chosen = self._choose(numbers)
        if not chosen:
            return
        for place, row in chosen.items():
            self.replicate[place], self.number[place] = step.replicates[row // size], numbers[row]
        places, rows = list(chosen), list(chosen.values())
        first, count = places[0], len(places)
        if rows == list(range(count)) and places == list(range(first, first + count)):  # while there are free places
            torch.sub(step.mean[:count], self.origin, out=self.mean[first : first + count])
            self.variance[first : first + count] = step.variance[:count]
            return
        to, of = (sent(each, step.mean.device) for each in (places, rows))
        # index_copy_ moves whole rows, where an assignment by index goes value by value
        self.mean.index_copy_(0, to, (step.mean.index_select(0, of) - self.origin).float())
        self.variance.index_copy_(0, to, step.variance.index_select(0, of).float())

    def merge(self, other: Statistic, table: CallTable, other_table: CallTable) -> None:
        """Where two processes fill the same place, keep the later sample."""
        assert isinstance(other, SamplePool)
        if not self.number:
            self.__dict__ |= other.__dict__
            return
        if not other.number or other.slots != self.slots:
            return
        numbers, replicates = self.number + other.number, self.replicate + other.replicate
        every = sorted(zip(self.place + other.place, numbers, range(len(numbers)), strict=True))
        last = {place: row for place, _, row in every}
        self.place, rows = list(last), list(last.values())
        self.number, self.replicate = [numbers[row] for row in rows], [replicates[row] for row in rows]
        mean = (other.mean + (other.origin - self.origin)).float()
        self.mean = torch.cat([self.mean, mean]).index_select(0, torch.tensor(rows))
        self.variance = torch.cat([self.variance, other.variance]).index_select(0, torch.tensor(rows))

    def on_host(self) -> SamplePool:
        found, held = copy.copy(self), self._held()
        rows = torch.tensor(held, dtype=torch.int64, device=self.mean.device)
        found.origin = self.origin.cpu()
        found.mean, found.variance = (each.index_select(0, rows).cpu() for each in (self.mean, self.variance))
        found.place, found.number, found.replicate = (
            [each[row] for row in held] for each in (self.place, self.number, self.replicate)
        )
        return found

    @property
    def slots(self) -> Calls:
        """The calls whose samples are known; none if samples could not be told apart."""
        return tuple(self.table.calls)

    @property
    def held(self) -> int:
        """How many samples there are of each call."""
        return len(self._held())

    def samples(self, slots: Sequence[Slot]) -> Images:
        """The samples of one call of each of many layers."""
        held = torch.tensor(self._held(), dtype=torch.int64)
        place = self.table.place(slots)
        return Images(self.mean[:, place][held], self.variance[:, place][held], torch.tensor(self.replicate)[held])

    def origins(self, slots: Sequence[Slot]) -> Tensor:
        """The mean (as d) that ``Images.mean`` is counted from, float64, shape (channels,)."""
        return self.origin[self.table.place(slots)]

    @property
    def bytes(self) -> int:
        """Size of the moments of the samples that are held."""
        return 2 * self.held * self.mean.shape[1] * self.mean.element_size()

    def _held(self) -> list[int]:
        """The rows of places that are taken."""
        return [row for row, number in enumerate(self.number) if number >= 0]

    def _start(self, step: SampleStep) -> None:
        columns = step.mean.shape[1]
        room = max(1, min(POOL_SAMPLES, POOL_BYTES // (8 * columns)))
        for slot, channels in zip(step.columns.slots, step.columns.channels.tolist(), strict=True):
            self.table.add(slot, channels)
        self.origin = step.mean.mean(0)
        # The memory of places that stay free is never touched.
        self.mean = step.mean.new_empty(room, columns, dtype=torch.float32)
        self.variance = torch.empty_like(self.mean)
        self.place, self.number, self.replicate = list(range(room)), [-1] * room, [0] * room

    def _choose(self, numbers: Sequence[int]) -> dict[int, int]:
        """Place in the pool -> row of the step; a later sample may take the place of an earlier one."""
        room, chosen, place = len(self.number), dict[int, int](), 0
        for row, number in enumerate(numbers):
            while self._seen <= number:
                place = self._seen if self._seen < room else self._random.randrange(self._seen + 1)
                self._seen += 1
                if place < room:
                    self.number[place] = -1
                    chosen.pop(place, None)
            if place < room:
                chosen[place] = row
        return chosen


STATISTICS: Registry[type[Statistic]] = Registry(
    "bnprobe.statistics",
    (Mismatch, LayerMismatch, CorrectionR, CorrectionD, MismatchSums, SamplePool),
    name_of=lambda row: row.name,
    noun="statistic",
)
"""Every statistic that a scan gathers."""


def _powers(rows: Tensor) -> Tensor:
    """Sums over rows of the powers 0 to 3 of each column, shape (columns, 4)."""
    squares = rows.square()
    return torch.stack([torch.ones_like(rows), rows, squares, squares * rows], -1).sum(0)


def _sums(powers: Tensor) -> list[Sums]:
    """Of each call or layer, from sums of powers of shape (calls or layers, 4)."""
    return [Sums(int(count), *others) for count, *others in powers.tolist()]
