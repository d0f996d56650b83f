"""``single``: can a network learn from batches of one image?

Batch norm on one image is instance norm in training: its statistics are those of the image's own positions. At
inference it is another function, with averages over many images. Each layer here sees the same images in the same
order, one at a time, and is scored at inference against the default build: batch norm with batches of 32. It has failed
where the accuracy falls by 15% or more.

As a step is over one image instead of 32, its learning rate is a 32nd, and moving averages move a 32nd as fast, so that
both reach over as many images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from bnprobe.lab.data import batches, load
from bnprobe.lab.experiment import (
    NOT_NEGATIVE,
    SHARE,
    Budget,
    Condition,
    Experiment,
    Results,
    Values,
    above,
    below,
    near,
    series,
    told,
)
from bnprobe.lab.layers import SCHEDULE, BatchNorm, BatchRenorm, instance_norm, opening, set_limits
from bnprobe.lab.networks import accuracy, conv_net, conv_net_architecture, held_out_accuracy, train
from bnprobe.nn import GatedBatchNorm2d
from bnprobe.numbers import joined
from bnprobe.records import Claim, LabChart

IMAGES, BATCH = 4096, 32
"""Images that each network learns from, and those of a batch of the default build."""

POINTS = 8
"""Times at which the accuracy is measured."""

RATE, MOMENTUM = 0.05, 0.1
"""Of the default build: learning rate, and weight of a batch in moving averages."""

LEAST = 0.85
"""Part of the default build's accuracy that a layer must keep."""

DEFAULT = "batch norm, batches of 32"
BATCH_NORM, QUICK = "batch norm", "batch norm of momentum 0.1"
INSTANCE_NORM, RENORM, GATED = "instance norm", "Batch Renorm", "gated batch norm"

LAYERS: Mapping[str, Callable[[int, float], nn.Module]] = {
    DEFAULT: BatchNorm,
    BATCH_NORM: BatchNorm,
    QUICK: lambda channels, _: BatchNorm(channels, MOMENTUM),
    INSTANCE_NORM: lambda channels, _: instance_norm(channels),
    RENORM: lambda channels, momentum: BatchRenorm(channels, momentum, r_max=1.0, d_max=0.0),
    GATED: lambda channels, momentum: GatedBatchNorm2d(channels, momentum=momentum),
}
"""Make the normalization of so many channels, with such a momentum of the moving averages."""

SINGLE = [name for name in LAYERS if name != DEFAULT]
"""Those on batches of one image."""

IN_TRAIN_MODE = "accuracy in train mode"


class Single(Experiment):
    """Each layer, with batches of one image; batch norm with batches of 32 beside them."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """What is compared."""
        return [{"layer": name} for name in LAYERS]

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Train, and score in both modes."""
        images = load(budget.data)
        name = str(condition["layer"])
        size = BATCH if name == DEFAULT else 1
        momentum = 1 - (1 - MOMENTUM) ** (size / BATCH)
        model = conv_net(images.train.shape[1:], images.classes, lambda channels: LAYERS[name](channels, momentum))
        between = _between(budget)
        steps = POINTS * between // size
        schedule = opening(steps)
        found: dict[str, float] = {}

        def after_step(step: int, loss: float) -> None:
            set_limits(model, *schedule.at(step + 1))
            seen = (step + 1) * size
            if seen % between == 0:
                found[_after("accuracy", seen)] = held_out_accuracy(model, images.test, images.test_labels)
                for number, gate in enumerate(_gates(model), start=1):
                    found[_after(f"gate of layer {number}", seen)] = gate

        draws = torch.Generator().manual_seed(seed)
        train(model, batches(images.train, images.train_labels, size, steps, draws), RATE * size / BATCH, after_step)
        gates = _gates(model)
        return {
            "accuracy": held_out_accuracy(model, images.test, images.test_labels),
            IN_TRAIN_MODE: accuracy(model.train(), images.test, images.test_labels, batch=size),
            "gate": sum(gates) / len(gates) if gates else None,
            **found,
        }

    def answer(self, results: Results, budget: Budget) -> str:
        """What each layer keeps of the accuracy."""
        default = results.where(layer=DEFAULT)
        kept = {name: results.where(layer=name).over("accuracy", default) for name in SINGLE if name != QUICK}
        return (
            f"Of the accuracy of batch norm with batches of {BATCH}, single images leave"
            f" {joined([f'{told(share)} with {name}' for name, share in kept.items()])}; {LEAST:g} is asked for."
        )

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """Against the criterion, layer by layer."""
        for name in SINGLE:
            yield above(
                f"On single images, {name} keeps at least 85% of the accuracy of the default build.",
                "Accuracy over that of the default build",
                results.where(layer=name).over("accuracy", results.where(layer=DEFAULT)),
                LEAST,
            )
        yield near(
            "On single images, batch norm learns what instance norm does, and is as good as long as it stays in train"
            " mode.",
            "Accuracy in train mode over that of instance norm",
            results.where(layer=BATCH_NORM).over(IN_TRAIN_MODE, results.where(layer=INSTANCE_NORM), "accuracy"),
            0.02,
            trained=True,
        )
        yield below(
            "The gates learn that one image says less than the moving averages.",
            "Mean gate, the weight of the image's own statistics",
            results.where(layer=GATED).mean("gate"),
            0.5,
        )

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """The criterion, accuracies while learning, and gates."""
        by_layer = {name: results.where(layer=name) for name in LAYERS}
        kept = {"at inference": "accuracy", "in train mode, one image at a time": IN_TRAIN_MODE}
        yield LabChart(
            "criterion",
            "Accuracy on batches of one image",
            "layer",
            "share of the default build's",
            tuple(
                series(name, SINGLE, [by_layer[each].over(figure, by_layer[DEFAULT], "accuracy") for each in SINGLE])
                for name, figure in kept.items()
            ),
            ("The default build is batch norm with batches of 32 at inference; the criterion is 0.85 of it.",),
            bounds=NOT_NEGATIVE,
        )
        seen = _seen(budget)
        yield LabChart(
            "learning",
            "Accuracy while learning",
            "images seen",
            "share of right answers, held out",
            tuple(
                series(name, seen, [found.mean(_after("accuracy", each)) for each in seen])
                for name, found in by_layer.items()
            ),
            bounds=SHARE,
        )
        gates = {f"layer {number}": f"gate of layer {number}" for number in (1, 2, 3)}
        yield LabChart(
            "gates",
            "What the gates learn",
            "images seen",
            "mean weight of the image's own statistics",
            tuple(
                series(name, seen, [by_layer[GATED].mean(_after(gate, each)) for each in seen])
                for name, gate in gates.items()
            ),
            ("All gates start at 0.5. The loss that they learn from is that in train mode.",),
            bounds=SHARE,
        )

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """What is the same for all."""
        yield conv_net_architecture(budget.data)
        yield (
            "Gated batch norm: z = g z_image + (1 - g) z_average in training, of the image normalized with its own"
            " statistics and with the moving averages, where the gate g of each channel is learned; z = z_average at"
            " inference."
        )
        yield (
            f"All see the same images: {_seen(budget)[-1]:,}, one at a time with learning rate {RATE}/{BATCH}, or"
            f" {BATCH} at a time with {RATE}."
        )
        yield (
            f"Moving averages reach over as many images: their momentum of {MOMENTUM} for batches of {BATCH} is"
            f" {1 - (1 - MOMENTUM) ** (1 / BATCH):.4f} for single images, but for the layer that keeps {MOMENTUM}."
        )
        yield SCHEDULE


def _seen(budget: Budget) -> list[int]:
    """The images after which accuracies are taken."""
    return [point * _between(budget) for point in range(1, POINTS + 1)]


def _between(budget: Budget) -> int:
    """Images between two measurements: so many batches of the default build."""
    return budget.of(IMAGES // POINTS // BATCH) * BATCH


def _after(name: str, seen: int) -> str:
    return f"{name} after {seen} images"


def _gates(model: nn.Module) -> list[float]:
    """The mean gate of each gated layer."""
    return [layer.gate.mean().item() for layer in model.modules() if isinstance(layer, GatedBatchNorm2d)]
