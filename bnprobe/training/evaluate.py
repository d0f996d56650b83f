"""Loss and metric at inference, on held-out batches: their means, or their values by batch and by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.loading.model import BatchFunction
from bnprobe.loading.returned import one_number
from bnprobe.loading.samples import count_samples
from bnprobe.measure.batch import copy_tensors, to_device
from bnprobe.measure.restore import preserved_random_state, preserved_training_flags, seed_everything
from bnprobe.measure.scores import Scored, ScoreTable, samples_apart, score_samples
from bnprobe.measure.session import Outputs, casting, recording, replaying
from bnprobe.measure.training_copy import training_code
from bnprobe.records import Measure, Score
from bnprobe.training.data import rewind

_SEED = 0
"""Random seed of every evaluation, so that two evaluations differ only by the model."""


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: BatchFunction | None,
    metric: BatchFunction | None,
    device: torch.device,
    autocast: torch.dtype | None,
    samples_in: Callable[[Any], int | None] = count_samples,
) -> Score:
    """Means of loss and metric in eval mode, weighted by samples. Training flags and random state are restored.

    Args:
        model: The model, on ``device``.
        batches: Batches on the host.
        loss, metric: The user's functions of (model, batch), each a mean over the samples of a batch; None: not given.
        device: Device to run on.
        autocast: Dtype of the forward passes.
        samples_in: Tells how many samples a batch has.

    Returns:
        Loss and metric; None for a function that was not given, and for a mean that is not finite or has no samples.

    Raises:
        UserCodeError: The user's code raised.
        DataError: A function did not return one number.
        DeviceError: There is not enough memory.
    """
    functions = {"loss": loss, "metric": metric}
    means = {name: _Mean() for name in functions}
    with preserved_random_state(), preserved_training_flags(model), torch.no_grad():
        seed_everything(_SEED)
        rewind(batches, _SEED)
        model.eval()
        for batch in batches:
            for name, function in functions.items():
                if function is not None:
                    given = copy_tensors(to_device(batch, device))
                    means[name].add(_value(name, function, model, given, device, autocast), samples_in(batch))
    return Score(means["loss"].value(), means["metric"].value())


class _Mean:
    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._images = 0

    def add(self, value: Tensor, images: int | None) -> None:
        """Add one batch; sums stay on the device, so that the host waits only once, at the end."""
        weight = 1 if images is None else images
        if weight:
            self._sum = self._sum + weight * value
            self._images += weight

    def value(self) -> float | None:
        mean = float(self._sum) / self._images if self._images else math.nan
        return mean if math.isfinite(mean) else None


def score_table(
    model: nn.Module,
    batches: Iterable[Any],
    loss: BatchFunction | None,
    metric: BatchFunction | None,
    device: torch.device,
    autocast: torch.dtype | None,
    samples_in: Callable[[Any], int | None] = count_samples,
) -> ScoreTable:
    """Loss and metric of each batch in eval mode, path "eval", and of each sample where they are means over samples.

    Two models' tables of the same batches are compared with ``stats.scores.paired_difference``. Arguments, restored
    state and errors as for ``evaluate``.
    """
    table = ScoreTable()
    functions: dict[Measure, BatchFunction | None] = {"loss": loss, "metric": metric}
    with preserved_random_state(), preserved_training_flags(model), torch.no_grad():
        seed_everything(_SEED)
        rewind(batches, _SEED)
        model.eval()
        for batch in batches:
            here, size = to_device(batch, device), samples_in(batch) or 1
            for measure, function in functions.items():
                if function is not None:
                    room = table.room(measure, "eval")
                    row = _scored(measure, function, model, here, size, room, device, autocast)
                    table.add({(measure, "eval"): [row]})
    return table


def _scored(
    measure: Measure,
    function: BatchFunction,
    model: nn.Module,
    batch: Any,
    size: int,
    room: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> Scored:
    """One batch, and its samples where the outputs of the model for the batch do for them."""
    batch = copy_tensors(batch)
    with recording(model, batch) as outputs:
        value = _value(measure, function, model, batch, device, autocast)
    if size > room:
        return Scored(value, size)

    with preserved_random_state(), replaying(model, only=True) as answered_with, casting(device, autocast):

        def call(part: Any, known: Outputs) -> Any:
            answered_with(part, known)
            return function(model, part)

        singles = samples_apart([batch], outputs, size)
        samples = score_samples(call, measure, function, singles, value.reshape(1), size)
    return Scored(value, size, None if samples is None else samples[0], tried=True)


def _value(
    name: str,
    function: BatchFunction,
    model: nn.Module,
    batch: Any,
    device: torch.device,
    autocast: torch.dtype | None,
) -> Tensor:
    """The value of a function for a batch on the device, which it may change: float64 of shape ()."""
    border = training_code(f"calling {name}(model, batch) (evaluation)", "Evaluating the model", device)
    with border, casting(device, autocast):
        returned = function(model, batch)
    return one_number(name, function, returned).to(device)
