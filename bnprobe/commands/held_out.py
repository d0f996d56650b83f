"""The held-out batches on which repairs are chosen and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bnprobe.config.spec import Spec
from bnprobe.errors import DataError
from bnprobe.loading.data import BatchSource
from bnprobe.loading.model import BatchFunction
from bnprobe.loading.order import spread
from bnprobe.loading.samples import count_samples
from bnprobe.loading.workload import Workload
from bnprobe.measure.batch import CannotEmulateError, join, tensors_of
from bnprobe.measure.session import autocast_dtype, device_named
from bnprobe.records import Score
from bnprobe.training import evaluate

BATCH = 64
"""Samples scored at once; inference does not depend on this number."""

FEWEST_BATCHES = 16
"""Batches that the held-out data should give at least: half of them choose the weights, the others score."""

MOST_BYTES = 2**30
"""Upper limit on the memory for held-out data, in bytes."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out batches, and the functions that score a model on them.

    Attributes:
        batches: Batches on the host, in random order as far as the loader allows; empty if there is nothing to score.
        loss, metric: The user's functions.
        notes: What was left out, one sentence each.
        samples_in: Tells how many samples a batch has.
    """

    batches: Sequence[Any]
    loss: BatchFunction | None
    metric: BatchFunction | None
    device: torch.device
    autocast: torch.dtype | None
    notes: tuple[str, ...] = ()
    samples_in: Callable[[Any], int | None] = count_samples

    @classmethod
    def of(cls, spec: Spec, workload: Workload) -> HeldOut:
        """Read the held-out data of a workload.

        Raises:
            DataError, UserCodeError: The loader raised or yielded nothing.
        """
        device = device_named(spec.scan.device, workload.model)
        autocast = autocast_dtype(spec.scan.autocast)
        batches, notes = _read(spec, workload)
        samples_in = getattr(workload.held_out and workload.held_out.batches, "samples_in", count_samples)
        return cls(batches, workload.loss, workload.metric, device, autocast, tuple(notes), samples_in)

    @property
    def images(self) -> int:
        """Number of samples; a batch without tensors counts as one."""
        return sum(self.samples_in(batch) or 1 for batch in self.batches)

    def score(self, model: nn.Module) -> Score:
        """Loss and metric at inference, weighted by samples."""
        return evaluate(model, self.batches, self.loss, self.metric, self.device, self.autocast, self.samples_in)

    def scores(self, model: nn.Module) -> list[Score]:
        """The score of each batch."""
        return [replace(self, batches=[batch]).score(model) for batch in self.batches]

    def mean(self, values: Sequence[float | None]) -> float | None:
        """Mean of per-batch values, weighted by samples; None if one is missing."""
        known = [value for value in values if value is not None]
        weights = [self.samples_in(batch) or 1 for batch in self.batches]
        if len(known) < len(weights):
            return None
        return sum(weight * value for weight, value in zip(weights, known, strict=True)) / sum(weights)

    def halves(self) -> tuple[HeldOut, HeldOut]:
        """Split into every other batch and the rest; the second half is empty if there is only one batch."""
        return replace(self, batches=self.batches[::2]), replace(self, batches=self.batches[1::2])


def _read(spec: Spec, workload: Workload) -> tuple[list[Any], list[str]]:
    """The batches, and what was left out."""
    if workload.held_out is None or (workload.loss is None and workload.metric is None):
        return [], []
    source = spread(workload.held_out, spec.data.seed, mixed=True)
    batches: list[Any] = []
    held = 0
    for batch in source.batches:
        held += sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))
        batches.append(batch)
        if source.most is not None and len(batches) == source.most:
            break
        if held > MOST_BYTES:
            return batches, [f"Only the first {len(batches)} batches (1 GiB) of the held-out data were used."]
    if not batches:
        raise DataError(f"{source.description} yielded no held-out batch.")
    fixed = spec.eval_data.batch_size is not None or spec.eval_data.batches is not None
    return batches if fixed else _larger(batches, source), []


def _larger(batches: list[Any], source: BatchSource) -> list[Any]:
    """The same samples in larger batches, where all batches can be joined: a few large ones are scored faster."""
    sizes = [getattr(source.batches, "samples_in", count_samples)(batch) for batch in batches]
    wanted = min(BATCH, sum(size or 0 for size in sizes) // FEWEST_BATCHES)
    factor = wanted // max(source.batch_size, 1)
    if factor < 2:
        return batches
    starts = range(0, len(batches), factor)
    try:
        return [join(batches[start : start + factor], sizes[start : start + factor]) for start in starts]
    except CannotEmulateError:
        return batches
