"""``dropout``: dropout before batch norm leaves it a running variance with noise that inference does not have.

Li et al. 2019 (arXiv 1801.05134) call it variance shift. Inverted dropout with rate q multiplies each input x of a
linear map by 0 or by 1 / (1 - q), so that the mean stays and each input has the further variance x^2 q / (1 - q). The
draws are independent, so the output y = sum of w x has, in training,

    Var(y in training) = Var(y at inference) + q / (1 - q) * sum over inputs of w^2 E[x^2],

whatever the distribution of x and however its entries depend on each other (their section 3 has two special cases of
it). The running variance of the batch norm behind it is the first of these, and what it normalizes at inference has
the second.

A network of three convolutions is trained with dropout before the third one, whose batch norm it disturbs, or behind
the last batch norm, where it disturbs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.lab.data import POPULATION, Images, batches, load
from bnprobe.lab.experiment import (
    SHARE,
    Budget,
    Condition,
    Experiment,
    Results,
    Values,
    above,
    near_everywhere,
    told,
    within,
    worst,
)
from bnprobe.lab.layers import BatchNorm, batch_moments, per_channel
from bnprobe.lab.networks import (
    batch_norms,
    conv_net,
    conv_net_architecture,
    held_out_accuracy,
    input_of,
    take_population,
    train,
)
from bnprobe.records import Claim, LabChart

BEFORE, AFTER = "before batch norm", "behind the last batch norm"
RATES = (0.1, 0.3, 0.5, 0.7)
LARGE = 0.5
"""The rate at which both places are compared: that of Hinton et al. 2012, which is used most."""

BATCH, STEPS, RATE = 32, 300, 0.05
RECALIBRATED = "accuracy with statistics taken anew"
MASKS = 8
"""Draws of dropout for each image, where variances are measured."""


class Dropout(Experiment):
    """Both places, a sweep of rates, and no dropout at all."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """Places and rates."""
        return [{"place": place, "rate": rate} for place in (BEFORE, AFTER) for rate in (0.0, *RATES)]

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Train, then measure variances, and accuracy before and after statistics are taken without dropout."""
        images = load(budget.data)
        rate = float(condition["rate"])
        model = _network(images, str(condition["place"]), rate)
        steps = batches(
            images.train, images.train_labels, BATCH, budget.of(STEPS, 20), torch.Generator().manual_seed(seed)
        )
        train(model, steps, RATE)
        last = batch_norms(model)[-1]
        population = images.train[:POPULATION]
        measured, expected = _shift(model, last, population, rate, budget.of(MASKS))
        trained = held_out_accuracy(model, images.test, images.test_labels)
        take_population(model, population)
        return {
            "variance shift": measured,
            "variance shift by the formula": expected,
            "variance shift over the formula": measured / expected,
            "accuracy": trained,
            RECALIBRATED: held_out_accuracy(model, images.test, images.test_labels),
        }

    def answer(self, results: Results, budget: Budget) -> str:
        """The shift, its cost, and the remedy, at one rate."""
        at_rate = results.where(rate=LARGE)
        before, after = at_rate.where(place=BEFORE), at_rate.where(place=AFTER)
        gain = at_rate.mean_over_seeds(lambda one: _gain(one, BEFORE) - _gain(one, AFTER))
        return (
            f"At rate {LARGE} the variance in training is {told(before.mean('variance shift'))} times that at"
            f" inference, by the formula {told(before.mean('variance shift by the formula'))} times. Accuracy is"
            f" {told(after.less('accuracy', before))} less than with dropout {AFTER}; statistics taken anew give back"
            f" {told(gain)}."
        )

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """The formula, what the shift costs, and whether new statistics mend it."""
        before, after = results.where(place=BEFORE), results.where(place=AFTER)
        yield near_everywhere(
            "The variance shift is 1 + rate / (1 - rate) * sum w^2 E[x^2] / Var(y), at every rate (Li et al., section"
            " 3).",
            "Measured over the formula's",
            {f"at rate {rate}": before.where(rate=rate).mean("variance shift over the formula") for rate in RATES},
            0.02,
        )
        yield above(
            "The shift grows with the rate.",
            f"Variance in training over that at inference, at rate {RATES[-1]} less at {RATES[0]}",
            before.where(rate=RATES[-1]).less("variance shift", before.where(rate=RATES[0])),
        )
        yield within(
            "Dropout behind the last batch norm shifts no variance.",
            "Largest deviation of the ratio from 1",
            worst(None if (shift := trial.number("variance shift")) is None else abs(shift - 1) for trial in after),
            1e-5,
        )
        yield above(
            f"At rate {LARGE} dropout before batch norm costs accuracy that dropout behind it does not.",
            "Held-out accuracy behind it less before it",
            after.where(rate=LARGE).less("accuracy", before.where(rate=LARGE)),
        )
        yield above(
            "Statistics taken anew, without dropout, give back some of what the shift cost.",
            f"Gain of held-out accuracy at rate {LARGE}, before batch norm less behind it",
            results.where(rate=LARGE).mean_over_seeds(lambda one: _gain(one, BEFORE) - _gain(one, AFTER)),
        )

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """Shift and accuracy against the rate."""
        before, after = results.where(place=BEFORE), results.where(place=AFTER)
        shifts = (
            before.series("variance shift", "rate", BEFORE),
            replace(before.series("variance shift by the formula", "rate", "formula"), theory=True),
            after.series("variance shift", "rate", AFTER),
        )
        legend = (
            "The batch norm layer of the third convolution. The formula is Var(y in training) / Var(y) = 1 + rate /"
            " (1 - rate) * sum w^2 E[x^2] / Var(y), with weights w and inputs x of the convolution in each network,"
            " and its output y at inference."
        )
        title = "Variance in training over that at inference"
        yield LabChart("shift", title, "rate of dropout", "ratio of variances", shifts, (legend,))
        accuracies = (
            before.series("accuracy", "rate", BEFORE),
            before.series(RECALIBRATED, "rate", f"{BEFORE}, statistics taken anew"),
            after.series("accuracy", "rate", AFTER),
        )
        yield LabChart("accuracy", "Held-out accuracy", "rate of dropout", "accuracy", accuracies, bounds=SHARE)

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """Where the formula comes from, and the network."""
        yield (
            "Inverted dropout multiplies each input x by 0 or, with probability 1 - rate, by 1 / (1 - rate): the mean"
            " stays, and x has the further variance x^2 rate / (1 - rate). Draws are independent, so that a sum of w x"
            " has the sum of w^2 times these. Li et al. 2019 (section 3) have two special cases of it."
        )
        yield conv_net_architecture(budget.data)


def _gain(of_seed: Results, place: str) -> float:
    """What statistics taken anew gain: of lagging averages as well as of dropout."""
    return of_seed.value(RECALIBRATED, place=place) - of_seed.value("accuracy", place=place)


def _network(images: Images, place: str, rate: float) -> nn.Sequential:
    layers = list(conv_net(images.train.shape[1:], images.classes, BatchNorm))
    convolutions = [position for position, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    layers.insert(convolutions[-1] if place == BEFORE else len(layers) - 1, nn.Dropout(rate))
    return nn.Sequential(*layers)


@torch.no_grad()
def _shift(model: nn.Sequential, last: BatchNorm, pixels: Tensor, rate: float, masks: int) -> tuple[float, float]:
    """Variance at a batch norm layer with dropout over that without it, mean over channels: measured, and expected.

    All else is as at inference, so that the two differ by dropout alone.
    """
    convolution = model[list(model).index(last) - 1]
    assert isinstance(convolution, nn.Conv2d)
    model.eval()
    mean, without = batch_moments(input_of(model, last, pixels))
    values = input_of(model, convolution, pixels)
    for layer in model:
        layer.train(isinstance(layer, nn.Dropout))
    drawn = (input_of(model, last, pixels) - per_channel(mean, values) for _ in range(masks))
    measured = torch.stack([each.square().mean((0, 2, 3)) for each in drawn]).mean(0)
    expected = without.clone()
    if isinstance(model[list(model).index(convolution) - 1], nn.Dropout):
        # E[x^2] of each position, through the convolution with squared weights, and the mean over positions.
        noise = F.conv2d(values.square().mean(0, keepdim=True), convolution.weight.square(), padding=1)
        expected += rate / (1 - rate) * noise.mean((0, 2, 3))
    return (measured / without).mean().item(), (expected / without).mean().item()
