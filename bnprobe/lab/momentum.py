"""``momentum``: how far the running statistics lag behind, where the data shifts and where the network learns fast.

In training, running statistics move toward each batch by the momentum m (torch's convention: the weight of the newest
batch), so that a change is followed as 1 - (1 - m)^t after t batches: with the time constant -1 / ln(1 - m).

Networks are trained with each momentum, on classes of which half are drawn nine times as often as the others. Then the
held-out images shift in one of three ways. First the network is scored in eval mode as it was trained; then batches of
shifted images pass in train mode, by which nothing but running statistics changes, and the network is scored in eval
mode again, as with test-time adaptation (Schneider et al. 2020). A second training has a high rate, at which weights
change within the time constant of a small momentum.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from statistics import linear_regression

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.lab.data import POPULATION, Images, load
from bnprobe.lab.experiment import (
    SHARE,
    Budget,
    Condition,
    Experiment,
    MissingFigureError,
    Results,
    Values,
    above,
    average,
    below,
    cell,
    formula,
    near,
    series,
    told,
    within,
    worst,
)
from bnprobe.lab.layers import EPS, BatchNorm
from bnprobe.lab.networks import batch_norms, conv_net, conv_net_architecture, train
from bnprobe.numbers import count, joined, percent
from bnprobe.records import Claim, LabChart, LabTable

MOMENTA = (0.9, 0.5, 0.1, 0.03, 0.01, 0.003)
USUAL, FAST, SLOW = 0.1, 0.5, 0.01
LOW, HIGH = 0.05, 1.0
"""Learning rates of the two trainings."""

BATCH = 64
STEPS = 200
OFTEN = 9
"""How many times as often as the others the first half of classes is drawn."""

NONE, CLASSES, BRIGHTNESS, DOMAIN = "no shift", "swapped classes", "brightness", "another domain"
SHIFTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    NONE: lambda images: images,
    CLASSES: lambda images: images,
    BRIGHTNESS: lambda images: images + 1.0,
    DOMAIN: lambda images: 0.5 * F.avg_pool2d(images, 3, stride=1, padding=1) + 0.3 * torch.randn_like(images),
}
"""What is done to standardized images: 1 is a standard deviation; another domain is blurred, of half the contrast, and
noisy. Swapped classes have other frequencies alone."""

BACK, LAST = 0.02, 5
"""An accuracy is back where it is so close to the mean of so many scores at the end."""

CONSTANTS = 5
"""Time constants for which shifted batches pass."""

EARLY = 10
"""Batches after which momenta are compared."""


class Momentum(Experiment):
    """Two trainings with each momentum; after the slower one, each shift."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """Each momentum with both rates."""
        for rate in (LOW, HIGH):
            for momentum in MOMENTA:
                yield {"rate": rate, "momentum": momentum}

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Train, then shift."""
        images, rate, momentum = load(budget.data), float(condition["rate"]), float(condition["momentum"])
        model = conv_net(images.train.shape[1:], images.classes, functools.partial(BatchNorm, momentum=momentum))
        found = dict(_trained(model, images, rate, seed, budget))
        if rate == LOW:
            for shift in SHIFTS:
                found |= _shifted(model, images, shift, seed, budget)
        return found

    def answer(self, results: Results, budget: Budget) -> str:
        """What momenta keep of the accuracy, and when it is back."""
        slowly = results.where(rate=LOW)
        kept, batches = (
            joined([f"{told(slowly.where(momentum=m).mean(figure))} with momentum {m:g}" for m in (FAST, USUAL, SLOW)])
            for figure in (_as_trained(BRIGHTNESS), f"batches, {BRIGHTNESS}")
        )
        return (
            f"Under another brightness the accuracy of a network as it was trained is {kept}. Batches of it in train"
            f" mode bring the accuracy back to within {BACK:g} of where it ends: {batches}. Their number grows as the"
            f" time constant -1/ln(1-m) to the power of {told(slowly.mean_over_seeds(_slope))}."
        )

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """The formula, then who survives what, then the lag in training."""
        yield within(
            "The momentum does not change what is learned: in training, batch statistics alone normalize.",
            "Largest difference of the last losses from those with momentum 0.1, of all seeds",
            _difference_of_losses(results),
            0.0,
        )
        yield from _claims_of_shifts(results.where(rate=LOW))
        yield from _claims_of_lag(results)

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """Recovery in full, its times, where it starts from, and the lag in training."""
        slowly = results.where(rate=LOW)
        by_momentum = {f"momentum {momentum:g}": momentum for momentum in MOMENTA}
        yield LabChart(
            "recovery",
            "Accuracy in eval mode while brighter batches pass in train mode",
            "batches of the shifted images",
            "share of right answers",
            tuple(
                slowly.where(momentum=momentum).along(f"accuracies, {BRIGHTNESS}", _grid(momentum, budget), name)
                for name, momentum in by_momentum.items()
            ),
            (f"Each momentum is followed for {CONSTANTS} time constants.",),
            x_scale="log",
            bounds=SHARE,
        )
        constants = [round(time_constant(momentum), 2) for momentum in MOMENTA]
        figures = {shift: f"batches, {shift}" for shift in (BRIGHTNESS, DOMAIN)}
        figures["measured time constant"] = "time constant"
        yield LabChart(
            "time",
            f"Batches until the accuracy is within {BACK:g} of where it ends",
            "time constant -1/ln(1-m), batches",
            "batches",
            (
                *(
                    series(name, constants, [slowly.where(momentum=each).mean(figure) for each in MOMENTA])
                    for name, figure in figures.items()
                ),
                formula("the formula's time constant", constants, lambda constant: constant),
            ),
            x_scale="log",
            y_scale="log",
        )
        as_trained = (
            series(name, list(SHIFTS), [slowly.where(momentum=each).mean(_as_trained(shift)) for shift in SHIFTS])
            for name, each in by_momentum.items()
        )
        title = "Accuracy in eval mode as trained"
        yield LabChart(
            "shifts", title, "shift at validation", "share of right answers", tuple(as_trained), bounds=SHARE
        )
        yield LabChart(
            "lag",
            "How far running means are from those of the population, in training",
            "momentum",
            "root mean square, standard deviations",
            tuple(results.series("distance", "momentum", f"learning rate {rate:g}", rate=rate) for rate in (HIGH, LOW)),
            ("Small momenta lag, and keep some of the initial values; large ones have the noise of a batch.",),
            x_scale="log",
            y_scale="log",
        )

    def tables(self, results: Results, budget: Budget) -> Iterator[LabTable]:
        """Accuracies as trained and later."""
        slowly = results.where(rate=LOW)
        scores = (("as trained", _as_trained), (f"{EARLY} batches", _early), ("at the end", _at_last))
        yield LabTable(
            "Accuracy in eval mode, before and while shifted batches pass in train mode",
            ("shift", *(f"m = {momentum:g}" for momentum in MOMENTA)),
            tuple(
                (f"{shift}, {when}", *(cell(slowly.where(momentum=each).mean(name(shift)), SHARE) for each in MOMENTA))
                for shift in SHIFTS
                for when, name in scores
            ),
            (
                f"The end is the mean of the last {LAST} scores, up to {CONSTANTS} time constants, {2 * EARLY} batches"
                " at least.",
            ),
        )

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """What swapped classes are, and which averages still know where they started."""
        yield conv_net_architecture(budget.data)
        yield (
            f"Swapped classes: the first half of the classes is drawn {OFTEN} times as often as the others in training,"
            " and the others as often at validation; images and labels are as they are. Accuracies weigh classes by"
            " these frequencies."
        )
        steps = budget.of(STEPS, 20)
        for momentum in MOMENTA:
            if (left := (1 - momentum) ** steps) > 0.01:
                yield (
                    f"After the {count(steps, 'step')} of training {percent(left)} of the running statistics with"
                    f" momentum {momentum:g} are still the initial ones, mean 0 and variance 1."
                )


def _claims_of_shifts(slowly: Results) -> Iterator[Claim]:
    usual, fast, slow = (slowly.where(momentum=momentum) for momentum in (USUAL, FAST, SLOW))
    yield near(
        "Running statistics follow a shift with the time constant -1/ln(1-m).",
        "Time constant over the formula's, mean over momenta (running mean of the first layer, brightness)",
        slowly.mean_over_seeds(_constant_over_formula),
        0.05,
    )
    yield near(
        "The batches until the accuracy is back grow in proportion to the time constant.",
        f"Slope of their logarithm against that of the time constant, momenta from {SLOW} to {FAST}, mean of brightness"
        " and domain",
        slowly.mean_over_seeds(_slope),
        0.1,
        trained=True,
    )
    yield below(
        "A brightness that only validation has costs accuracy.",
        f"Accuracy less that without a shift, momentum {USUAL}",
        usual.less(_as_trained(BRIGHTNESS), usual, _as_trained(NONE)),
    )
    yield above(
        f"As it was trained, a network with momentum {FAST} survives the brightness better than one with {SLOW}.",
        "Difference",
        fast.less(_as_trained(BRIGHTNESS), slow),
    )
    for shift, name in ((BRIGHTNESS, "the brightness"), (DOMAIN, "the other domain")):
        yield above(
            f"After {EARLY} batches of it in train mode, momentum {FAST} has got over more of {name} than {SLOW}.",
            f"Accuracy with {FAST} less that with {SLOW}",
            fast.less(_early(shift), slow),
        )
    yield below(
        "Where only the frequencies of classes change, to follow them costs accuracy.",
        f"Accuracy after the shifted batches less that as trained, momentum {FAST}",
        fast.less(_at_last(CLASSES), fast, _as_trained(CLASSES)),
    )
    yield above(
        f"So a small momentum survives swapped classes: after {EARLY} batches {SLOW} is better than {FAST}.",
        "Difference",
        slow.less(_early(CLASSES), fast),
    )


def _claims_of_lag(results: Results) -> Iterator[Claim]:
    usual, slow = (results.where(rate=HIGH, momentum=momentum) for momentum in (USUAL, SLOW))
    yield above(
        "While a network learns at a high rate, a small momentum lags behind its weights.",
        f"Distance of the running mean with {SLOW} less that with {USUAL}, at the rate {HIGH:g}",
        slow.less("distance", usual),
    )
    yield above(
        "The lag grows with the learning rate.",
        f"Distance of the running mean at the rate {HIGH:g} less that at {LOW:g}, momentum {SLOW}",
        slow.less("distance", results.where(rate=LOW, momentum=SLOW)),
    )
    yield above(
        "At a high learning rate that lag costs accuracy.",
        f"Accuracy lost to running statistics with momentum {SLOW} less that with {USUAL}",
        slow.less("lost accuracy", usual),
    )


def time_constant(momentum: float) -> float:
    """The batches in which 1/e of an old value is left: (1 - m)^t = 1/e."""
    return -1 / math.log1p(-momentum)


# --- Trials -----------------------------------------------------------------------------------------------------------


def _trained(model: nn.Sequential, images: Images, rate: float, seed: int, budget: Budget) -> Values:
    """Train; how far running statistics are from the population's, five times in the second half."""
    steps, many = budget.of(STEPS, 20), budget.of(POPULATION, 512)
    looks = {round(steps * share) for share in (0.6, 0.7, 0.8, 0.9, 1.0)}
    often = frequencies(images.train_labels, images.classes)
    at_test = frequencies(images.test_labels, images.classes)
    distances: list[float] = []
    lost: list[float] = []
    losses: list[float] = []

    def after_step(step: int, loss: float) -> None:
        losses.append(loss)
        if step + 1 in looks:
            exact = _with_population(model, next(drawn(images, often, many, 1, seed + step))[0])
            distances.append(_distance(model, exact))
            here, there = (score(each, images.test, images.test_labels, at_test) for each in (model, exact))
            lost.append(there - here)
            model.train()

    train(model, drawn(images, often, BATCH, steps, seed), rate, after_step)
    return {"loss": losses[-1], "distance": average(distances), "lost accuracy": average(lost)}


def _shifted(model: nn.Module, images: Images, shift: str, seed: int, budget: Budget) -> Values:
    """Accuracies in eval mode while shifted batches pass in train mode, and how the running mean follows them."""
    change, swapped = SHIFTS[shift], shift == CLASSES
    often = frequencies(images.train_labels, images.classes, swapped)
    at_test = frequencies(images.test_labels, images.classes, swapped)
    held_out = change(images.test)
    model = copy.deepcopy(model)
    first, many = batch_norms(model)[0], budget.of(POPULATION, 512)
    grid = _grid(first.momentum, budget)
    population = next(drawn(images, often, many, 1, 1000 + seed))[0]  # other images than those of the batches
    aim = batch_norms(_with_population(model, change(population)))[0].running_mean
    begin = first.running_mean - aim
    accuracies = {0: score(model, held_out, images.test_labels, at_test)}
    left = [1.0]
    for batch, (given, _) in enumerate(drawn(images, often, BATCH, grid[-1], seed), start=1):
        with torch.no_grad():
            model.train()(change(given))
        left.append(float((first.running_mean - aim) @ begin / begin.square().sum()))
        if batch in grid:
            accuracies[batch] = score(model, held_out, images.test_labels, at_test)
    return {
        _as_trained(shift): accuracies[0],
        _early(shift): accuracies[EARLY],
        _at_last(shift): average(list(accuracies.values())[-LAST:]),
        f"batches, {shift}": _back(accuracies) if grid[-1] >= CONSTANTS * time_constant(first.momentum) else None,
        f"accuracies, {shift}": [accuracies[batch] for batch in grid],
        **({"time constant": crossing(left)} if shift == BRIGHTNESS else {}),
    }


def _grid(momentum: float, budget: Budget) -> list[int]:
    """The batches after which the network is scored, each about a quarter more than the one before."""
    last = max(2 * EARLY, min(math.ceil(CONSTANTS * time_constant(momentum)), budget.of(2000)))
    powers = range(math.ceil(math.log(last, 1.25)))
    return sorted({*(round(1.25**power) for power in powers), EARLY, last})


@torch.no_grad()
def _with_population(model: nn.Module, pixels: Tensor) -> nn.Module:
    """A copy whose running statistics are those of one large batch."""
    other = copy.deepcopy(model)
    for layer in batch_norms(other):
        layer.momentum = 1.0
    other.train()(pixels)
    return other


def _distance(model: nn.Module, exact: nn.Module) -> float:
    """Of running means from those of the population: root mean square over channels, mean over layers."""
    pairs = zip(batch_norms(model), batch_norms(exact), strict=True)
    away = [(here.running_mean - there.running_mean) / (there.running_var + EPS).sqrt() for here, there in pairs]
    return average([each.square().mean().sqrt().item() for each in away])


def frequencies(labels: Tensor, classes: int, swapped: bool = False) -> Tensor:
    """How often each image is drawn, by its class: the first half of classes often, or, if swapped, the others."""
    return torch.where((labels < classes / 2) != swapped, float(OFTEN), 1.0)


def drawn(images: Images, often: Tensor, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images for training, drawn with replacement by their frequencies."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.multinomial(often, size, replacement=True, generator=draws)
        yield images.train[chosen], images.train_labels[chosen]


@torch.no_grad()
def score(model: nn.Module, pixels: Tensor, labels: Tensor, often: Tensor) -> float:
    """Accuracy in eval mode, images weighed by their frequencies."""
    right = torch.cat([model.eval()(part).argmax(1) for part in pixels.split(512)]) == labels
    return float((right * often).sum() / often.sum())


def crossing(left: Sequence[float]) -> float | None:
    """When 1/e was left for the first time, between batches as an exponential decays; None: never."""
    for batch, (before, after) in enumerate(pairwise(left)):
        if after * math.e <= 1:
            return batch + (1 + math.log(before)) / (math.log(before) - math.log(max(after, 1e-3)))
    return None


def _back(accuracies: Mapping[int, float]) -> int:
    """The first batch after which the accuracy has come near the one at the end, the mean of the last scores."""
    end = average(list(accuracies.values())[-LAST:])
    toward = 1 if accuracies[0] < end else -1
    return next(batch for batch, accuracy in accuracies.items() if toward * (accuracy - end) >= -BACK)


# --- Figures ----------------------------------------------------------------------------------------------------------


def _as_trained(shift: str) -> str:
    return f"{shift}: accuracy as trained"


def _early(shift: str) -> str:
    return f"{shift}: accuracy after {EARLY} batches"


def _at_last(shift: str) -> str:
    return f"{shift}: accuracy at the end"


def _difference_of_losses(results: Results) -> float:
    losses: dict[tuple[object, int], dict[object, float]] = {}
    for trial in results:
        loss = trial.number("loss")
        of_momenta = losses.setdefault((trial.condition["rate"], trial.seed), {})
        of_momenta[trial.condition["momentum"]] = math.nan if loss is None else loss
    return worst(abs(loss - each[USUAL]) for each in losses.values() for loss in each.values())


def _constant_over_formula(of_seed: Results) -> float:
    """The mean over the momenta whose time constant was reached."""
    found = {momentum: of_seed.where(momentum=momentum).values("time constant") for momentum in MOMENTA}
    return average([each / time_constant(momentum) for momentum, values in found.items() for each in values])


def _slope(of_seed: Results) -> float:
    """Of the logarithm of batches against that of the time constant, the mean of the shifts where all are back."""
    momenta = [momentum for momentum in MOMENTA if SLOW <= momentum <= FAST]
    constants = [math.log(time_constant(momentum)) for momentum in momenta]
    slopes = []
    for shift in (BRIGHTNESS, DOMAIN):
        with suppress(MissingFigureError):
            batches = [of_seed.value(f"batches, {shift}", momentum=momentum) for momentum in momenta]
            if all(batches):
                slopes.append(linear_regression(constants, [math.log(each) for each in batches]).slope)
    return average(slopes)
