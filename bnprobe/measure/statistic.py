"""What a statistic over micro-batches is: any number of them in constant memory, on the device until the end.

A statistic is one class. It declares its states once, with the reduction that adds new values to them (sum, min, max);
from that follow how states grow when a call is first seen, how those of two processes are merged, and how the calls of
a layer are taken together. ``update`` adds a step, ``compute`` says what comes of it. The statistics of a scan are in
``measure.accumulators``.

The channels of all calls lie side by side, so that a step costs a few dozen kernels, not a few dozen per layer.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from bnprobe.measure.forward_pass import Slot
from bnprobe.measure.layers import ProbedLayer
from bnprobe.stats.moments import Corrections, bessel
from bnprobe.stats.segments import Segments

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
        _, columns = next(reversed(self.channels.values()), (0, 0))
        return {"call": len(self.calls), "layer": len(self.layers), "channel": columns}

    def columns(self, slots: Iterable[Slot]) -> list[int]:
        """Positions of the channels of calls."""
        return [column for slot in slots for column in range(*self.channels[slot])]

    def place(self, slots: Sequence[Slot]) -> slice | Tensor:
        """Where the channels of calls stand, one call after the other: a slice where they do so in the states."""
        spans = [self.channels[slot] for slot in slots]
        if all(stop == start for (_, stop), (start, _) in itertools.pairwise(spans)):
            return slice(spans[0][0], spans[-1][1])
        return torch.tensor(self.columns(slots))

    def segments(self, slots: Sequence[Slot]) -> Segments:
        """Which of the channels of calls that lie side by side are those of which call."""
        spans = (self.channels[slot] for slot in slots)
        return Segments(torch.tensor([stop - start for start, stop in spans]))

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
        r_max, d_max, gate: Of the layers' own correction, shape (columns,); 1, 0 and 0 for BN. None: BN everywhere.
        bessel: n / (n - 1) for the n values per channel of a group, shape (columns,); 1 where n is 1.
        factor: The same where the layer normalizes with the unbiased variance of its batch, else 1; None: 1 everywhere.
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
    r_max: Tensor | None
    d_max: Tensor | None
    gate: Tensor | None
    bessel: Tensor
    factor: Tensor | None

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
        unbiased = [bessel(n) for n in values.values()]
        gates = [torch.zeros(info.channels) if info.gate is None else info.gate for info in infos]

        def unless(usual: float, numbers: Sequence[float]) -> Tensor | None:
            return None if all(number == usual for number in numbers) else _spread(numbers, sizes, device)

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
            std_eps=unless(0.0, [info.std_eps for info in infos]),
            r_max=unless(1.0, [info.r_max for info in infos]),
            d_max=unless(0.0, [info.d_max for info in infos]),
            gate=None if all(info.gate is None for info in infos) else _side_by_side(gates, device),
            bessel=_spread(unbiased, sizes, device),
            factor=unless(1.0, [n if info.unbiased else 1.0 for n, info in zip(unbiased, infos, strict=True)]),
        )

    @cached_property
    def state_of_column(self) -> Tensor:
        """For each column the position of its call in the states, shape (columns,)."""
        return self.call[self.call_of_column]

    @cached_property
    def segments(self) -> Segments:
        """Which columns are those of which call, in host memory."""
        return Segments(self.channels.cpu())

    @cached_property
    def square_std(self) -> Tensor:
        """Running variance plus eps, shape (columns,)."""
        return self.variance + self.eps

    @cached_property
    def relative_eps(self) -> Tensor:
        """Eps over (running variance + eps), shape (columns,)."""
        return self.eps / self.square_std

    def per_call(self, values: Tensor) -> Tensor:
        """Mean over the channels of each call, shape (rows, calls); of float32 or float64."""
        if values.device.type == "cpu":
            return self.segments.mean(values)
        total = values.new_zeros(values.shape[0], len(self.slots)).index_add_(1, self.call_of_column, values)
        return total / self.channels

    def per_layer(self, per_call: Tensor) -> Tensor:
        """Mean over the calls of each layer, shape (rows, layers)."""
        if len(self.slots) == self.layer.numel():
            return per_call  # of one call each
        total = per_call.new_zeros(per_call.shape[0], self.layer.numel())
        return total.index_add_(1, self.layer_of_call, per_call) / self.calls_of_layer


@dataclass(frozen=True)
class Step:
    """Micro-batches to be added.

    Attributes:
        columns: What the columns of ``values`` are.
        values: r, d, D and the like of each group, shape (micro-batches * groups, columns).
        groups: Groups of rows that a micro-batch divides into: 1 but for norm families that group rows themselves.
        numbers: Of the physical batch that each micro-batch ended in, from 0.
        replicates: The replicate of each micro-batch (see ``stats.intervals``).
    """

    columns: Columns
    values: Corrections
    groups: int
    numbers: Sequence[int]
    replicates: Sequence[int]

    def per_call(self, values: Tensor) -> Tensor:
        """Mean over the channels of each call and the groups of each micro-batch, shape (micro-batches, calls)."""
        mean = self.columns.per_call(values)
        return mean if self.groups == 1 else mean.unflatten(0, (-1, self.groups)).mean(1)

    @cached_property
    def mismatch_of_call(self) -> Tensor:
        """D of each call, shape (micro-batches, calls)."""
        return self.per_call(self.values.mismatch)

    @cached_property
    def replicate_of_row(self) -> Tensor:
        """The replicate of each row of ``values``."""
        index = sent(self.replicates, self.values.r.device)
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

    @cached_property
    def squares(self) -> Tensor:
        """The squared means, shape (samples, columns)."""
        return self.mean.square()


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
            slots = known[:1] if state.per == "layer" else known
            parts = [state.values[state.entry(table.entries(state.per, slot))] for slot in slots]
            found[name] = reduce(_COMBINE[state.reduction], parts).cpu()
        return self.compute(found)

    def grow(self, table: CallTable, device: torch.device | None = None) -> None:
        """Make room for all calls of a table, on a device; None: where the states are."""
        for state in self._states.values():
            state.values = state.values.to(device)
            state.grow(table.sizes()[state.per])

    def merge(self, other: Statistic, table: CallTable, other_table: CallTable) -> None:
        """Add what was gathered elsewhere; there is room for its calls. Both are on the host."""
        places: dict[Per, Tensor] = {}  # none: all, in their order
        if table != other_table:
            places = {
                "call": torch.tensor([table.calls[slot] for slot in other_table.calls]),
                "layer": torch.tensor([table.layers[index] for index in other_table.layers]),
                "channel": torch.tensor(table.columns(other_table.channels)),
            }
        for name, state in self._states.items():
            if other[name].numel():
                state.add(places.get(state.per), other[name])

    def on_host(self: S) -> S:
        """The same in host memory."""
        found = copy.copy(self)
        found._states = {name: replace(state, values=state.values.cpu()) for name, state in self._states.items()}
        return found


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

    def entry(self, entries: slice) -> Any:
        """The index of the channels of a call, or of its one entry, or its layer's."""
        return (..., entries) if self.per == "channel" else entries.start

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
        if values.dim() > 1:
            shape = [1] * values.dim()
            shape[self.axis] = -1
            index = index.view(shape).expand_as(values)
        how = "amin" if self.reduction == "min" else "amax"
        self.values.scatter_reduce_(self.axis % values.dim(), index, values, how)


_COMBINE: dict[Reduction, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


def sent(numbers: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host on a device, which the host does not wait for."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def _spread(numbers: Sequence[float], sizes: Tensor, device: torch.device) -> Tensor:
    """A number of each call for each of its channels, float64."""
    return torch.tensor(numbers, dtype=torch.float64).repeat_interleave(sizes).to(device)


def _side_by_side(buffers: Sequence[Tensor | None], device: torch.device) -> Tensor:
    return torch.cat([buffer.to(device, torch.float64) for buffer in buffers if buffer is not None])
