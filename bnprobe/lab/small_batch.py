"""``small-batch``: how far the statistics of B samples are from those of the population, in theory and in a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.lab.data import POPULATION, Images, batches, load
from bnprobe.lab.experiment import (
    Budget,
    Condition,
    Experiment,
    Results,
    Values,
    above,
    average,
    below,
    formula,
    near,
    near_everywhere,
)
from bnprobe.lab.layers import BatchNorm, mismatch
from bnprobe.lab.networks import Call, batch_norms, calls_in_training, conv_net, keep_statistics, take_population, train
from bnprobe.records import Claim, Estimate, LabChart
from bnprobe.stats.theory import equivalent_batch_size, mismatch_iid

SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
NORMAL, NETWORK = "i.i.d. normal values", "trained network"
VALUES = 2**21
"""Normal values that are drawn for each batch size."""


class SmallBatch(Experiment):
    """Batches of normal values, and of images in a network that was trained with batches of 64."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """Each batch size with both kinds of data."""
        return [{"data": data, "batch": size} for data in (NORMAL, NETWORK) for size in SIZES]

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Figures of one batch size."""
        size = int(condition["batch"])
        if condition["data"] == NORMAL:
            return _normal(size, max(budget.of(VALUES) // size, 64))
        images = load(budget.data)
        return _in_network(_trained(images, seed, budget), images, size, budget)

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """Figures beside their formulas."""
        normal, network = results.where(data=NORMAL), results.where(data=NETWORK)
        smallest, largest = SIZES[0], SIZES[-1]
        yield near(
            "With exact running statistics, the mismatch D of i.i.d. values is 2 (1 - e_n).",
            "D over the formula's, mean over all batch sizes",
            _over_formula(normal, "D", mismatch_iid),
            0.02,
        )
        sizes = [size for size in SIZES if size >= 8]
        yield near_everywhere(
            "From 8 values on, 3/(2B) is close enough.",
            "D over 3/(2B)",
            {f"at B = {size}": _over_formula(normal.where(batch=size), "D", lambda n: 1.5 / n) for size in sizes},
            0.05,
        )
        yield near(
            "The relative squared error of the unbiased variance is 2/(B-1).",
            "Error over the formula's, mean over all batch sizes",
            _over_formula(normal, "variance error", lambda n: 2 / (n - 1)),
            0.05,
        )
        yield near(
            f"The mean of r is e_n, which is not 1: at B = {smallest} it is {_e(smallest):.3f}.",
            f"Mean of r at B = {smallest}",
            normal.where(batch=smallest).mean("r"),
            0.01,
            _e(smallest),
        )
        yield below(
            "In a network the values of a batch are worth fewer independent ones: positions of an image are alike.",
            f"n_eq over the number of values at B = {smallest}, mean over layers",
            network.where(batch=smallest).mean("worth"),
            1.0,
        )
        yield above(
            "The gradient of small batches is biased: its mean is not that of one batch of all images.",
            f"Bias over the length of the gradient at B = {smallest}",
            network.where(batch=smallest).mean("gradient bias"),
            0.05,
        )
        yield below(
            "The bias of the gradient falls with the batch size.",
            f"Bias at B = {largest} less that at B = {smallest}",
            network.where(batch=largest).less("gradient bias", network.where(batch=smallest)),
        )

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """Each figure against the batch size, beside its formula."""
        normal, network = results.where(data=NORMAL), results.where(data=NETWORK)
        size = "samples in a batch"
        mismatches = (
            normal.series("D", "batch", "i.i.d. normal values"),
            formula("2 (1 - e_n)", SIZES, mismatch_iid),
            *(network.series(f"D of layer {layer}", "batch", f"layer {layer} of the network") for layer in (1, 2, 3)),
        )
        legend = (
            "A layer of the network takes its statistics over all positions of the images of a batch.",
            "Its batches are drawn without replacement from the N images of the population, by which D of B images is"
            " smaller by the factor 1 - B/N.",
        )
        yield LabChart(
            "mismatch", "D against the batch size", size, "D", mismatches, legend, x_scale="log", y_scale="log"
        )
        yield LabChart(
            "variance",
            "Relative squared error of the variance",
            size,
            "squared error over the variance squared",
            (normal.series("variance error", "batch", "measured"), formula("2/(B-1)", SIZES, lambda n: 2 / (n - 1))),
            x_scale="log",
            y_scale="log",
        )
        corrections = (
            normal.series("r", "batch", "mean of r"),
            formula("e_n", SIZES, _e),
            normal.series("d", "batch", "root mean square of d"),
            formula("1/sqrt(B)", SIZES, lambda n: n**-0.5),
        )
        title, figures = "What Batch Renorm would correct", "mean of r, root mean square of d"
        yield LabChart("r-and-d", title, size, figures, corrections, x_scale="log")
        yield LabChart(
            "gradient",
            "Bias of the gradient against that of one batch of all images",
            size,
            "length of the bias over that of the gradient",
            (network.series("gradient bias", "batch", "trained network"),),
            ("From two epochs in different orders, so that noise does not count as bias.",),
            x_scale="log",
        )


def _e(n: float) -> float:
    return 1 - mismatch_iid(n) / 2


def _over_formula(results: Results, name: str, expected: Callable[[float], float]) -> Estimate | None:
    """A figure over what a formula gives, the mean over batch sizes."""
    sizes = [size for size in SIZES if size in results.levels("batch")]
    return results.mean_over_seeds(
        lambda one: average([one.value(name, batch=size) / expected(size) for size in sizes])
    )


def _normal(size: int, count: int) -> Values:
    """``count`` batches of normal values, against mean 0 and variance 1."""
    values = torch.randn(count, size, dtype=torch.float64)
    mean, variance = values.mean(1), values.var(1, unbiased=False)
    r = variance.sqrt()
    unbiased = variance * size / (size - 1)
    return {
        "r": r.mean().item(),
        "d": mean.square().mean().sqrt().item(),
        # Of x = mean + r z the batch gives z: the mean over values of (z - x)^2 is this.
        "D": (mean.square() + (1 - r).square()).mean().item(),
        "variance error": (unbiased - 1).square().mean().item(),
    }


def _trained(images: Images, seed: int, budget: Budget) -> nn.Sequential:
    """A network, trained with batches of 64."""
    draws = torch.Generator().manual_seed(seed)
    model = conv_net(images.train.shape[1:], images.classes, BatchNorm)
    train(model, batches(images.train, images.train_labels, 64, budget.of(100, 20), draws), 0.05)
    return model


def _in_network(model: nn.Sequential, images: Images, size: int, budget: Budget) -> Values:
    """D of each layer against population statistics, and the bias of the gradient."""
    layers = batch_norms(model)
    most = min(len(images.train), budget.of(POPULATION, 2 * SIZES[-1]))
    usable = most // SIZES[-1] * SIZES[-1]  # no size has a smaller last batch
    pixels, labels = images.train[:usable], images.train_labels[:usable]
    take_population(model, pixels)
    keep_statistics(model)
    exact = _gradient(model.train(), pixels, labels, usable)
    differences = []
    with ExitStack() as watching:
        seen = [watching.enter_context(calls_in_training(layer)) for layer in layers]
        for _ in range(2):
            order = torch.randperm(usable)
            differences.append(_gradient(model, pixels[order], labels[order], size) - exact)
    found = [_mismatch(layer, calls) for layer, calls in zip(layers, seen, strict=True)]
    worth = [(equivalent_batch_size(D) or math.inf) / calls[0].values for D, calls in zip(found, seen, strict=True)]
    bias = float(differences[0] @ differences[1])
    return {
        **{f"D of layer {number}": D for number, D in enumerate(found, start=1)},
        "worth": math.fsum(worth) / len(worth),
        "gradient bias": math.copysign(math.sqrt(abs(bias)), bias) / float(exact.norm()),
    }


def _mismatch(layer: BatchNorm, calls: Iterable[Call]) -> float:
    """D of batches, with the statistics that the layer has."""
    each = [mismatch(call.mean, call.variance, layer.running_mean, layer.running_var) for call in calls]
    return float(torch.stack(each).mean())


def _gradient(model: nn.Module, pixels: Tensor, labels: Tensor, size: int) -> Tensor:
    """The mean gradient over batches of one size, of all parameters, shape (parameters,)."""
    model.zero_grad()
    parts = list(zip(pixels.split(size), labels.split(size), strict=True))
    for chosen, expected in parts:
        (F.cross_entropy(model(chosen), expected) / len(parts)).backward()
    return torch.cat([each.grad.flatten().clone() for each in model.parameters() if each.grad is not None])
