"""Faults: each takes a case and a strength, and plants the fault as users come by it.

Not planted: ``rank_divergence`` needs several processes; ``propagation`` is by definition the consequence of another
fault upstream, and wherever it can be planted that other fault is the right answer.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.faults import shifts
from benchmarks.faults.cases import Case, on_inputs
from benchmarks.faults.networks import NETWORKS, Loss, forward
from benchmarks.faults.samples import Batch, Samples, batches
from benchmarks.faults.surgery import (
    HeldStatistics,
    TwoDomains,
    always_drop,
    checkpoint_units,
    heed_eval,
    kill_channels,
    norms,
    plant_dropout,
    prune,
    quantize,
    restore,
    rounded_buffers,
    set_eps,
    set_momentum,
    statistics,
)

Plant = Callable[[Case, int], Case]
"""Case and strength (0 to 2) in, case out."""

STRENGTHS = ("mild", "middle", "strong")

EVERYWHERE = tuple(NETWORKS)
IMAGES = ("plain", "residual", "dense", "mixer")
CONVOLUTIONS = ("plain", "residual", "dense", "unet3d", "audio", "points", "generator")
IN_TRAINING = ("small_batch", "composition", "single_image")
"""Faults of the batches do harm in training, in both modes alike, which a network may get over."""

CLASSIFIERS = ("plain", "residual", "dense", "mlp", "audio", "points", "mixer")
STALE = ("lag",)

AVERAGED = 40
"""Steps whose weights are averaged."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        plant: Puts it into a case.
        causes: The right answers: causes (``bnprobe.records.Cause``) one of which is to be named first.
        networks: Where it can occur.
        strengths: In which strengths it is planted, of ``STRENGTHS``.
        structural: It does no harm to the metric here, but stops training or does harm elsewhere: a scan should see it.
        wrong_anyway: An error is right even where the metric did not fall.
    """

    plant: Plant
    causes: tuple[str, ...]
    networks: tuple[str, ...] = EVERYWHERE
    strengths: tuple[str, ...] = STRENGTHS
    structural: bool = False
    wrong_anyway: bool = False

    @property
    def name(self) -> str:
        """Of the kind."""
        return self.plant.__name__


# ---- batches


def small_batch(case: Case, strength: int) -> Case:
    """Trained further, and settled, at batch size 8, 4 or 2."""
    return case.drawn(batch_size=(8, 4, 2)[strength]).trained(150, rate=(1e-3, 1e-3, 3e-4)[strength], settling=150)


def composition(case: Case, strength: int) -> Case:
    """Every batch holds runs of four, two or one class (volumes: site), in training and in the scan."""
    return case.drawn(order="grouped", runs=(4, 2, 1)[strength]).trained(40, rate=3e-4)


def alternating_domains(case: Case, strength: int) -> Case:
    """Batches of two domains by turns, of which the network is served with one."""
    other = functools.partial(_second_domain, strength=(0.3, 0.6, 1.0)[strength])
    case = replace(case, prepared=functools.partial(_with_second_domain, change=other))
    return case.drawn(order="grouped").trained(60, rate=1e-3)


def single_value(case: Case, strength: int) -> Case:
    """Batches of one image, on inputs so small that the deepest layers see one value per channel."""
    side = {"plain": 4, "residual": 4, "dense": 2, "unet3d": 4}.get(case.network.name)
    if side is not None:
        cropped = functools.partial(_cropped, side=side)
        case = replace(case, prepared=cropped, evaluated=cropped).trained(40)
    return case.drawn(batch_size=1)


def single_image(case: Case, strength: int) -> Case:
    """Trained further, and settled, on batches of one image: instance normalization in training alone."""
    return case.drawn(batch_size=1).trained(60, rate=(1e-4, 3e-4, 1e-3)[strength], settling=200)


def last_batch(case: Case, strength: int) -> Case:
    """One image is left for the last batch, and the loader does not drop it."""
    return case.drawn(images=20 * case.sampling.batch_size + 1, drop_last=False)


def eval_forgotten(case: Case, strength: int) -> Case:
    """A healthy network answers for one sample at a time, in train mode."""
    return replace(case.drawn(batch_size=1), served_in_training=True, served_batch=1)


# ---- statistics


def slow_momentum(case: Case, strength: int) -> Case:
    """The weights moved on with a momentum at which the statistics hardly follow."""
    set_momentum(case.model, (0.01, 0.003, 0.001)[strength])
    return case.trained(60, rate=1e-2, settling=0).with_twin()


def earlier_statistics(case: Case, strength: int) -> Case:
    """The statistics are those of earlier weights: buffers that a copy did not take along."""
    earlier = statistics(case.model)
    case = case.trained(60, rate=(3e-3, 6e-3, 1e-2)[strength], settling=0)
    restore(case.model, earlier)
    return case.with_twin()


def averaged_weights(case: Case, strength: int) -> Case:
    """The mean of the weights of the last steps, with the statistics of the last of them."""
    torch.manual_seed(case.seed)
    parameters = list(case.model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=(3e-3, 1e-2, 2e-2)[strength])
    mean = [torch.zeros_like(one) for one in parameters]
    for _, batch in zip(range(AVERAGED), batches(case.training(), case.sampling), strict=False):
        optimizer.zero_grad()
        case.loss(case.model, batch).backward()
        optimizer.step()
        for into, one in zip(mean, parameters, strict=True):
            into += one.detach() / AVERAGED
    optimizer.zero_grad()
    with torch.no_grad():
        for one, value in zip(parameters, mean, strict=True):
            one.copy_(value)
    return case.with_twin()


def young_average(case: Case, strength: int) -> Case:
    """Statistics that were reset, and updated a few times."""
    never_trained(case, 2)
    return case.settled((20, 10, 5)[strength])


def statistics_of_other_data(case: Case, strength: int) -> Case:
    """The statistics settled on data with another brightness."""
    other = replace(case, prepared=on_inputs(shifts.brightness((0.3, 0.6, 1.0)[strength])))
    other.settled(60)
    return case


def bf16_buffers(case: Case, strength: int) -> Case:
    """Running statistics in bfloat16, which small updates do not move, while the weights move on."""
    set_momentum(case.model, (0.03, 0.01, 0.003)[strength])
    with rounded_buffers(case.model):
        case = case.trained(60, rate=1e-2)
    return case.with_twin()


def eps_port(case: Case, strength: int) -> Case:
    """Trained with a large eps, and deployed with the usual one."""
    usual = norms(case.model)[0].eps
    set_eps(case.model, (0.03, 0.1, 0.3)[strength])
    case = case.trained(100, rate=3e-3).with_twin()
    set_eps(case.model, usual)
    return case


def pruned(case: Case, strength: int) -> Case:
    """The smallest weights are zero, afterwards."""
    prune(case.model, (0.3, 0.5, 0.7)[strength])
    return case


def quantized(case: Case, strength: int) -> Case:
    """Weights of a few bits, afterwards."""
    quantize(case.model, bits=(4, 3, 2)[strength])
    return case


def momentum_convention(case: Case, strength: int) -> Case:
    """Momentum as other frameworks write it, in the last part of the training."""
    set_momentum(case.model, (0.9, 0.95, 0.99)[strength])
    return case.trained(60, rate=3e-4).with_twin()


def never_trained(case: Case, strength: int) -> Case:
    """The weights were loaded, the running statistics were not: of the last layer, of half of them, of all."""
    layers = norms(case.model)
    for norm in layers[(len(layers) - 1, len(layers) // 2, 0)[strength] :]:
        norm.reset_running_stats()
    return case


def non_finite(case: Case, strength: int) -> Case:
    """One activation overflowed once: a running mean and variance are NaN for ever."""
    norm = norms(case.model)[case.seed % len(norms(case.model))]
    norm.running_mean[0] = torch.nan
    norm.running_var[0] = torch.nan
    return case


def no_running_stats(case: Case, strength: int) -> Case:
    """Batch statistics at inference too, in every second layer; it is used on batches of two."""
    for norm in norms(case.model)[::2]:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return replace(case, served_batch=2)


def double_update(case: Case, strength: int) -> Case:
    """Activation checkpointing: every unit runs twice per step, and so do the updates of its statistics."""
    checkpoint_units(case.model)
    return case.trained(20, rate=1e-4).with_options(train_steps=8)


def trained_in_eval(case: Case, strength: int) -> Case:
    """``train()`` was forgotten after a validation: the weights went on with fixed statistics."""
    replace(case, model=HeldStatistics(case.model)).trained(100, rate=(1e-3, 2e-3, 4e-3)[strength])
    case.model.train()
    return case


# ---- the model


def dropout(case: Case, strength: int) -> Case:
    """Dropout in front of the layers, trained with it."""
    plant_dropout(case.model, (0.3, 0.5, 0.7)[strength])
    return case.trained(80)


def dropout_before_norm(case: Case, strength: int) -> Case:
    """Dropout in front of the layers, so weak that a scan finds it harmless: a question of the model alone."""
    plant_dropout(case.model, 0.02)
    return replace(case.trained(40, rate=3e-4), alone=True)


def random_at_inference(case: Case, strength: int) -> Case:
    """Dropout that knows no eval mode, before the last layers."""
    always_drop(case.model, (0.2, 0.4, 0.6)[strength])
    case = case.trained(80)
    twin = copy.deepcopy(case.model)
    heed_eval(twin)
    return replace(case, twin=twin)


def shared_domains(case: Case, strength: int) -> Case:
    """The same layers see two domains, in two calls, and keep one running average of both."""
    other = functools.partial(_second_domain, strength=(0.3, 0.6, 1.0)[strength])
    return replace(case, model=TwoDomains(case.model, other)).trained(60)


def frozen_mismatch(case: Case, strength: int) -> Case:
    """Even seeds: weight and bias are frozen, the statistics move on. Odd seeds: the reverse."""
    if case.seed % 2:
        return replace(case, model=HeldStatistics(case.model))
    for norm in norms(case.model):
        norm.requires_grad_(False)
    return case


def dead_channels(case: Case, strength: int) -> Case:
    """A quarter of the channels of every second layer see a constant; the others have learned to do without."""
    killed = kill_channels(case.model, 0.25)
    for weight in killed:
        weight.requires_grad_(False)
    case = case.trained(150, rate=3e-3, settling=200)
    for weight in killed:
        weight.requires_grad_(True)
    return case


def backward_noise(case: Case, strength: int) -> Case:
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


def brightness(case: Case, strength: int) -> Case:
    """Held-out data with an offset."""
    return _shifted(case, shifts.brightness((0.3, 0.6, 1.0)[strength]))


def contrast(case: Case, strength: int) -> Case:
    """Held-out data of a smaller scale."""
    return _shifted(case, shifts.contrast((0.7, 0.5, 0.3)[strength]))


def noise(case: Case, strength: int) -> Case:
    """Held-out data with noise."""
    return _shifted(case, shifts.noise((0.3, 0.6, 1.0)[strength]))


def blur(case: Case, strength: int) -> Case:
    """Held-out images out of focus."""
    return _shifted(case, shifts.blur(strength + 1))


def resized(case: Case, strength: int) -> Case:
    """Held-out images of a lower resolution."""
    return _shifted(case, shifts.resized((6, 5, 4)[strength]))


def padded(case: Case, strength: int) -> Case:
    """Held-out images, smaller and in a black frame."""
    return _shifted(case, shifts.padded((7, 6, 5)[strength]))


def _shifted(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    return replace(case, evaluated=on_inputs(change), held_out_given=True)


def _second_domain(inputs: Tensor, strength: float) -> Tensor:
    return inputs + strength * (1.5 - 3 * inputs)


def _with_second_domain(samples: Samples, change: Callable[[Tensor], Tensor]) -> Samples:
    """The first half as it is, the second from another domain; grouped by domain."""
    half = len(samples) // 2
    inputs = torch.cat([samples.inputs[:half], change(samples.inputs[half:])])
    return replace(samples, inputs=inputs, groups=(torch.arange(len(samples)) >= half).long())


def _cropped(samples: Samples, side: int) -> Samples:
    """The middle of images and volumes of 8 pixels a side, and of targets that are such volumes themselves."""
    return replace(samples, inputs=_middle(samples.inputs, side), targets=_middle(samples.targets, side))


def _middle(values: Tensor, side: int) -> Tensor:
    for axis in range(1, values.dim()):
        if values.shape[axis] == 8:
            values = values.narrow(axis, 4 - side // 2, side)
    return values


_ONE = ("strong",)
_MAPS = ("plain", "residual", "dense", "unet3d", "audio", "mixer")
_ROWS = ("plain", "residual", "dense", "unet3d", "mlp", "siamese", "points", "generator")

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault(small_batch, ("small_batch",)),
        Fault(composition, ("composition",)),
        Fault(alternating_domains, ("composition", "shared_domains"), (*IMAGES, "audio", "generator")),
        Fault(single_value, ("single_value",), _ROWS, _ONE, structural=True),
        Fault(single_image, ("single_image",), _MAPS, wrong_anyway=True),
        Fault(last_batch, ("last_batch",), strengths=_ONE, structural=True),
        Fault(eval_forgotten, ("eval_forgotten", "single_image"), _MAPS, _ONE),
        Fault(slow_momentum, STALE),
        Fault(earlier_statistics, STALE),
        Fault(averaged_weights, STALE),
        Fault(young_average, STALE),
        Fault(statistics_of_other_data, STALE),
        Fault(bf16_buffers, STALE),
        Fault(eps_port, STALE),
        Fault(pruned, STALE),
        Fault(quantized, STALE),
        Fault(momentum_convention, ("momentum_convention",)),
        Fault(never_trained, ("never_trained",)),
        Fault(non_finite, ("non_finite",), strengths=_ONE),
        Fault(no_running_stats, ("no_running_stats",), strengths=_ONE),
        Fault(double_update, ("double_update",), strengths=_ONE, structural=True),
        Fault(trained_in_eval, ("trained_in_eval",)),
        Fault(dropout, ("dropout",)),
        Fault(dropout_before_norm, ("dropout_before_norm",), strengths=_ONE, structural=True),
        Fault(random_at_inference, ("random_at_inference",), CLASSIFIERS, wrong_anyway=True),
        Fault(shared_domains, ("shared_domains",)),
        Fault(frozen_mismatch, ("frozen_mismatch",), strengths=_ONE, structural=True),
        Fault(dead_channels, ("dead_channels",), strengths=_ONE, structural=True),
        Fault(backward_noise, ("backward_noise",), strengths=_ONE, structural=True),
        Fault(brightness, ("data_shift",)),
        Fault(contrast, ("data_shift",)),
        Fault(noise, ("data_shift",)),
        Fault(blur, ("data_shift",), IMAGES),
        Fault(resized, ("data_shift",), IMAGES),
        Fault(padded, ("data_shift",), IMAGES),
    )
}
"""By name of the kind."""
