"""Sums over micro-batches, kept on the device: any number of batches in constant memory, one transfer at the end.

The channels of all layers lie side by side, so that a step costs a few dozen kernels, not a few dozen per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnprobe.probing.intercept import Recorded, Slot
from bnprobe.probing.layers import ProbedLayer
from bnprobe.stats.histogram import D_AXIS, R_AXIS, Axis
from bnprobe.stats.mismatch import corrections
from bnprobe.stats.moments import pool_moments
from bnprobe.stats.theory import D_MAX, R_MAX

_CHUNK_VALUES = 2**19
"""Values per temporary: bounds the memory of a step whatever the number of channels and images."""


@dataclass(frozen=True)
class Columns:
    """The channels of several calls, side by side.

    Attributes:
        slots: The calls, in column order.
        slot: Position in ``slots`` of each column, shape (columns,).
        mean, variance, eps: The layers' running statistics and eps, float64, shape (columns,).
        channels: Channels per slot, shape (slots,).
        layer: Index of the layer of each slot, shape (slots,).
    """

    slots: tuple[Slot, ...]
    slot: Tensor
    mean: Tensor
    variance: Tensor
    eps: Tensor
    channels: Tensor
    layer: Tensor

    @classmethod
    def of(cls, layers: Sequence[ProbedLayer], slots: tuple[Slot, ...], device: torch.device) -> Columns:
        """Gather the reference statistics of ``slots``; every layer named there keeps running statistics."""
        infos = [layers[index].info for index, _ in slots]
        sizes = torch.tensor([info.channels for info in infos])
        eps = torch.tensor([info.eps for info in infos], dtype=torch.float64)
        return cls(
            slots=slots,
            slot=torch.arange(len(slots)).repeat_interleave(sizes).to(device),
            mean=_side_by_side([info.running_mean for info in infos], device),
            variance=_side_by_side([info.running_variance for info in infos], device),
            eps=eps.repeat_interleave(sizes).to(device),
            channels=sizes.to(device),
            layer=torch.tensor([index for index, _ in slots], device=device),
        )


class ValueSums:
    """Moments, extremes, histogram and clipped count of r or d, per slot."""

    def __init__(self, slots: int, axis: Axis, device: torch.device) -> None:
        self.axis = axis
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        self.count, self.total, self.square, self.clipped = zeros, zeros.clone(), zeros.clone(), zeros.clone()
        self.low, self.high = torch.full_like(zeros, torch.inf), torch.full_like(zeros, -torch.inf)
        self.histogram = torch.zeros(slots * axis.bins, dtype=torch.int64, device=device)

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


class PathSums:
    """r, d and D of every call on one path at one batch size.

    Attributes:
        batches: Micro-batches added.
        count, total, square: Per slot: micro-batches, and sum and sum of squares of D (mean over channels).
        layer_count, layer_total, layer_square: The same per layer, calls of one micro-batch averaged first.
        first_bad: Per slot: the step in which a non-finite value was first seen, or -1.
    """

    def __init__(self, layers: Sequence[ProbedLayer], slots: tuple[Slot, ...], device: torch.device) -> None:
        self.columns = Columns.of(layers, slots, device)
        self.batches = self.steps = 0
        slot_zeros = torch.zeros(len(slots), dtype=torch.float64, device=device)
        layer_zeros = torch.zeros(len(layers), dtype=torch.float64, device=device)
        self.count, self.total, self.square = slot_zeros, slot_zeros.clone(), slot_zeros.clone()
        self.layer_count, self.layer_total, self.layer_square = (
            layer_zeros,
            layer_zeros.clone(),
            layer_zeros.clone(),
        )
        self.first_bad = torch.full_like(slot_zeros, -1, dtype=torch.int64)
        self.r, self.d = ValueSums(len(slots), R_AXIS, device), ValueSums(len(slots), D_AXIS, device)

    def add(self, mean: Tensor, variance: Tensor) -> None:
        """Add micro-batch statistics of shape (batches, columns), float64, variance biased."""
        columns = self.columns
        for means, variances in _row_chunks(mean, variance):
            values = corrections(means, variances, columns.mean, columns.variance, columns.eps)
            self._add_mismatch(values.mismatch)
            self.r.add(values.r, (values.r > R_MAX) | (values.r < 1 / R_MAX), columns.slot)
            self.d.add(values.d, values.d.abs() > D_MAX, columns.slot)
        self.batches += mean.shape[0]
        self.steps += 1

    def _add_mismatch(self, mismatch: Tensor) -> None:
        columns, rows = self.columns, mismatch.shape[0]
        per_slot = mismatch.new_zeros(rows, len(columns.slots)).index_add_(1, columns.slot, mismatch)
        per_slot /= columns.channels
        self.count += rows
        self.total += per_slot.sum(0)
        self.square += per_slot.square().sum(0)
        bad = ~torch.isfinite(per_slot).all(0) & (self.first_bad < 0)
        self.first_bad.masked_fill_(bad, self.steps)
        layers = self.layer_count.numel()
        calls = torch.zeros_like(self.layer_count).index_add_(0, columns.layer, torch.ones_like(self.count))
        per_layer = mismatch.new_zeros(rows, layers).index_add_(1, columns.layer, per_slot) / calls.clamp(min=1)
        self.layer_count += rows * (calls > 0)
        self.layer_total += per_layer.sum(0)
        self.layer_square += per_layer.square().sum(0)


class Path:
    """Sums of one path at one batch size, for whatever calls the forward passes make.

    Steps that make the same calls share one set of sums. A forward pass whose calls vary with the batch gives one
    set per variant; they are merged at the end.

    Args:
        layers: All probed layers.
        batch_size: Images per micro-batch.
    """

    def __init__(self, layers: Sequence[ProbedLayer], batch_size: int) -> None:
        self.layers = layers
        self.batch_size = batch_size
        self.variants: dict[tuple[Slot, ...], PathSums] = {}
        self._remainders: dict[tuple[Slot, ...], tuple[Tensor, Tensor]] = {}

    def add(self, records: Mapping[Slot, Recorded]) -> None:
        """Add one step. All records have the same unit: images, or micro-batches of ``batch_size``."""
        if not records:
            return
        slots = tuple(records)
        mean = torch.cat([record.mean for record in records.values()], 1)
        variance = torch.cat([record.variance for record in records.values()], 1)
        if slots not in self.variants:
            self.variants[slots] = PathSums(self.layers, slots, mean.device)
        unit = next(iter(records.values())).unit
        if unit == self.batch_size:
            self.variants[slots].add(mean, variance)
        else:
            self._add_images(slots, mean, variance)

    def _add_images(self, slots: tuple[Slot, ...], mean: Tensor, variance: Tensor) -> None:
        """Pool consecutive images; what does not fill a micro-batch waits for the next step."""
        if slots in self._remainders:
            old_mean, old_variance = self._remainders.pop(slots)
            mean, variance = torch.cat([old_mean, mean]), torch.cat([old_variance, variance])
        whole = mean.shape[0] // self.batch_size * self.batch_size
        if whole < mean.shape[0]:
            self._remainders[slots] = mean[whole:].clone(), variance[whole:].clone()
        if whole:
            self.variants[slots].add(*pool_moments(mean[:whole], variance[:whole], self.batch_size))


def _row_chunks(mean: Tensor, variance: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK_VALUES // mean.shape[1])
    return list(zip(mean.split(rows), variance.split(rows), strict=True))


def _side_by_side(buffers: Sequence[Tensor | None], device: torch.device) -> Tensor:
    return torch.cat([buffer.to(device, torch.float64) for buffer in buffers if buffer is not None])
