"""One function per fault: it takes a case and plants the fault in it, as users come by it.

Not planted: ``rank_divergence`` needs several processes; ``propagation`` is by definition the consequence of another
fault upstream, and wherever it can be planted that other fault is the right answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.faults.cases import Case
from benchmarks.faults.networks import Loss, forward
from benchmarks.faults.samples import Batch, Samples
from benchmarks.faults.surgery import (
    HeldStatistics,
    TwoDomains,
    checkpoint_units,
    kill_channels,
    norms,
    plant_dropout,
    restore,
    set_momentum,
    statistics,
)

Fault = Callable[[Case], Case]


class NotApplicableError(Exception):
    """The fault cannot occur in this architecture; the message says why."""


# ---- batches


def small_batch(case: Case) -> Case:
    """Trained further, and settled, at batch size 2."""
    return case.drawn(batch_size=2).trained(150, rate=3e-4, settling=150)


def composition(case: Case) -> Case:
    """Every batch holds one class (volumes: one site), in training and in the scan."""
    return case.drawn(order="grouped").trained(40, rate=3e-4)


def single_value(case: Case) -> Case:
    """Batches of one image, on inputs so small that the deepest layers see one value per channel."""
    sides = {"plain": 4, "residual": 4, "dense": 2, "unet3d": 4}
    side = sides.get(case.network.name)
    if side is not None:
        case = replace(case, crop=functools.partial(_cropped, side=side)).trained(40)
    return case.drawn(batch_size=1)


def single_image(case: Case) -> Case:
    """Trained further, and settled, on batches of one image: instance normalization in training alone."""
    if case.network.name in ("mlp", "siamese"):
        raise NotApplicableError("one image gives some layers one value per channel: that is single_value")
    return case.drawn(batch_size=1).trained(60, rate=1e-4, settling=200)


def last_batch(case: Case) -> Case:
    """One image is left for the last batch, and the loader does not drop it."""
    return case.drawn(images=20 * case.sampling.batch_size + 1, drop_last=False)


# ---- statistics


def lag(case: Case) -> Case:
    """Even seeds: the weights moved on with momentum 0.001. Odd seeds: the statistics are those of earlier weights."""
    earlier = statistics(case.model)
    if case.seed % 2 == 0:
        set_momentum(case.model, 0.001)
        return case.trained(60, rate=1e-2, settling=0)
    case = case.trained(60, rate=1e-2, settling=0)
    restore(case.model, earlier)
    return case


def momentum_convention(case: Case) -> Case:
    """Momentum 0.9 or 0.99, as other frameworks write it, in the last part of the training."""
    set_momentum(case.model, (0.9, 0.99)[case.seed % 2])
    return case.trained(60, rate=3e-4)


def never_trained(case: Case) -> Case:
    """The weights were loaded, the running statistics were not."""
    for norm in norms(case.model):
        norm.reset_running_stats()
    return case


def non_finite(case: Case) -> Case:
    """One activation overflowed once: a running mean and variance are NaN for ever."""
    norm = norms(case.model)[case.seed % len(norms(case.model))]
    norm.running_mean[0] = torch.nan
    norm.running_var[0] = torch.nan
    return replace(case, alone=True)  # a scan refuses such a model


def no_running_stats(case: Case) -> Case:
    """Batch statistics at inference too: ``track_running_stats=False`` in every second layer."""
    for norm in norms(case.model)[::2]:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return case


def double_update(case: Case) -> Case:
    """Activation checkpointing: every unit runs twice per step, and so do the updates of its statistics."""
    checkpoint_units(case.model)
    return case.trained(20, rate=1e-4).with_options(train_steps=8)


# ---- the model


def dropout(case: Case) -> Case:
    """Strong dropout in front of the layers, trained with it."""
    plant_dropout(case.model, 0.7)
    return case.trained(80)


def dropout_before_norm(case: Case) -> Case:
    """Dropout in front of the layers, so weak that a scan finds it harmless: a question of the model alone."""
    plant_dropout(case.model, 0.02)
    return replace(case.trained(40, rate=3e-4), alone=True)


def shared_domains(case: Case) -> Case:
    """The same layers see two domains, in two calls, and keep one running average of both."""
    case = replace(case, model=TwoDomains(case.model, _second_domain))
    return case.trained(60)


def frozen_mismatch(case: Case) -> Case:
    """Even seeds: weight and bias are frozen, the statistics move on. Odd seeds: the reverse."""
    if case.seed % 2:
        return replace(case, model=HeldStatistics(case.model))
    for norm in norms(case.model):
        norm.requires_grad_(False)
    return case


def dead_channels(case: Case) -> Case:
    """A quarter of the channels of every second layer see a constant."""
    kill_channels(case.model, 0.25)
    return case.settled(200)


def backward_noise(case: Case) -> Case:
    """A loss that pulls all scores of a batch the same way, up or down by what the batch's first image is."""
    return replace(case, loss=CommonPull(case.loss)).with_options(gradients=True)


@dataclass(frozen=True)
class CommonPull:
    """The loss, and a much stronger pull on the mean score of the batch, of a sign that differs between batches."""

    loss: Loss
    strength: float = 100.0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        means = batch[0].flatten(1).mean(1)
        sign = 1.0 if means[0] > means.median() else -1.0
        return self.loss(model, batch) + self.strength * sign * forward(model, batch).mean()


# ---- held-out data


def data_shift(case: Case) -> Case:
    """The held-out data is brighter, has less contrast, or both."""
    return replace(case, shift=(_brightened, _faded, _bright_and_faded)[case.seed % 3])


def _brightened(inputs: Tensor) -> Tensor:
    return inputs + inputs.std()


def _faded(inputs: Tensor) -> Tensor:
    return inputs * 0.4


def _bright_and_faded(inputs: Tensor) -> Tensor:
    return inputs * 0.5 + inputs.std()


def _second_domain(inputs: Tensor) -> Tensor:
    return 1.5 - 2 * inputs


def _cropped(samples: Samples, side: int) -> Samples:
    """The middle of images and volumes of 8 pixels a side, and of targets that are such volumes themselves."""
    return replace(samples, inputs=_middle(samples.inputs, side), targets=_middle(samples.targets, side))


def _middle(values: Tensor, side: int) -> Tensor:
    for axis in range(1, values.dim()):
        if values.shape[axis] == 8:
            values = values.narrow(axis, 4 - side // 2, side)
    return values


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        small_batch,
        composition,
        lag,
        dropout,
        data_shift,
        shared_domains,
        double_update,
        backward_noise,
        momentum_convention,
        never_trained,
        non_finite,
        no_running_stats,
        frozen_mismatch,
        single_value,
        single_image,
        last_batch,
        dead_channels,
        dropout_before_norm,
    )
}
"""By the cause that is to be named (``bnprobe.records.Cause``)."""
