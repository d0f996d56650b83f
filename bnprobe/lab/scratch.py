"""``scratch``: a batch norm that is written from the equations, beside torch's and beside none.

First the layer alone, on random values: outputs in both modes, running statistics and the three gradients of section 3
of Ioffe & Szegedy 2015, each against torch's ``nn.BatchNorm2d``. Rounding is all that may differ. Then a network is
trained twice from one seed, with this layer and with torch's, and the losses are compared step by step. Last, the
network is trained to the end with this layer, with torch's and with no normalization.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from bnprobe.lab.data import Images, batches, load
from bnprobe.lab.experiment import (
    SHARE,
    Budget,
    Condition,
    Experiment,
    Results,
    Values,
    above,
    below,
    mean_of,
    near,
    told,
    within,
    worst,
)
from bnprobe.lab.layers import BatchNormByHand
from bnprobe.lab.networks import Norm, conv_net, conv_net_architecture, held_out_accuracy, no_norm, train
from bnprobe.numbers import score
from bnprobe.records import Claim, LabChart, LabTable

PRECISIONS: Mapping[str, torch.dtype] = {"float64": torch.float64, "float32": torch.float32}
ARMS: Mapping[str, Norm] = {
    "written from the equations": BatchNormByHand,
    "torch's": nn.BatchNorm2d,
    "none": no_norm,
}
OURS, TORCHS, NONE = ARMS
LAYER, STEPS, TRAINING = "layer", "steps", "training"

SHAPE = (32, 8, 7, 7)
"""Of the inputs of the layer alone: samples, channels, height, width."""

CHECKED: Mapping[str, Sequence[str]] = {
    "Outputs": ("output in training", "output at inference"),
    "Gradients": ("gradient of the input", "gradient of the weight", "gradient of the bias"),
    "Running statistics": ("running mean", "running variance"),
}
"""What of the layer is compared with torch's."""

BATCH, RATE = 64, 0.1
EPOCHS = 20
FIRST = 10
"""Steps in which training with both layers must agree."""


class Scratch(Experiment):
    """The layer alone in two precisions, the first steps in two precisions, and three networks trained to the end."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """Each part and what it compares."""
        return [
            *({"part": part, "precision": precision} for part in (LAYER, STEPS) for precision in PRECISIONS),
            *({"part": TRAINING, "normalization": name} for name in ARMS),
        ]

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """One part."""
        if condition["part"] == LAYER:
            return _layer(PRECISIONS[str(condition["precision"])])
        images = load(budget.data)
        if condition["part"] == STEPS:
            return _same_steps(images, PRECISIONS[str(condition["precision"])], seed, budget)
        return _training(images, ARMS[str(condition["normalization"])], seed, budget)

    def answer(self, results: Results, budget: Budget) -> str:
        """How near the layer is to torch's, and how fast the network learns with it."""

        ours, _, none = _trainings(results)
        worst = results.where(part=LAYER, precision="float64").largest(
            *(each for names in CHECKED.values() for each in names)
        )
        return (
            f"In float64 no figure of the layer is further than {told(worst)} from torch's, relatively. With it the"
            f" network takes {told(mean_of(_shares(ours, none)))} of the steps that the one without takes to its best"
            f" accuracy; at the end {told(ours.mean('accuracy'), SHARE)} of answers are right with it, and"
            f" {told(none.mean('accuracy'), SHARE)} without."
        )

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """Exactness first, then what the layer is good for."""
        layer, steps = results.where(part=LAYER), results.where(part=STEPS)
        values = math.prod(SHAPE) // SHAPE[1]
        for precision, dtype in PRECISIONS.items():
            for kind, names in CHECKED.items():
                yield within(
                    f"{kind} are those of torch's BatchNorm2d to rounding, in {precision}.",
                    f"Largest relative deviation, of all seeds (rounding of {values:,} values)",
                    layer.where(precision=precision).largest(*names),
                    rounding(values, dtype),
                )
        for precision, dtype in PRECISIONS.items():
            yield within(
                f"From the same seed, training with this layer takes the path of torch's: in the first {FIRST} steps"
                f" the losses agree in at least half of the digits of {precision}.",
                "Largest relative difference of losses, of all seeds",
                steps.where(precision=precision).largest("first steps"),
                math.sqrt(torch.finfo(dtype).eps),
            )
        ours, torchs, none = _trainings(results)
        yield near(
            "Trained to the end, the network is as good with this layer as with torch's.",
            "Held-out accuracy over that with torch's layer",
            ours.over("accuracy", torchs),
            0.01,
            trained=True,
        )
        yield below(
            "At the same learning rate, batch norm needs less than half of the steps that the network without takes to"
            " its best accuracy (figure 3 of the paper: 13.3 of 31.0 million).",
            "Steps to that accuracy over those without",
            mean_of(_shares(ours, none)),
            0.5,
        )
        yield above(
            "The network with batch norm ends with a higher held-out accuracy than the one without.",
            "Difference",
            ours.less("accuracy", none),
        )
        yield above(
            "With batch norm gradients vanish less on their way to the first layer.",
            "Gradient of the first convolution over that of the last, in the first epoch, less that without",
            ours.less("gradient ratio at the start", none),
        )

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """Trainings to the end, then how rounding grows."""
        ours, torchs, none = _trainings(results)
        epochs = _epochs(load(budget.data), budget)
        arms = {"batch norm from the equations": ours, "torch's": torchs, NONE: none}
        yield LabChart(
            "convergence",
            "Loss in training",
            "epochs",
            "cross entropy, mean over an epoch",
            tuple(arm.along("loss", epochs, name) for name, arm in arms.items()),
            (f"Learning rate {RATE} with momentum 0.9, batches of {BATCH}, for all.",),
            y_scale="log",
        )
        pair = {"batch norm": ours, NONE: none}
        accuracies = tuple(arm.along("accuracies", epochs, name) for name, arm in pair.items())
        yield LabChart("accuracy", "Held-out accuracy", "epochs", "share of right answers", accuracies, bounds=SHARE)
        yield LabChart(
            "gradients",
            "Length of the gradient",
            "epochs",
            "length, mean over an epoch",
            tuple(
                arm.along(f"gradient of the {layer} convolution", epochs, f"{layer} convolution, {name}")
                for name, arm in pair.items()
                for layer in ("first", "last")
            ),
            ("Where the two lines of a network are far apart, the gradient vanishes or explodes on its way.",),
            y_scale="log",
        )
        yield LabChart(
            "rounding",
            "How far losses with this layer and with torch's are apart",
            "steps",
            "difference of the losses over the loss",
            tuple(
                results.where(part=STEPS, precision=precision).along("difference", _steps(budget), precision)
                for precision in PRECISIONS
            ),
            (
                "Training magnifies rounding: after many steps two runs that differ in a last digit are apart. A mean"
                " difference of zero is not drawn.",
            ),
            x_scale="log",
            y_scale="log",
        )

    def tables(self, results: Results, budget: Budget) -> Iterator[LabTable]:
        """Every figure of the layer."""

        def shown(name: str, precision: str) -> str:
            found = results.where(part=LAYER, precision=precision).largest(name)
            return "" if math.isnan(found) else score(found)

        yield LabTable(
            "Largest relative deviation from torch's BatchNorm2d",
            ("figure", *PRECISIONS),
            tuple(
                (name, *(shown(name, precision) for precision in PRECISIONS))
                for names in CHECKED.values()
                for name in names
            ),
            ("Over the largest magnitude of the figure; of all seeds.",),
        )

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """The network."""
        yield conv_net_architecture(budget.data)


def _trainings(results: Results) -> list[Results]:
    """With this layer, with torch's and with none."""
    return [results.where(part=TRAINING, normalization=name) for name in ARMS]


def rounding(values: int, precision: torch.dtype) -> float:
    """The relative error of a sum of so many values, as rounding errors in random directions add up to."""
    return math.sqrt(values) * torch.finfo(precision).eps


# --- Trials -----------------------------------------------------------------------------------------------------------


def _layer(precision: torch.dtype) -> Values:
    """The largest deviation of each figure from torch's, over the largest magnitude of torch's."""
    ours, torchs = BatchNormByHand(SHAPE[1]).to(precision), nn.BatchNorm2d(SHAPE[1]).to(precision)
    for parameter, other in zip(ours.parameters(), torchs.parameters(), strict=True):
        nn.init.normal_(parameter, 1.0, 0.5)
        other.data.copy_(parameter.data)
    inputs = [3 + 2 * torch.randn(SHAPE, dtype=precision) for _ in range(10)]
    weighing = torch.randn(SHAPE, dtype=precision)
    found, expected = (_figures(layer, inputs, weighing) for layer in (ours, torchs))
    return {
        name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item()
        for names in CHECKED.values()
        for name in names
    }


def _figures(layer: nn.Module, inputs: Sequence[Tensor], weighing: Tensor) -> Mapping[str, Tensor]:
    """What is compared: after training on all inputs, with the weighted sum of the last outputs as the loss."""
    for each in inputs[:-1]:
        layer(each)
    x = inputs[-1].clone().requires_grad_()
    y = layer(x)
    by_x, by_weight, by_bias = torch.autograd.grad((y * weighing).sum(), [x, *layer.parameters()])
    return {
        "output in training": y.detach(),
        "output at inference": layer.eval()(x).detach(),
        "gradient of the input": by_x,
        "gradient of the weight": by_weight,
        "gradient of the bias": by_bias,
        "running mean": layer.get_buffer("running_mean"),
        "running variance": layer.get_buffer("running_var"),
    }


def _same_steps(images: Images, precision: torch.dtype, seed: int, budget: Budget) -> Values:
    """Train with both layers from one seed; how far the losses of each step are apart."""
    steps = _steps(budget)
    ours, torchs = (_losses(images, ARMS[name], precision, seed, steps[-1]) for name in (OURS, TORCHS))
    apart = [abs(here - there) / there for here, there in zip(ours, torchs, strict=True)]
    return {"first steps": worst(apart[:FIRST]), "difference": [apart[step - 1] for step in steps]}


def _losses(images: Images, norm: Norm, precision: torch.dtype, seed: int, steps: int) -> list[float]:
    torch.manual_seed(seed)
    model = conv_net(images.train.shape[1:], images.classes, norm).to(precision)
    draws = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    drawn = batches(images.train.to(precision), images.train_labels, BATCH, steps, draws)
    train(model, drawn, RATE, lambda _, loss: losses.append(loss))
    return losses


def _training(images: Images, norm: Norm, seed: int, budget: Budget) -> Values:
    """Loss, accuracy and gradients of each epoch."""
    model = conv_net(images.train.shape[1:], images.classes, norm)
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    names = ["loss", *(f"gradient of the {which} convolution" for which in ("first", "last")), "gradient"]
    sums = dict.fromkeys(names, 0.0)
    found: dict[str, list[float]] = {name: [] for name in (*names, "accuracies")}
    per_epoch = _steps_of_epoch(budget)

    def after_step(step: int, loss: float) -> None:
        lengths = [_length(each) for each in (convolutions[0], convolutions[-1], model)]
        for name, value in zip(names, (loss, *lengths), strict=True):
            sums[name] += value / per_epoch
        if (step + 1) % per_epoch == 0:
            for name in names:
                found[name].append(sums[name])
                sums[name] = 0.0
            found["accuracies"].append(held_out_accuracy(model, images.test, images.test_labels))
            model.train()

    draws = torch.Generator().manual_seed(seed)
    train(model, batches(images.train, images.train_labels, BATCH, EPOCHS * per_epoch, draws), RATE, after_step)
    first, last = (found[f"gradient of the {which} convolution"][0] for which in ("first", "last"))
    return {**found, "accuracy": found["accuracies"][-1], "gradient ratio at the start": first / last}


def _length(module: nn.Module) -> float:
    """Of the gradient of a module's weights and biases, as one vector."""
    return math.sqrt(sum(each.grad.square().sum().item() for each in module.parameters() if each.grad is not None))


def _steps_of_epoch(budget: Budget) -> int:
    """21 batches of 64 are an epoch of the digits."""
    return budget.of(21, 2)


def _epochs(images: Images, budget: Budget) -> list[float]:
    """The epochs after which figures are taken."""
    each = _steps_of_epoch(budget) * BATCH / len(images.train)
    return [round(number * each, 1 if each > 0.5 else 2) for number in range(1, EPOCHS + 1)]


def _steps(budget: Budget) -> list[int]:
    """The steps at which losses are compared."""
    most = budget.of(200, 2 * FIRST)
    return [step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if step <= most]


def _shares(ours: Results, none: Results) -> list[float]:
    """The steps to the best accuracy of the other network over those that it took itself, for each seed.

    A network that never gets there counts with all its steps.
    """

    def accuracies(results: Results) -> dict[int, list[float]]:
        lists = {trial.seed: trial.values.get("accuracies") for trial in results}
        return {seed: [each or 0.0 for each in found] for seed, found in lists.items() if isinstance(found, tuple)}

    here, there = accuracies(ours), accuracies(none)
    shares = []
    for seed in here.keys() & there.keys():
        best = max(there[seed])
        reached = (epoch for epoch, accuracy in enumerate(here[seed], 1) if accuracy >= best)
        shares.append(next(reached, len(here[seed])) / (there[seed].index(best) + 1))
    return shares
