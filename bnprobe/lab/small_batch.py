"""``small-batch``: how far the statistics of B samples are from those of the population, in theory and in a network.

A layer of a network takes the statistics of a channel over all P positions of B images, n = B P values, which are not
independent. With the mean correlation rho of two positions of an image, the squared error of the mean is

    E[d^2] = (1 + (P - 1) rho) / n

where images are drawn independently (the design effect of Kish 1965, Survey Sampling, section 5.4): more than that of n
independent values where positions are alike, less where they make up for each other. So it is in the first layer. What
comes to the others has been normalized with the statistics of the same batch. D tells how many independent normal
values the n are worth, n_eq.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

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
    below_everywhere,
    cell,
    formula,
    near,
    near_everywhere,
    told,
)
from bnprobe.lab.layers import BatchNorm, corrections
from bnprobe.lab.networks import (
    Call,
    batch_norms,
    calls_in_training,
    conv_net,
    conv_net_architecture,
    input_of,
    keep_statistics,
    take_population,
    train,
)
from bnprobe.numbers import joined
from bnprobe.records import Claim, Estimate, LabChart, LabSeries, LabTable
from bnprobe.stats.theory import equivalent_batch_size, mismatch_iid

LAYERS = (1, 2, 3)
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

    def answer(self, results: Results, budget: Budget) -> str:
        """How far from exact D is, and what the values of layers are worth."""

        normal, network = results.where(data=NORMAL), results.where(data=NETWORK, batch=SIZES[0])
        smallest, largest = (told(normal.where(batch=size).mean("D")) for size in (SIZES[0], SIZES[-1]))
        worth = joined([told(network.mean(_of("n_eq over n", layer))) for layer in LAYERS])
        return (
            f"D of independent values is {smallest} at B = {SIZES[0]} and {largest} at B = {SIZES[-1]},"
            f" {told(_over_formula(normal, 'D', mismatch_iid))} of the formula's. In the three layers of a network n"
            f" values of {SIZES[0]} images are worth {worth} times n independent ones."
        )

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
        for layer in LAYERS:
            yield below(
                f"In layer {layer} of a network the values of a batch are worth fewer independent ones: positions of an"
                " image are alike.",
                f"n_eq over the number of values at B = {smallest}",
                network.where(batch=smallest).mean(_of("n_eq over n", layer)),
                1.0,
            )
        first, *others = LAYERS
        over_formula = "squared d over the formula's"
        yield near(
            "In the first layer the squared error of the mean of n values, with a correlation rho of the P positions of"
            " an image, is (1 + (P - 1) rho) / n.",
            f"E[d^2] over the formula's at B = {smallest}",
            network.where(batch=smallest).mean(_of(over_formula, first)),
            0.05,
        )
        yield below_everywhere(
            "In the others it is less: the batch norms before them take out some of what batches differ by.",
            f"E[d^2] over the formula's at B = {smallest}",
            {f"in layer {layer}": network.where(batch=smallest).mean(_of(over_formula, layer)) for layer in others},
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
        """Each figure against the number of values, beside its formulas, and the bias of the gradient."""
        normal, network = results.where(data=NORMAL), results.where(data=NETWORK)
        legend = (
            "A layer of the network takes its statistics over all positions of the images of a batch. The formulas are"
            " of independent normal values.",
            "Its batches are drawn without replacement from the N images of the population, by which D and squared"
            " errors of B images are smaller by the factor 1 - B/N.",
        )
        for name, title, figure, formulas in (
            ("mismatch", "D", "D", {"2 (1 - e_n)": mismatch_iid, "3/(2n)": lambda n: 1.5 / n}),
            (
                "variance",
                "Relative squared error of the variance",
                "variance error",
                {"2/(n-1)": lambda n: 2 / (n - 1)},
            ),
            ("r", "Mean of r", "r", {"e_n": _e}),
            ("d", "Root mean square of d", "d", {"1/sqrt(n)": lambda n: n**-0.5}),
        ):
            measured = [
                normal.series(figure, "batch", NORMAL),
                *(_of_layer(network, figure, layer) for layer in LAYERS),
            ]
            places = sorted({float(place) for each in measured for place in each.x})
            expected = (formula(name, places, values) for name, values in formulas.items())
            yield LabChart(
                name,
                f"{title} against the number of values",
                "values of a channel in a batch, n",
                title,
                (*measured, *expected),
                legend,
                x_scale="log",
                y_scale="linear" if name == "r" else "log",
            )
        yield LabChart(
            "gradient",
            "Bias of the gradient against that of one batch of all images",
            "images in a batch",
            "length of the bias over that of the gradient",
            (network.series("gradient bias", "batch", "trained network"),),
            ("From two epochs in different orders, so that noise does not count as bias.",),
            x_scale="log",
        )

    def tables(self, results: Results, budget: Budget) -> Iterator[LabTable]:
        """What the layers of the network differ in."""
        smallest = results.where(data=NETWORK, batch=SIZES[0])
        columns = {
            "rho": "rho",
            "1 + (P - 1) rho": "1 + (P - 1) rho",
            "n E[d^2]": "error of the mean",
            "2 n E[(1 - r)^2]": "error of the deviation",
            "n_eq over n": "n_eq over n",
        }
        yield LabTable(
            f"What the values of {SIZES[0]} images are worth in each layer of the network",
            ("layer", "positions P", *columns),
            tuple(
                (
                    f"{layer}",
                    f"{_positions(smallest, layer):g}",
                    *(cell(smallest.mean(_of(figure, layer))) for figure in columns.values()),
                )
                for layer in LAYERS
            ),
            (
                "Of independent normal values the last three are 1, but for small n. rho is the correlation of two"
                " positions of an image at inference: where it is below 0, images differ less in their mean than"
                " independent values would let them. Means over channels.",
            ),
        )

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """The network."""
        yield f"{conv_net_architecture(budget.data)} It was trained with batches of 64."


def _of(figure: str, layer: int) -> str:
    return f"{figure}, layer {layer}"


def _positions(network: Results, layer: int) -> float:
    return next(iter(network.values(_of("positions", layer))), 1.0)


def _of_layer(network: Results, figure: str, layer: int) -> LabSeries:
    """Against the number of values that the layer's channels have in a batch."""
    found = network.series(_of(figure, layer), "batch", f"layer {layer} of the network")
    return replace(found, x=tuple(size * _positions(network, layer) for size in SIZES))


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
    bias = float(differences[0] @ differences[1])
    found = {"gradient bias": math.copysign(math.sqrt(abs(bias)), bias) / float(exact.norm())}
    for number, (layer, calls) in enumerate(zip(layers, seen, strict=True), start=1):
        effect, positions = _design_effect(model, layer, pixels)
        figures = _of_calls(layer, calls, effect, (usable - size) / (usable - 1))
        figures |= {"positions": positions, "1 + (P - 1) rho": effect, "rho": (effect - 1) / max(positions - 1, 1)}
        found |= {_of(name, number): figure for name, figure in figures.items()}
    return found


def _of_calls(layer: BatchNorm, calls: Sequence[Call], effect: float, left: float) -> dict[str, float]:
    """Of batches, against the statistics that the layer has; means over channels and batches.

    Args:
        layer, calls: The layer, and what it got.
        effect: 1 + (P - 1) rho.
        left: What is left of a squared error where batches are drawn without replacement.
    """
    mean, variance = (torch.stack([getattr(call, name) for call in calls]) for name in ("mean", "variance"))
    n = calls[0].values
    r, d = corrections(mean, variance, layer.running_mean, layer.running_var)
    of_mean, of_deviation = d.square().mean().item(), (1 - r).square().mean().item()
    mismatch = of_mean + of_deviation
    worth = (equivalent_batch_size(mismatch) or math.inf) / n
    return {
        "D": mismatch,
        "r": r.mean().item(),
        "d": math.sqrt(of_mean),
        "variance error": (variance / layer.running_var * n / (n - 1) - 1).square().mean().item(),
        "n_eq over n": worth,
        "error of the mean": n * of_mean,
        "error of the deviation": 2 * n * of_deviation,
        "squared d over the formula's": n * of_mean / (effect * left),
    }


def _design_effect(model: nn.Module, layer: BatchNorm, pixels: Tensor) -> tuple[float, int]:
    """1 + (P - 1) rho of what the layer gets at inference, mean over channels, and the number of positions P.

    It is P times the variance of the means of images over the variance of all values.
    """
    model.eval()
    values = input_of(model, layer, pixels).flatten(2)
    of_images = values.mean(2).var(0, unbiased=False)
    positions = values.shape[2]
    return float((positions * of_images / values.var((0, 2), unbiased=False)).mean()), positions


def _gradient(model: nn.Module, pixels: Tensor, labels: Tensor, size: int) -> Tensor:
    """The mean gradient over batches of one size, of all parameters, shape (parameters,)."""
    model.zero_grad()
    parts = list(zip(pixels.split(size), labels.split(size), strict=True))
    for chosen, expected in parts:
        (F.cross_entropy(model(chosen), expected) / len(parts)).backward()
    return torch.cat([each.grad.flatten().clone() for each in model.parameters() if each.grad is not None])
