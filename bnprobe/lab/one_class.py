"""``one-class``: what normalized activations still tell of the class when every batch holds a single one.

A network learns from source images; the target is other images, with less contrast, brighter, or blurred. At test time
they come in batches of one class, as a camera that looks at one thing for a while. Statistics of such a batch are those
of its class. Normalizing with them gives each channel the same mean in every class, so that a linear probe on the means
of channels can tell nothing. But they show through: where an image is empty, its value becomes -mean/deviation of the
batch, which tells the class of the whole batch. So a stranger is looked at as well: one image in a batch of another
class, which a probe takes for what it is or for its company.

What activations tell is measured by probes that learn on one part of the target and predict another: the mutual
information of prediction and class is a lower bound on that of activations and class (data processing inequality). The
estimate from counts is too large, by (K_both - K_class - K_prediction + 1) / 2N nats to first order, with K the values
and pairs of values that occur and N the images; this is subtracted (Miller 1955).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

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
    below,
    series,
    told,
    within,
    worst,
)
from bnprobe.lab.layers import SCHEDULE, Affine, BatchNorm, BatchRenorm, layer_norm, opening, set_limits
from bnprobe.lab.networks import Norm, conv_net, conv_net_architecture, keep_statistics, take_population, train
from bnprobe.numbers import joined
from bnprobe.records import Claim, LabChart

STEPS, BATCH, RATE = 150, 64, 0.05
"""Of the training on the source."""

ONE_CLASS, MIXED = "one class", "mixed"
TEST_BATCH = 32
"""Images of a target batch."""

TARGETS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "less contrast": lambda images: 0.4 * images,
    "brighter": lambda images: images + 1.5,
    "blurred": lambda images: F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False),
}
"""Make target images from standardized ones."""

BATCH_STATISTICS = "batch norm, train mode"
SOURCE = "batch norm, source statistics"
RECALIBRATED = "batch norm, recalibrated"
RENORM = "Batch Renorm, train mode"
LAYER_NORM = "layer norm"

STATES: Mapping[str, Norm] = {
    BATCH_STATISTICS: BatchNorm,
    SOURCE: BatchNorm,
    RECALIBRATED: BatchNorm,
    RENORM: lambda channels: BatchRenorm(channels, r_max=1.0, d_max=0.0),
    LAYER_NORM: layer_norm,
}
"""Layers, and with which statistics they normalize the target."""

IN_TRAIN_MODE = (BATCH_STATISTICS, RENORM)
"""To the others it is all the same which images are in a batch; layer norm has one mode."""

MEANS, POSITIONS = "channel means", "all positions"
GRID = 8
NEIGHBOURS = 5
RIDGE = 0.01

STRANGERS = 60
"""Images of each target that are put into batches of another class."""


class OneClass(Experiment):
    """What each layer tells of each target."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """Every layer on batches of one class, and batch norm in train mode on mixed ones."""
        return [
            *({"layer": state, "batches": ONE_CLASS} for state in STATES),
            {"layer": BATCH_STATISTICS, "batches": MIXED},
        ]

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Train on half of the images, then look at the activations of the rest as they are changed."""
        images = load(budget.data)
        state, sort = str(condition["layer"]), condition["batches"] == ONE_CLASS
        half = len(images.train) // 2
        probed = slice(half, half + POPULATION)
        draws = torch.Generator().manual_seed(seed)
        model = conv_net(images.train.shape[1:], images.classes, STATES[state])
        steps = budget.of(STEPS, 3)
        schedule = opening(steps)
        train(
            model,
            batches(images.train[:half], images.train_labels[:half], BATCH, steps, draws),
            RATE,
            lambda step, loss: set_limits(model, *schedule.at(step + 1)),
        )
        keep_statistics(model)  # so that what is measured does not depend on what was measured before
        found = []
        for change in TARGETS.values():
            learned, held = change(images.train[probed]), change(images.test)
            if state == RECALIBRATED:
                take_population(model, learned)
            model.train(state in IN_TRAIN_MODE)
            here = _look(model, learned, images.train_labels[probed], sort)
            told = _told(here, _look(model, held, images.test_labels, sort), images.classes)
            if sort:
                told |= _strangers(model, held, images, here, budget.of(STRANGERS, 10), draws)
            found.append(told)
        means = {name: math.fsum(each[name] for each in found) / len(found) for name in found[0]}
        by_target = {f"accuracy, {name}": each["accuracy"] for name, each in zip(TARGETS, found, strict=True)}
        return {**means, **by_target}

    def answer(self, results: Results, budget: Budget) -> str:
        """The bits that are left, in batches of one class."""

        states = (BATCH_STATISTICS, SOURCE, RENORM, LAYER_NORM)

        def bits(what: str) -> str:
            figures = (results.where(layer=state, batches=ONE_CLASS).mean(_name(3, what, "linear")) for state in states)
            return joined([f"{told(found)} ({state})" for state, found in zip(states, figures, strict=True)])

        return (
            f"To a linear probe, {MEANS} of the last normalization tell so many bits of the class: {bits(MEANS)};"
            f" {POSITIONS}: {bits(POSITIONS)}."
        )

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """What each layer leaves, and what the network makes of it."""
        one = {state: results.where(layer=state, batches=ONE_CLASS) for state in STATES}
        batch, source = one[BATCH_STATISTICS], one[SOURCE]
        means, positions = _name(3, MEANS, "linear"), _name(3, POSITIONS, "linear")
        yield within(
            "In batches of one class, batch norm in train mode erases the class from the means of channels exactly.",
            "Share of the variance of channel means that is between classes, at most in any layer",
            batch.largest("between classes"),
            1e-6,
        )
        for where, name in ((MEANS, means), (POSITIONS, positions)):
            yield above(
                f"Statistics of the source keep more of the class than those of the batch ({where}).",
                "Difference in bits",
                source.less(name, batch),
            )
        yield above(
            "What positions then tell is the company: a probe takes a stranger for one of the other class more often"
            " than for itself, under batch norm in train mode.",
            "Difference of shares",
            batch.less("taken for its company", batch, "taken for itself"),
        )
        yield below(
            "With statistics of the source a probe takes a stranger for itself more often than for its company.",
            "Difference of shares",
            source.less("taken for its company", source, "taken for itself"),
        )
        for which, state in (
            ("Batch Renorm, in train mode as well,", RENORM),
            ("Layer norm, which sees no batch,", LAYER_NORM),
        ):
            yield above(
                f"{which} keeps more of the class than batch norm ({MEANS}).",
                "Difference in bits",
                one[state].less(means, batch),
            )
        yield below(
            "The network itself is less accurate on batches of one class than on mixed ones, in train mode.",
            "Difference of accuracy",
            batch.less("accuracy", results.where(layer=BATCH_STATISTICS, batches=MIXED)),
        )
        yield above(
            "Recalibrated on the target, it is more accurate than with statistics of the source.",
            "Difference of accuracy",
            one[RECALIBRATED].less("accuracy", source),
        )

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """What each layer tells, and whom it takes a stranger for."""
        one = results.where(batches=ONE_CLASS)
        told = {_name(3, what, probe): f"{what}, {probe}" for what in (MEANS, POSITIONS) for probe in PROBES}
        yield LabChart(
            "told",
            "What the last normalization tells of the class, in batches of one class",
            "layer",
            "bits",
            one.several_series("layer", told),
            (
                "A class has log2 of the number of classes in bits, where all are as frequent. Layers in eval mode and"
                " layer norm see no batch: they tell the same in any.",
            ),
        )
        yield LabChart(
            "strangers",
            "What a probe takes a stranger for: an image in a batch of another class",
            "layer",
            "share of strangers",
            one.several_series("layer", {name: name for name in ("taken for itself", "taken for its company")}),
            ("The linear probe on all positions, which learned from batches of one class.",),
            bounds=SHARE,
        )
        depths = [_name(depth, POSITIONS, "linear") for depth in (1, 2, 3)]
        yield LabChart(
            "depth",
            "What each normalization tells to a linear probe on all positions, in batches of one class",
            "normalization, from the input",
            "bits",
            tuple(
                series(state, ["first", "second", "third"], [one.where(layer=state).mean(name) for name in depths])
                for state in STATES
            ),
        )
        yield LabChart(
            "accuracy",
            "Accuracy of the network itself, in batches of one class",
            "layer",
            "share of right answers",
            one.several_series("layer", {f"accuracy, {target}": target for target in TARGETS}),
            bounds=SHARE,
        )

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """What probes learned from, and what their bits are."""
        yield conv_net_architecture(budget.data)
        yield (
            "The network learned from half of the training images. Probes learned from the other half, changed as the"
            " target is, and predict the images that were held out, changed alike. Figures without a target are means"
            " over all of them."
        )
        yield (
            f"The linear probe is ridge regression on the classes, the other the vote of {NEIGHBOURS} nearest"
            " neighbours. Bits are the mutual information of prediction and class, less the first-order bias of counts:"
            " a lower bound on what activations tell. (Without a wrong prediction the correction puts it a hundredth of"
            " a bit above the entropy of the classes.)"
        )
        yield (
            f"Where activations have more than {GRID} x {GRID} positions, means over the parts of such a grid stand for"
            " all."
        )
        yield "Recalibrated statistics are those of all target images that probes learn from, taken together."
        yield SCHEDULE


class Looked(NamedTuple):
    """What was seen of images, batch after batch: the output of each normalization, the answers, the classes."""

    activations: list[Tensor]
    answers: Tensor
    labels: Tensor


def _strangers(
    model: nn.Sequential, pixels: Tensor, images: Images, learned: Looked, count: int, draws: torch.Generator
) -> dict[str, float]:
    """What the linear probe takes an image for that is in a batch of another class: shares of so many images."""
    labels = images.test_labels
    taken = torch.randperm(len(labels), generator=draws)[:count]
    seen, company = [], []
    for stranger in taken.tolist():
        others = (labels != labels[stranger]).nonzero()[:, 0]
        host = labels[others[int(torch.randint(len(others), (), generator=draws))]]
        members = (labels == host).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=draws)[: TEST_BATCH - 1]]
        batch = torch.cat([torch.tensor([stranger]), members])
        seen.append(_look(model, pixels[batch], labels[batch], sort=False).activations[-1][:1])
        company.append(host)
    read = _READINGS[POSITIONS]
    x, y = _standardized(read(learned.activations[-1]), read(torch.cat(seen)))
    predicted = linear(x, learned.labels, y, images.classes)
    return {
        "taken for itself": float((predicted == labels[taken]).double().mean()),
        "taken for its company": float((predicted == torch.stack(company)).double().mean()),
    }


def _look(model: nn.Sequential, pixels: Tensor, labels: Tensor, sort: bool) -> Looked:
    """Pass images through the network in batches, of one class each if they are to be sorted."""
    order = torch.arange(len(labels))
    groups = [order[labels == label] for label in labels.unique()] if sort else [order]
    outputs: dict[int, list[Tensor]] = {}
    answers = []
    with torch.no_grad():
        for chosen in (part for group in groups for part in group.split(TEST_BATCH)):
            x = pixels[chosen]
            for place, layer in enumerate(model):
                x = layer(x)
                if isinstance(layer, Affine):  # of which all normalizations are
                    outputs.setdefault(place, []).append(x)
            answers.append(x.argmax(1))
    return Looked([torch.cat(each) for each in outputs.values()], torch.cat(answers), labels[torch.cat(groups)])


def _told(learned: Looked, held: Looked, classes: int) -> dict[str, float]:
    """Bits that probes read from each layer, and the accuracy of the network itself."""
    (activations, _, labels), (others, answers, expected) = learned, held
    found = {"accuracy": float((answers == expected).double().mean())}
    shares = []
    for depth, (here, there) in enumerate(zip(activations, others, strict=True), start=1):
        shares.append(between_classes(here.mean((2, 3)), labels))
        for what, read in _READINGS.items():
            x, y = _standardized(read(here), read(there))
            for probe, predict in PROBES.items():
                found[_name(depth, what, probe)] = bits(predict(x, labels, y, classes), expected)
    return {**found, "between classes": worst(shares)}


def _positions(activations: Tensor) -> Tensor:
    """Every position as a feature, or every part of a grid of means: probes of all of a large image take hours."""
    height, width = activations.shape[2:]
    return F.adaptive_avg_pool2d(activations, (min(height, GRID), min(width, GRID))).flatten(1)


_READINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    MEANS: lambda activations: activations.mean((2, 3)),
    POSITIONS: _positions,
}


def _standardized(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both by the mean and the standard deviation of the first, of each feature; one that does not vary is 0.

    In double precision, and what varies by no more than rounding does not vary.
    """
    mean, std = x.double().mean(0), x.double().std(0)
    scale = torch.where(std > 1e-5, 1 / std, 0.0)
    return (x - mean) * scale, (y - mean) * scale


def linear(x: Tensor, labels: Tensor, y: Tensor, classes: int) -> Tensor:
    """The classes of ``y`` by ridge regression on ``x``, standardized, shapes (images, features).

    The weights are (X'X + ridge)^-1 X'T = X'(XX' + ridge)^-1 T, of which the smaller matrix is inverted.
    """
    targets = F.one_hot(labels, classes).to(x.dtype)
    centre = targets.mean(0)
    ridge = RIDGE * len(x) * torch.eye(min(x.shape), dtype=x.dtype)
    if x.shape[1] > len(x):
        weights = x.T @ torch.linalg.solve(x @ x.T + ridge, targets - centre)
    else:
        weights = torch.linalg.solve(x.T @ x + ridge, x.T @ (targets - centre))
    scores: Tensor = centre + y @ weights
    return scores.argmax(1)


def neighbours(x: Tensor, labels: Tensor, y: Tensor, classes: int) -> Tensor:
    """The classes of ``y`` by the vote of the nearest of ``x``, shapes (images, features)."""
    nearest = torch.cdist(y, x).topk(min(NEIGHBOURS, len(x)), largest=False).indices
    return F.one_hot(labels[nearest], classes).sum(1).argmax(1)


PROBES: Mapping[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "linear": linear,
    "neighbours": neighbours,
}


def bits(predicted: Tensor, labels: Tensor) -> float:
    """The mutual information of two discrete values in bits, from counts, less its first-order bias (Miller 1955)."""
    both = torch.zeros(int(predicted.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    both.index_put_((predicted, labels), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    rows, columns = both.sum(1), both.sum(0)
    bias = (int((both > 0).sum()) - int((rows > 0).sum()) - int((columns > 0).sum()) + 1) / (2 * len(labels))
    return (_entropy(rows) + _entropy(columns) - _entropy(both) - bias) / math.log(2)


def _entropy(counts: Tensor) -> float:
    """Of the frequencies, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return -float((shares * shares.log()).sum())


def between_classes(values: Tensor, labels: Tensor) -> float:
    """The share of the variance that is between the means of classes, of all features together."""
    x = values.double() - values.double().mean(0)
    members = F.one_hot(labels).double()
    sizes = members.sum(0)[:, None].clamp_min(1)
    means = members.T @ x / sizes
    return float((sizes * means.square()).sum() / x.square().sum().clamp_min(1e-30))


def _name(depth: int, what: str, probe: str) -> str:
    return f"bits of layer {depth}, {what}, {probe}"
