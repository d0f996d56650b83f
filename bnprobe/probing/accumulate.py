"""Sums over micro-batches, kept on the device: any number of batches in constant memory, one transfer at the end.

The channels of all layers lie side by side, so that a step costs a few dozen kernels, not a few dozen per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnprobe.norms import NormInfo
from bnprobe.probing.intercept import Recorded, Slot
from bnprobe.probing.layers import ProbedLayer
from bnprobe.probing.replicates import ImagePool, ReplicateSums
from bnprobe.stats.histogram import D_AXIS, R_AXIS, Axis
from bnprobe.stats.mismatch import corrections
from bnprobe.stats.moments import pool_moments
from bnprobe.stats.theory import D_MAX, R_MAX

_CHUNK_VALUES = 2**19
"""Values per temporary: bounds the memory of a step whatever the number of channels and images."""


@dataclass(frozen=True)
class Columns:
    """The channels of the calls of one forward pass, side by side.

    Attributes:
        slot: For each column the position of its call in the sums, shape (columns,).
        mean, variance, eps: The layers' running statistics and eps, float64, shape (columns,).
        r_max, d_max, gate: Of the layers' own correction, shape (columns,); 1, 0 and 0 for BN.
        bessel: n / (n - 1) for the n values per channel of a micro-batch, shape (columns,); 1 where n is 1.
        present: Positions of the calls, shape (calls,).
        channels: Channels of each call, shape (calls,).
        layer: Index of the layer of each call, shape (calls,).
    """

    slot: Tensor
    mean: Tensor
    variance: Tensor
    eps: Tensor
    r_max: Tensor
    d_max: Tensor
    gate: Tensor
    bessel: Tensor
    present: Tensor
    channels: Tensor
    layer: Tensor

    @classmethod
    def of(
        cls,
        layers: Sequence[ProbedLayer],
        values: Mapping[Slot, int],
        positions: Mapping[Slot, int],
        device: torch.device,
    ) -> Columns:
        """Gather the reference statistics of calls; every layer named there keeps running statistics.

        Args:
            values: For each call its values per channel in a micro-batch.
        """
        slots = list(values)
        infos = [layers[index].info for index, _ in slots]
        sizes = torch.tensor([info.channels for info in infos])
        eps, r_max, d_max = (
            torch.tensor([getattr(info, name) for info in infos], dtype=torch.float64).repeat_interleave(sizes)
            for name in ("eps", "r_max", "d_max")
        )
        bessel = torch.tensor([n / (n - 1) if n > 1 else 1.0 for n in values.values()], dtype=torch.float64)
        present = torch.tensor([positions[slot] for slot in slots])
        return cls(
            slot=present.repeat_interleave(sizes).to(device),
            mean=_side_by_side([info.running_mean for info in infos], device),
            variance=_side_by_side([info.running_variance for info in infos], device),
            eps=eps.to(device),
            r_max=r_max.to(device),
            d_max=d_max.to(device),
            gate=_side_by_side([_gate(info) for info in infos], device),
            bessel=bessel.repeat_interleave(sizes).to(device),
            present=present.to(device),
            channels=sizes.to(device),
            layer=torch.tensor([index for index, _ in slots], device=device),
        )


class ValueSums:
    """Moments, extremes, histogram and clipped count of r or d, per call."""

    def __init__(self, axis: Axis, device: torch.device) -> None:
        self.axis = axis
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        self.count, self.total, self.square, self.clipped, self.low, self.high = (empty.clone() for _ in range(6))
        self.histogram = torch.zeros(0, dtype=torch.int64, device=device)

    def grow(self, calls: int) -> None:
        """Make room for ``calls`` calls."""
        for name in ("count", "total", "square", "clipped"):
            setattr(self, name, _grown(getattr(self, name), calls, 0.0))
        self.low = _grown(self.low, calls, torch.inf)
        self.high = _grown(self.high, calls, -torch.inf)
        self.histogram = _grown(self.histogram, calls * self.axis.bins, 0)

    def add(self, values: Tensor, clipped: Tensor, slot: Tensor) -> None:
        """Add values of shape (batches, columns); ``slot`` says whose each column is."""
        rows = values.shape[0]
        self.count.index_add_(0, slot, torch.full_like(values[0], rows))
        self.total.index_add_(0, slot, values.sum(0))
        self.square.index_add_(0, slot, values.square().sum(0))
        self.clipped.index_add_(0, slot, clipped.sum(0, dtype=torch.float64))
        self.low.scatter_reduce_(0, slot, values.amin(0), "amin")
        self.high.scatter_reduce_(0, slot, values.amax(0), "amax")
        bins = (self.axis.index(values) + slot * self.axis.bins).flatten()
        self.histogram.index_add_(0, bins, torch.ones_like(bins))


class Path:
    """Sums of r, d and D of every call on one path at one batch size, for whatever calls the forward passes make.

    Args:
        layers: All probed layers.
        batch_size: Images per micro-batch.
        replicates: Where to add sums per channel; None: only sums per call are kept.
        pool: Where to add images, where they are known.

    Attributes:
        positions: Position of each call in the sums, in the order in which the calls were first seen.
        batches, steps: Micro-batches and steps added.
        count, total, square: Per call: micro-batches, and sum and sum of squares of D (mean over channels).
        layer_count, layer_total, layer_square: The same per layer, calls of one micro-batch averaged first.
        first_bad: Per call: the step in which a non-finite value was first seen, or -1.
    """

    def __init__(
        self,
        layers: Sequence[ProbedLayer],
        batch_size: int,
        device: torch.device,
        replicates: ReplicateSums | None = None,
        pool: ImagePool | None = None,
    ) -> None:
        self.layers, self.batch_size, self._device = layers, batch_size, device
        self.replicates, self.pool = replicates, pool
        self.positions: dict[Slot, int] = {}
        self.batches = self.steps = 0
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        self.count, self.total, self.square = (empty.clone() for _ in range(3))
        self.first_bad = torch.zeros(0, dtype=torch.int64, device=device)
        zeros = torch.zeros(len(layers), dtype=torch.float64, device=device)
        self.layer_count, self.layer_total, self.layer_square = (zeros.clone() for _ in range(3))
        self.r, self.d = ValueSums(R_AXIS, device), ValueSums(D_AXIS, device)
        self._last: tuple[tuple[Slot, ...], Columns] | None = None
        self._remainder: tuple[tuple[Slot, ...], Tensor, Tensor] | None = None

    def add(self, records: Mapping[Slot, Recorded]) -> None:
        """Add one step. All records have the same unit: images, or micro-batches of ``batch_size``."""
        if not records:
            return
        slots = tuple(records)
        mean = torch.cat([record.mean for record in records.values()], 1)
        variance = torch.cat([record.variance for record in records.values()], 1)
        columns = self._columns(records)
        unit = next(iter(records.values())).unit
        if unit == 1 and self.replicates is not None:
            self._add_images(slots, columns, mean, variance, self.replicates)
        if unit != self.batch_size:
            mean, variance = self._whole_batches(slots, mean, variance)
        for means, variances in _row_chunks(mean, variance):
            reference = (columns.mean, columns.variance, columns.eps, columns.r_max, columns.d_max, columns.gate)
            values = corrections(means, variances, *reference)
            self._add_mismatch(columns, values.mismatch)
            self.r.add(values.r, (values.r > R_MAX) | (values.r < 1 / R_MAX), columns.slot)
            self.d.add(values.d, values.d.abs() > D_MAX, columns.slot)
            if self.replicates is not None:
                self.replicates.add(slots, values, columns.bessel)
        self.batches += mean.shape[0]
        self.steps += 1

    def _columns(self, records: Mapping[Slot, Recorded]) -> Columns:
        """Most models make the same calls in every pass: those of the last one are kept."""
        slots = tuple(records)
        if self._last is None or self._last[0] != slots:
            self._grow(slots)
            values = {slot: record.values for slot, record in records.items()}
            self._last = slots, Columns.of(self.layers, values, self.positions, self._device)
        return self._last[1]

    def _add_images(
        self, slots: tuple[Slot, ...], columns: Columns, mean: Tensor, variance: Tensor, replicates: ReplicateSums
    ) -> None:
        """Images that fill whole micro-batches, before these are added."""
        scale = columns.variance + columns.eps
        d = (mean - columns.mean) / scale.sqrt()
        replicates.add_images(slots, d, self.batch_size)
        if self.pool is not None:
            size, batches = self.batch_size, d.shape[0] // self.batch_size
            of_images = [replicate for replicate in replicates.next(batches) for _ in range(size)]
            numbers = [position * size + image for position in replicates.positions(batches) for image in range(size)]
            self.pool.add(slots, d, variance / scale, of_images, numbers)

    def _grow(self, slots: tuple[Slot, ...]) -> None:
        for slot in slots:
            self.positions.setdefault(slot, len(self.positions))
        calls = len(self.positions)
        for name in ("count", "total", "square"):
            setattr(self, name, _grown(getattr(self, name), calls, 0.0))
        self.first_bad = _grown(self.first_bad, calls, -1)
        self.r.grow(calls)
        self.d.grow(calls)

    def _whole_batches(self, slots: tuple[Slot, ...], mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Pool consecutive images; what does not fill a micro-batch waits for the next step with the same calls."""
        if self._remainder is not None and self._remainder[0] == slots:
            mean = torch.cat([self._remainder[1], mean])
            variance = torch.cat([self._remainder[2], variance])
        whole = mean.shape[0] // self.batch_size * self.batch_size
        self._remainder = (slots, mean[whole:].clone(), variance[whole:].clone())
        return pool_moments(mean[:whole], variance[:whole], self.batch_size)

    def _add_mismatch(self, columns: Columns, mismatch: Tensor) -> None:
        rows = mismatch.shape[0]
        every = mismatch.new_zeros(rows, len(self.positions)).index_add_(1, columns.slot, mismatch)
        per_call = every[:, columns.present] / columns.channels
        self.count.index_add_(0, columns.present, torch.full_like(per_call[0], rows))
        self.total.index_add_(0, columns.present, per_call.sum(0))
        self.square.index_add_(0, columns.present, per_call.square().sum(0))
        bad = torch.zeros_like(self.first_bad, dtype=torch.bool)
        bad[columns.present] = ~torch.isfinite(per_call).all(0)
        self.first_bad.masked_fill_(bad & (self.first_bad < 0), self.steps)
        calls = torch.zeros_like(self.layer_count).index_add_(0, columns.layer, torch.ones_like(per_call[0]))
        per_layer = mismatch.new_zeros(rows, len(self.layers)).index_add_(1, columns.layer, per_call)
        per_layer = per_layer / calls.clamp(min=1)
        self.layer_count += rows * (calls > 0)
        self.layer_total += per_layer.sum(0)
        self.layer_square += per_layer.square().sum(0)


def _gate(info: NormInfo) -> Tensor:
    return torch.zeros(info.channels) if info.gate is None else info.gate


def _grown(sums: Tensor, size: int, value: float) -> Tensor:
    return torch.cat([sums, sums.new_full((size - sums.numel(),), value)])


def _row_chunks(mean: Tensor, variance: Tensor) -> list[tuple[Tensor, Tensor]]:
    if not mean.shape[0]:
        return []
    rows = max(1, _CHUNK_VALUES // mean.shape[1])
    return list(zip(mean.split(rows), variance.split(rows), strict=True))


def _side_by_side(buffers: Sequence[Tensor | None], device: torch.device) -> Tensor:
    return torch.cat([buffer.to(device, torch.float64) for buffer in buffers if buffer is not None])
