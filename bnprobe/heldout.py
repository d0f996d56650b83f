"""Held-out data: kept in memory, so that every score is of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bnprobe.errors import DataError, UsageError
from bnprobe.loading.data import BatchSource, load_evaluation
from bnprobe.loading.spread import spread
from bnprobe.loading.workload import Workload
from bnprobe.probing.batch import count_images, tensors_of
from bnprobe.probing.session import autocast_dtype, device_named
from bnprobe.records import Score
from bnprobe.spec import Spec
from bnprobe.training import evaluate
from bnprobe.usercode import BatchFunction

BATCH = 64
"""Images at once where held-out data is scored: inference does not depend on it."""

FEWEST_BATCHES = 16
"""Batches that held-out data should make at least: one half of them chooses weights, the other scores."""

MOST_BYTES = 2**30
"""No more than this of the data is kept."""


@dataclass(frozen=True)
class HeldOut:
    """Batches that no training sees, and what scores a model on them.

    Attributes:
        batches: On the host, in random order as far as the loader allows; none where there is nothing to score with.
        loss, metric: The user's functions.
        notes: What was left out, a sentence each.
    """

    batches: Sequence[Any]
    loss: BatchFunction | None
    metric: BatchFunction | None
    device: torch.device
    autocast: torch.dtype | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: Spec, workload: Workload) -> HeldOut:
        """Read a workload's evaluation data.

        Raises:
            DataError, UserCodeError: The loader raised, or gave nothing.
        """
        device = device_named(spec.scan.device, workload.model)
        autocast = autocast_dtype(spec.scan.autocast)
        batches, notes = _read(spec, workload)
        return cls(batches, workload.loss, workload.metric, device, autocast, tuple(notes))

    @property
    def images(self) -> int:
        """Images in the batches; a batch without tensors counts as one."""
        return sum(count_images(batch) or 1 for batch in self.batches)

    def score(self, model: nn.Module) -> Score:
        """Loss and metric at inference, weighted by images."""
        return evaluate(model, self.batches, self.loss, self.metric, self.device, self.autocast)

    def scores(self, model: nn.Module) -> list[Score]:
        """``score`` of every batch by itself."""
        return [replace(self, batches=[batch]).score(model) for batch in self.batches]

    def mean(self, values: Sequence[float | None]) -> float | None:
        """Mean of a value for each batch, weighted by images; None if one is missing."""
        known = [value for value in values if value is not None]
        weights = [count_images(batch) or 1 for batch in self.batches]
        if len(known) < len(weights):
            return None
        return sum(weight * value for weight, value in zip(weights, known, strict=True)) / sum(weights)

    def halves(self) -> tuple[HeldOut, HeldOut]:
        """Every other batch, and the rest; the second half is empty if there is but one."""
        return replace(self, batches=self.batches[::2]), replace(self, batches=self.batches[1::2])


def _read(spec: Spec, workload: Workload) -> tuple[list[Any], list[str]]:
    """The batches, and what was left out."""
    if workload.evaluation is None or (workload.loss is None and workload.metric is None):
        return [], []
    source = spread(_large_batches(spec, workload, workload.evaluation), spec.data.seed, mixed=True)
    batches: list[Any] = []
    held = 0
    for batch in source.batches:
        held += sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))
        batches.append(batch)
        if source.most is not None and len(batches) == source.most:
            break
        if held > MOST_BYTES:
            return batches, [f"Held-out data beyond the first {len(batches)} batches (1 GiB) was not used."]
    if not batches:
        raise DataError(f"{source.description} gave no held-out batch.")
    return batches, []


def _large_batches(spec: Spec, workload: Workload, evaluation: BatchSource) -> BatchSource:
    """The same data in larger batches, where the user fixed neither size nor number and the loader can give them."""
    fixed = spec.eval_data.batch_size is not None or spec.eval_data.batches is not None
    size = min(BATCH, (evaluation.images or BATCH * FEWEST_BATCHES) // FEWEST_BATCHES)
    if fixed or evaluation.batch_size >= size:
        return evaluation
    try:
        return load_evaluation(spec.eval_data, workload.module, size) or evaluation
    except (DataError, UsageError):
        return evaluation
