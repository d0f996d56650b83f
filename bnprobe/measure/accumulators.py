"""Statistics over micro-batches: any number of them in constant memory, on the device until the end.

A statistic is one class. It declares its states once, with the reduction that adds new values to them (sum, min, max);
from that follow how states grow when a call is first seen, how those of two processes are merged, and how the calls of
a layer are taken together. ``update`` adds a step, ``compute`` says what comes of it. ``STATISTICS`` holds them all;
other packages add rows to it (entry points of the group ``bnprobe.statistics``).

The channels of all calls lie side by side, so that a step costs a few dozen kernels, not a few dozen per layer.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnprobe.measure.hooks import Slot
from bnprobe.measure.layers import ProbedLayer
from bnprobe.registry import Registry
from bnprobe.stats.composition import Images
from bnprobe.stats.histogram import D_AXIS, R_AXIS, Axis
from bnprobe.stats.intervals import REPLICATES, Sums
from bnprobe.stats.ladder import SUMS, BatchSums, summands
from bnprobe.stats.moments import Corrections, bessel
from bnprobe.stats.theory import D_MAX, R_MAX

POOL_BYTES = 2**26
"""Upper limit on the memory of the pool: 64 MiB hold 315 samples of ResNet-50's 26560 channels."""

POOL_SAMPLES = 1024
"""Upper limit on the samples in the pool; with more, its noise is negligible beside that of the micro-batches."""

S = TypeVar("S", bound="Statistic")

Calls = tuple[Slot, ...]

Scope = Literal["train", "steady", "eval", "held-out", "other sizes"]
"""Where a statistic may be taken: the paths, the eval path on held-out data, and the eval path at other batch sizes."""

Reduction = Literal["sum", "min", "max"]

Per = Literal["call", "layer", "channel"]
"""What a state has one entry for; its channels are those of all calls, side by side."""


@dataclass
class CallTable:
    """Where calls, layers and channels stand in the states, in the order in which they were first seen.

    Attributes:
        calls, layers: Position of each call, and of each layer by its index.
        channels: First channel of each call, and the first behind it.
    """

    calls: dict[Slot, int] = field(default_factory=dict)
    layers: dict[int, int] = field(default_factory=dict)
    channels: dict[Slot, tuple[int, int]] = field(default_factory=dict)

    def add(self, slot: Slot, channels: int) -> None:
        """Make room for a call, unless it has been seen."""
        if slot not in self.calls:
            start = self.sizes()["channel"]
            self.calls[slot] = len(self.calls)
            self.layers.setdefault(slot[0], len(self.layers))
            self.channels[slot] = start, start + channels

    def sizes(self) -> dict[Per, int]:
        """How many entries a state has."""
        columns = max((stop for _, stop in self.channels.values()), default=0)
        return {"call": len(self.calls), "layer": len(self.layers), "channel": columns}

    def columns(self, slots: Iterable[Slot]) -> list[int]:
        """Positions of the channels of calls."""
        return [column for slot in slots for column in range(*self.channels[slot])]

    def entries(self, per: Per, slot: Slot) -> slice:
        """The entries of a call in a state."""
        start, stop = {
            "call": (self.calls[slot], self.calls[slot] + 1),
            "layer": (self.layers[slot[0]], self.layers[slot[0]] + 1),
            "channel": self.channels[slot],
        }[per]
        return slice(start, stop)


@dataclass(frozen=True)
class Columns:
    """The channels of the calls of a step, side by side, and what their values are compared with.

    Attributes:
        slots: The calls.
        call_of_column: For each column the number of its call in the step, shape (columns,).
        layer_of_call: For each call the number of its layer in the step, shape (calls,).
        channels: Of each call, shape (calls,).
        calls_of_layer: Calls of each layer in the step, shape (layers,).
        call, layer, channel: Positions in the states, shapes (calls,), (layers,) and (columns,); ``channel`` is None
            where the columns are all channels in their order.
        mean, variance, eps: The layers' running statistics and eps, float64, shape (columns,).
        std_eps: Eps that is added to the standard deviation, where ``eps`` is what that comes to for the variance, and
            0 elsewhere; None: 0 everywhere.
        r_max, d_max, gate: Of the layers' own correction, shape (columns,); 1, 0 and 0 for BN.
        bessel: n / (n - 1) for the n values per channel of a group, shape (columns,); 1 where n is 1.
        factor: The same where the layer normalizes with the unbiased variance of its batch, else 1.
    """

    slots: Calls
    call_of_column: Tensor
    layer_of_call: Tensor
    channels: Tensor
    calls_of_layer: Tensor
    call: Tensor
    layer: Tensor
    channel: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: Tensor
    std_eps: Tensor | None
    r_max: Tensor
    d_max: Tensor
    gate: Tensor
    bessel: Tensor
    factor: Tensor

    @classmethod
    def of(
        cls, layers: Sequence[ProbedLayer], values: Mapping[Slot, int], table: CallTable, device: torch.device
    ) -> Columns:
        """Gather the reference statistics of calls; every layer named there keeps running statistics.

        Args:
            values: For each call its values per channel in a group.
            table: Holds these calls.
        """
        slots = tuple(values)
        infos = [layers[index].info for index, _ in slots]
        sizes = torch.tensor([info.channels for info in infos])
        indices = list(dict.fromkeys(index for index, _ in slots))
        layer_of_call = torch.tensor([indices.index(index) for index, _ in slots])
        r_max, d_max, std_eps = (
            torch.tensor([getattr(info, name) for info in infos], dtype=torch.float64).repeat_interleave(sizes)
            for name in ("r_max", "d_max", "std_eps")
        )
        unbiased = torch.tensor([bessel(n) for n in values.values()], dtype=torch.float64)
        factor = [n if info.unbiased else 1.0 for n, info in zip(unbiased.tolist(), infos, strict=True)]
        columns = table.columns(slots)
        whole = columns == list(range(table.sizes()["channel"]))
        return cls(
            slots=slots,
            call_of_column=torch.arange(len(slots)).repeat_interleave(sizes).to(device),
            layer_of_call=layer_of_call.to(device),
            channels=sizes.to(device),
            calls_of_layer=torch.bincount(layer_of_call).to(device, torch.float64),
            call=torch.tensor([table.calls[slot] for slot in slots], device=device),
            layer=torch.tensor([table.layers[index] for index in indices], device=device),
            channel=None if whole else torch.tensor(columns, device=device),
            mean=_side_by_side([info.running_mean for info in infos], device),
            variance=_side_by_side([info.running_variance for info in infos], device),
            eps=_side_by_side([info.eps_of_channels for info in infos], device),
            std_eps=std_eps.to(device) if bool(std_eps.any()) else None,
            r_max=r_max.to(device),
            d_max=d_max.to(device),
            gate=_side_by_side(
                [torch.zeros(info.channels) if info.gate is None else info.gate for info in infos], device
            ),
            bessel=unbiased.repeat_interleave(sizes).to(device),
            factor=torch.tensor(factor, dtype=torch.float64).repeat_interleave(sizes).to(device),
        )

    def per_call(self, values: Tensor) -> Tensor:
        """Mean over the channels of each call, shape (rows, calls)."""
        total = values.new_zeros(values.shape[0], len(self.slots)).index_add_(1, self.call_of_column, values)
        return total / self.channels

    def per_layer(self, per_call: Tensor) -> Tensor:
        """Mean over the calls of each layer, shape (rows, layers)."""
        total = per_call.new_zeros(per_call.shape[0], self.layer.numel())
        return total.index_add_(1, self.layer_of_call, per_call) / self.calls_of_layer


@dataclass(frozen=True)
class Step:
    """Micro-batches to be added.

    Attributes:
        columns: What the columns of ``values`` are.
        values: r, d, D and the like of each group, shape (micro-batches * groups, columns).
        groups: Groups of rows that a micro-batch divides into: 1 but for norm families that group rows themselves.
        number: Of the physical batch, from 0.
        replicates: The replicate of each micro-batch (see ``stats.intervals``).
    """

    columns: Columns
    values: Corrections
    groups: int
    number: int
    replicates: Sequence[int]

    def per_call(self, values: Tensor) -> Tensor:
        """Mean over the channels of each call and the groups of each micro-batch, shape (micro-batches, calls)."""
        mean = self.columns.per_call(values)
        return mean if self.groups == 1 else mean.unflatten(0, (-1, self.groups)).mean(1)

    @property
    def replicate_of_row(self) -> Tensor:
        """The replicate of each row of ``values``."""
        index = torch.tensor(self.replicates, device=self.values.r.device)
        return index if self.groups == 1 else index.repeat_interleave(self.groups)


@dataclass(frozen=True)
class SampleStep:
    """The samples of the micro-batches of the next ``Step``, where they are known one by one.

    Attributes:
        columns: What the columns are.
        mean: Means as d, shape (samples, columns).
        variance: Variances over (running variance + eps).
        batch_size: Samples of each micro-batch.
        replicates: The replicate of each micro-batch.
        positions: Position of each micro-batch among those of all processes.
    """

    columns: Columns
    mean: Tensor
    variance: Tensor
    batch_size: int
    replicates: Sequence[int]
    positions: Sequence[int]


@dataclass
class _State:
    """A tensor with an entry for each call, layer or channel: along the last axis for channels, else the first."""

    reduction: Reduction
    per: Per
    fill: float
    values: Tensor

    @property
    def axis(self) -> int:
        return -1 if self.per == "channel" else 0

    def grow(self, size: int) -> None:
        missing = size - self.values.shape[self.axis]
        if missing > 0:
            shape = list(self.values.shape)
            shape[self.axis] = missing
            self.values = torch.cat([self.values, self.values.new_full(shape, self.fill)], self.axis)

    def add(self, index: Tensor | None, values: Tensor) -> None:
        """Reduce ``values`` into the entries at ``index``, which may hold an entry several times; None: all entries."""
        values = values.to(self.values)
        if index is None:
            self.values = _COMBINE[self.reduction](self.values, values)
            return
        if self.reduction == "sum":
            self.values.index_add_(self.axis, index, values)
            return
        shape = [1] * values.dim()
        shape[self.axis] = -1
        how = "amin" if self.reduction == "min" else "amax"
        self.values.scatter_reduce_(self.axis % values.dim(), index.view(shape).expand_as(values), values, how)


_COMBINE: dict[Reduction, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


class Statistic:
    """What is gathered over micro-batches.

    A subclass names itself, declares its states in ``__init__``, adds to them in ``update`` with ``accumulate``, and
    turns those of one call or one layer into a result in ``compute``.

    Attributes:
        name: In ``STATISTICS``, and in the report.
        scopes: Where it is taken.
        reported: Its result stands in the report under its name.
    """

    name: ClassVar[str]
    scopes: ClassVar[frozenset[Scope]] = frozenset({"train", "steady", "eval", "held-out"})
    reported: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        """``seed``: for statistics that draw at random."""
        self._states: dict[str, _State] = {}

    def declare(
        self,
        name: str,
        reduction: Reduction,
        per: Per = "call",
        shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float64,
        empty: float | None = None,
    ) -> None:
        """Declare a state.

        Args:
            shape: Of one entry; states per channel have shape (*shape, channels), others (entries, *shape).
            empty: An entry to which nothing was added; None: 0 for sums, infinity for extremes.
        """
        infinite = {"sum": 0.0, "min": torch.inf, "max": -torch.inf}
        values = torch.zeros((*shape, 0) if per == "channel" else (0, *shape), dtype=dtype)
        self._states[name] = _State(reduction, per, infinite[reduction] if empty is None else empty, values)

    def __getitem__(self, name: str) -> Tensor:
        """A state."""
        return self._states[name].values

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states."""
        return tuple(self._states)

    def accumulate(self, name: str, index: Tensor | None, values: Tensor) -> None:
        """Reduce values into the entries of a state at ``index``: ``call``, ``layer`` or ``channel`` of the columns."""
        self._states[name].add(index, values)

    def update(self, step: Step) -> None:
        """Add a step; there is room for its calls."""

    def update_samples(self, step: SampleStep) -> None:
        """Add the samples of the micro-batches that ``update`` is called with next."""

    @property
    def takes_samples(self) -> bool:
        """Whether the statistic overrides ``update_samples``."""
        return type(self).update_samples is not Statistic.update_samples

    def compute(self, states: Mapping[str, Tensor]) -> Any:
        """The result, from the entries of the states of one call, or of several taken together.

        Where it stands in the report, it is what JSON can hold: finite numbers, strings, lists or dictionaries of them;
        None for what does not exist.
        """
        raise NotImplementedError

    def of(self, table: CallTable, slots: Sequence[Slot]) -> Any:
        """``compute`` for calls of one layer together; None if none of them was seen."""
        known = [slot for slot in slots if slot in table.calls]
        if not known:
            return None
        found = {}
        for name, state in self._states.items():
            parts = [state.values.movedim(state.axis, 0)[table.entries(state.per, slot)] for slot in known]
            if state.per == "layer":
                parts = parts[:1]
            entry = reduce(_COMBINE[state.reduction], parts)
            found[name] = (entry.movedim(0, -1) if state.per == "channel" else entry[0]).cpu()
        return self.compute(found)

    def grow(self, table: CallTable, device: torch.device | None = None) -> None:
        """Make room for all calls of a table, on a device; None: where the states are."""
        for state in self._states.values():
            state.values = state.values.to(device)
            state.grow(table.sizes()[state.per])

    def merge(self, other: Statistic, table: CallTable, other_table: CallTable) -> None:
        """Add what was gathered elsewhere; there is room for its calls. Both are on the host."""
        indices: dict[Per, list[int]] = {
            "call": [table.calls[slot] for slot in other_table.calls],
            "layer": [table.layers[index] for index in other_table.layers],
            "channel": table.columns(other_table.channels),
        }
        for name, state in self._states.items():
            if other[name].numel():
                state.add(torch.tensor(indices[state.per]), other[name])

    def on_host(self: S) -> S:
        """The same in host memory."""
        found = copy.copy(self)
        found._states = {name: replace(state, values=state.values.cpu()) for name, state in self._states.items()}
        return found


class Mismatch(Statistic):
    """D of each call: mean over channels, and over the groups of a micro-batch.

    ``first_bad`` is the step in which a non-finite value was first seen.
    """

    name = "mismatch"
    scopes = frozenset({"train", "steady", "eval", "held-out", "other sizes"})
    reported = False
    never: ClassVar[int] = torch.iinfo(torch.int64).max

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        for state in _POWERS:
            self.declare(state, "sum")
        self.declare("first_bad", "min", dtype=torch.int64, empty=self.never)

    def update(self, step: Step) -> None:
        per_call, call = step.per_call(step.values.mismatch), step.columns.call
        for state, values in zip(_POWERS, _powers(per_call), strict=True):
            self.accumulate(state, call, values)
        good = torch.isfinite(per_call).all(0)
        self.accumulate("first_bad", call, torch.full_like(call, step.number).masked_fill(good, self.never))

    def compute(self, states: Mapping[str, Tensor]) -> tuple[Sums, int | None]:
        """The sums, and the step of the first non-finite value, None if all are finite."""
        bad = int(states["first_bad"])
        return _sums(states), None if bad == self.never else bad


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
        for state in (*_POWERS, *_PARTS):
            self.declare(state, "sum", per="layer")

    def update(self, step: Step) -> None:
        per_layer = step.columns.per_layer(step.per_call(step.values.mismatch))
        for state, values in zip(_POWERS, _powers(per_layer), strict=True):
            self.accumulate(state, step.columns.layer, values)

    def update_samples(self, step: SampleStep) -> None:
        columns, squares = step.columns, step.mean.square()
        rho = columns.variance / (columns.variance + columns.eps)
        parts = squares + rho / 4 * (step.variance + squares - rho).square()
        per_layer = columns.per_layer(columns.per_call(parts)) / step.batch_size**2
        for state, values in zip(_PARTS, _powers(per_layer), strict=True):
            self.accumulate(state, columns.layer, values)

    def compute(self, states: Mapping[str, Tensor]) -> Sums:
        parts = _sums(states, _PARTS)
        return replace(_sums(states), parts=parts if parts.count else None)


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


class CorrectionValues(Statistic):
    """Moments, extremes, histogram and clipped count of r or d, over channels and groups."""

    reported = False
    scopes = Mismatch.scopes
    axis: ClassVar[Axis]

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        for state in ("count", "total", "square", "clipped"):
            self.declare(state, "sum")
        self.declare("low", "min")
        self.declare("high", "max")
        self.declare("histogram", "sum", shape=(self.axis.bins,), dtype=torch.int64)

    def add(self, columns: Columns, values: Tensor, clipped: Tensor) -> None:
        """Add values of shape (groups, columns)."""
        call = columns.call[columns.call_of_column]
        self.accumulate("count", call, torch.full_like(values[0], values.shape[0]))
        self.accumulate("total", call, values.sum(0))
        self.accumulate("square", call, values.square().sum(0))
        self.accumulate("clipped", call, clipped.sum(0, dtype=torch.float64))
        self.accumulate("low", call, values.amin(0))
        self.accumulate("high", call, values.amax(0))
        bins = (self.axis.index(values) + call * self.axis.bins).flatten()
        self["histogram"].view(-1).index_add_(0, bins, torch.ones_like(bins))

    def compute(self, states: Mapping[str, Tensor]) -> Values:
        scalars = {name: float(value) for name, value in states.items() if name != "histogram"}
        return Values(**scalars, histogram=states["histogram"].numpy())


class CorrectionR(CorrectionValues):
    """r, and how often Batch Renorm's usual limit would clip it."""

    name = "r"
    axis = R_AXIS

    def update(self, step: Step) -> None:
        r = step.values.r
        self.add(step.columns, r, (r > R_MAX) | (r < 1 / R_MAX))


class CorrectionD(CorrectionValues):
    """d, and how often Batch Renorm's usual limit would clip it."""

    name = "d"
    axis = D_AXIS

    def update(self, step: Step) -> None:
        d = step.values.d
        self.add(step.columns, d, d.abs() > D_MAX)


class MismatchSums(Statistic):
    """Sums per replicate and channel, from which the mismatch is known against any other statistics.

    Micro-batches are added in turn to the replicates (see ``stats.intervals``).
    """

    name = "batch moments"
    reported = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.declare("counts", "sum", shape=(REPLICATES,))
        self.declare("eps", "max", per="channel", empty=0.0)
        for state in (*SUMS, "sample squares"):
            self.declare(state, "sum", per="channel", shape=(REPLICATES,))

    def update(self, step: Step) -> None:
        columns, replicate = step.columns, step.replicate_of_row
        counts = step.groups * torch.bincount(torch.tensor(step.replicates), minlength=REPLICATES)
        self.accumulate("counts", columns.call, counts.expand(columns.call.numel(), -1))
        self.accumulate("eps", columns.channel, columns.eps / (columns.variance + columns.eps))
        for name, summand in summands(step.values, columns.bessel).items():
            self._add_rows(name, columns, replicate, summand)

    def update_samples(self, step: SampleStep) -> None:
        squares = step.mean.square().unflatten(0, (-1, step.batch_size)).sum(1)
        index = torch.tensor(step.replicates, device=squares.device)
        self._add_rows("sample squares", step.columns, index, squares)

    def compute(self, states: Mapping[str, Tensor]) -> tuple[BatchSums, Tensor]:
        """The sums, and the squared means of samples (as d) summed, shape (replicates, channels)."""
        sums = {name: states[name] for name in SUMS}
        return BatchSums(counts=states["counts"], eps=states["eps"], **sums), states["sample squares"]

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
        slots: The calls, as in the first step.
        number: Position of the sample in each place among all samples measured; -1: the place is free.
        replicate: The replicate of its micro-batch.
        mean, variance: As in ``stats.composition.Images``, shape (places, columns); the mean from ``origin``.
        origin: Shape (columns,), float64.
    """

    name = "sample pool"
    scopes = frozenset({"eval"})
    reported = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.slots: Calls = ()
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
        places = torch.tensor(list(chosen), device=step.mean.device)
        rows = torch.tensor(list(chosen.values()), device=step.mean.device)
        for place, row in chosen.items():
            self.replicate[place], self.number[place] = step.replicates[row // size], numbers[row]
        self.mean[places] = (step.mean[rows] - self.origin).float()
        self.variance[places] = step.variance[rows].float()

    def merge(self, other: Statistic, table: CallTable, other_table: CallTable) -> None:
        """Where two processes fill the same place, keep the later sample."""
        assert isinstance(other, SamplePool)
        if not self.number:
            self.__dict__ |= other.__dict__
        if not other.number or other.slots != self.slots:
            return
        for place, number in enumerate(other.number):
            if number > self.number[place]:
                self.number[place], self.replicate[place] = number, other.replicate[place]
                self.mean[place] = (other.mean[place] + (other.origin - self.origin)).float()
                self.variance[place] = other.variance[place]

    def on_host(self) -> SamplePool:
        found = copy.copy(self)
        found.origin, found.mean, found.variance = self.origin.cpu(), self.mean.cpu(), self.variance.cpu()
        return found

    def samples(self, table: CallTable) -> dict[Slot, Images]:
        """The samples of each call; empty if samples could not be told apart."""
        if not self.slots:
            return {}
        held = torch.tensor([place for place, number in enumerate(self.number) if number >= 0], dtype=torch.int64)
        replicate = torch.tensor(self.replicate)[held]
        widths = [stop - start for start, stop in (table.channels[slot] for slot in self.slots)]
        parts = zip(self.slots, self.mean[held].split(widths, 1), self.variance[held].split(widths, 1), strict=True)
        return {slot: Images(mean, variance, replicate) for slot, mean, variance in parts}

    def origins(self, table: CallTable) -> dict[Slot, Tensor]:
        """For each call the mean (as d) that ``Images.mean`` is counted from, float64."""
        widths = [stop - start for start, stop in (table.channels[slot] for slot in self.slots)]
        return dict(zip(self.slots, self.origin.split(widths), strict=True)) if self.slots else {}

    @property
    def bytes(self) -> int:
        """Size of the moments of the samples that are held."""
        held = sum(number >= 0 for number in self.number)
        return 2 * held * self.mean.shape[1] * self.mean.element_size()

    def _start(self, step: SampleStep) -> None:
        columns = step.mean.shape[1]
        room = max(1, min(POOL_SAMPLES, POOL_BYTES // (8 * columns)))
        self.slots = step.columns.slots
        self.origin = step.mean.mean(0)
        self.mean = step.mean.new_zeros(room, columns, dtype=torch.float32)
        self.variance = torch.zeros_like(self.mean)
        self.replicate, self.number = [0] * room, [-1] * room

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


_POWERS = ("count", "total", "square", "cube")
_PARTS = ("samples", "sample total", "sample square", "sample cube")


def _powers(rows: Tensor) -> tuple[Tensor, ...]:
    """Sums over rows of the powers 0 to 3."""
    squares = rows.square()
    return torch.full_like(rows[0], rows.shape[0]), rows.sum(0), squares.sum(0), (squares * rows).sum(0)


def _sums(states: Mapping[str, Tensor], names: Sequence[str] = _POWERS) -> Sums:
    count, total, square, cube = (float(states[name]) for name in names)
    return Sums(int(count), total, square, cube)


def _side_by_side(buffers: Sequence[Tensor | None], device: torch.device) -> Tensor:
    return torch.cat([buffer.to(device, torch.float64) for buffer in buffers if buffer is not None])
