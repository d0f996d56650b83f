"""The batches on which repairs are chosen and compared: held-out data, or without any some of the training data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from bnprobe.config.spec import Spec
from bnprobe.errors import DataError
from bnprobe.loading.arguments import device_named
from bnprobe.loading.data import BatchSource
from bnprobe.loading.model import BatchFunction
from bnprobe.loading.order import spread
from bnprobe.loading.samples import count_samples
from bnprobe.loading.workload import Workload, read_again
from bnprobe.measure.batch import CannotEmulateError, join, pick, tensors_of
from bnprobe.measure.extremes import is_ragged
from bnprobe.measure.reader import lasting
from bnprobe.measure.scores import ScoreTable, why_unscored
from bnprobe.measure.session import autocast_dtype
from bnprobe.numbers import count
from bnprobe.records import Measure, Score, leading
from bnprobe.training import evaluate, score_table

BATCH = 64
"""Samples scored at once; inference does not depend on this number."""

BATCHES_WANTED = 16
"""Batches that the held-out data should give at least: half of them choose the weights, the others score."""

MOST_BYTES = 2**30
"""Upper limit on the memory for held-out data, in bytes."""

TRAINING_SAMPLES = 1024
"""Training samples that models are compared on where there is no held-out data."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out batches, and the functions that score a model on them.

    Attributes:
        batches: Batches on the host, in random order as far as the loader allows; empty if there is nothing to score.
        loss, metric: The user's functions.
        notes: What was left out, one sentence each.
        data: What the batches are.
        samples_in: Tells how many samples a batch has.
        which: Which of the held-out samples these are, a phrase; empty: all that were read.
    """

    batches: Sequence[Any]
    loss: BatchFunction | None
    metric: BatchFunction | None
    device: torch.device
    autocast: torch.dtype | None
    notes: tuple[str, ...] = ()
    data: Literal["held-out", "training"] = "held-out"
    samples_in: Callable[[Any], int | None] = count_samples
    which: str = ""

    @classmethod
    def of(cls, spec: Spec, workload: Workload, half: bool = False) -> HeldOut:
        """Read the held-out data of a workload; without any, some of its training data.

        Args:
            spec, workload: What to read.
            half: Only every other micro-batch of the held-out data: those on which a scan scores conversions.

        Held-out data on which loss and metric cannot be computed, as without labels, scores nothing: training data does
        instead, and a note says so.

        Raises:
            DataError, UserCodeError: The loader raised or yielded nothing.
        """
        device = device_named(spec.scan.device, workload.model)
        autocast = autocast_dtype(spec.scan.autocast)
        functions, how = (workload.loss, workload.metric), (device, autocast)
        if workload.source.synthetic or functions == (None, None):
            return cls((), *functions, *how)
        if workload.held_out is None:
            source = read_again(spec, workload).source  # a generator can be read only once
            few = -(-TRAINING_SAMPLES // source.batch_size)
            data: Literal["held-out", "training"] = "training"
            source = replace(source, most=few)
        else:
            source, data = workload.held_out, "held-out"
        half = half and data == "held-out"
        batches, notes = _read(spec, source, 2 if half else 1)
        which = f"every other batch of {source.batch_size}, on which a scan chooses nothing" if half else ""
        found = cls(batches, *functions, *how, tuple(notes), data, source.samples_in, which)
        if data == "training":
            return found
        model = workload.model
        here = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), device)
        why = why_unscored(lambda: replace(found, batches=batches[:1], device=here).score(model))
        if why is None:
            return found
        training = cls.of(spec, replace(workload, held_out=None))
        return replace(training, notes=(f"{why} Training data is scored.", *training.notes))

    @property
    def known(self) -> tuple[Measure, ...]:
        """Which of loss and metric are given."""
        given: dict[Measure, BatchFunction | None] = {"loss": self.loss, "metric": self.metric}
        return tuple(measure for measure, function in given.items() if function is not None)

    @property
    def measure(self) -> Measure:
        """What models are compared by: the metric where there is one, else the loss."""
        return leading(self.known) or "loss"

    @property
    def described(self) -> str:
        """How many samples of what, e.g. "352 held-out samples"."""
        return count(self.images, f"{self.data} sample")

    @property
    def images(self) -> int:
        """Number of samples; a batch without tensors counts as one."""
        return sum(self.samples_in(batch) or 1 for batch in self.batches)

    def score(self, model: nn.Module) -> Score:
        """Loss and metric at inference, weighted by samples."""
        return evaluate(model, self.batches, self.loss, self.metric, self.device, self.autocast, self.samples_in)

    def table(self, model: nn.Module) -> ScoreTable:
        """Loss and metric at inference by batch, and by sample where they are means over samples: for pairs."""
        return score_table(model, self.batches, self.loss, self.metric, self.device, self.autocast, self.samples_in)

    def one_by_one(self) -> HeldOut:
        """The same samples in batches of one, as far as batches can be divided; at most ``TRAINING_SAMPLES``."""
        single: list[Any] = []
        for batch in self.batches:
            samples = self.samples_in(batch) or 1
            single += [pick(batch, [row], samples) for row in range(samples)] if samples > 1 else [batch]
        return replace(self, batches=single[:TRAINING_SAMPLES])

    def halves(self) -> tuple[HeldOut, HeldOut]:
        """Split into every other batch and the rest; the second half is empty if there is only one batch."""
        if len(self.batches) < 2:
            return self, replace(self, batches=())
        size = max(self.samples_in(batch) or 1 for batch in self.batches)
        which = f"every other batch of {size}, which chose no weights"
        return replace(self, batches=self.batches[::2], which=which), replace(self, batches=self.batches[1::2])


def _read(spec: Spec, source: BatchSource, every: int) -> tuple[list[Any], list[str]]:
    """One in so many micro-batches, and what was left out."""
    source = spread(source, spec.data.seed, mixed=True)
    batches: list[Any] = []
    held = 0
    for batch in itertools.islice(lasting(source.batches), None, None, every):
        held += sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))
        batches.append(batch)
        if source.most is not None and len(batches) == source.most:
            break
        if held > MOST_BYTES:
            return batches, [f"Only the first {len(batches)} batches (1 GiB) of the data were scored."]
    if not batches:
        raise DataError(f"{source.description} yielded no held-out batch.")
    fixed = spec.eval_data.batch_size is not None or spec.eval_data.batches is not None
    return batches if fixed else _larger(batches, source), []


def _larger(batches: list[Any], source: BatchSource) -> list[Any]:
    """The same samples in larger batches, where all batches can be joined: a few large ones are scored faster."""
    sizes = [source.samples_in(batch) for batch in batches]
    wanted = min(BATCH, sum(size or 0 for size in sizes) // BATCHES_WANTED)
    factor = wanted // max(source.batch_size, 1)
    # A model may pad the samples of a list to the largest one.
    if factor < 2 or any(is_ragged(batch, size) for batch, size in zip(batches, sizes, strict=True) if size):
        return batches
    starts = range(0, len(batches), factor)
    try:
        return [join(batches[start : start + factor], sizes[start : start + factor]) for start in starts]
    except CannotEmulateError:
        return batches
