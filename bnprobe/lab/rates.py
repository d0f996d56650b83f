"""``rates``: how high a learning rate may be, with batch norm and without, and two explanations.

Ioffe & Szegedy 2015 trained with 30 times the usual rate, and gave the reason in section 3.3: of a layer with batch
norm behind it, BN((aW) x) = BN(W x), and the gradient by aW is 1/a of that by W, so that weights that a high rate has
made large change less. Santurkar et al. 2018 gave another in section 3.1: the loss and its gradient change less along
the gradient. Here a sweep shows how high the rate may be; the scale of weights is looked at in double precision, where
eps, which the equations of the paper leave out, is 0 or as usual; and along a training the gradient is followed as far
as in the paper's figure 4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.lab.data import Images, batches, load
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
    mean_of,
    series,
    told,
    within,
    worst,
)
from bnprobe.lab.layers import EPS, BatchNorm
from bnprobe.lab.networks import Norm, batch_norms, conv_net, conv_net_architecture, held_out_accuracy, no_norm, train
from bnprobe.numbers import joined, percent, score
from bnprobe.records import Claim, Estimate, LabChart, LabTable
from bnprobe.report.figures import estimate

NONE, NORM = "none", "batch norm"
ARMS: Mapping[str, Norm] = {NORM: BatchNorm, NONE: no_norm}
SWEEP, SCALE, SMOOTHNESS = "sweep", "scale", "smoothness"

BATCH = 64
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
STEPS = 250
TIMES = 30
"""The highest multiple of the usual rate in the paper (its BN-x30)."""

FACTORS = (0.01, 0.03, 0.1, 0.3, 3.0, 10.0, 30.0, 100.0)
"""By which weights are multiplied."""

EXACT = 1e-12
"""What holds exactly may be off by so much, relatively: of the 16 digits of float64, four are left to rounding."""

RATE = 0.1
"""Of training where the gradient is followed."""

REACHES = (0.5, 1.0, 2.0, 3.0, 4.0)
"""How far it is followed, as multiples of the learning rate, as in the paper."""


ALONG = (
    ("range of the loss", "the loss varies less along its gradient", "a"),
    ("change of the gradient", "the gradient changes less along itself", "b"),
    ("effective smoothness", "the effective smoothness is better, a smaller beta", "c"),
)
"""What is looked at along the gradient, and how Santurkar et al. found it with batch norm, and in which part of their
figure 4."""

EXACTLY = (
    (
        "Multiplying the weights before a batch norm by a number does not change the loss (eps = 0).",
        f"Largest relative change, for factors from {FACTORS[0]:g} to {FACTORS[-1]:g}",
        "change of the loss, eps = 0",
    ),
    (
        "Weights c times as large have a gradient 1/c as large (eps = 0).",
        "Largest relative deviation",
        "deviation of the gradient, eps = 0",
    ),
    (
        "The gradient of a filter is orthogonal to it (eps = 0).",
        "Largest cosine between a filter and its gradient",
        "cosine, eps = 0",
    ),
    (
        "So plain SGD only lengthens weights: their squared length grows by the squares of its steps (eps = 0).",
        "Largest relative deviation from the sum of squares",
        "deviation of the growth",
    ),
    (
        "With eps, multiplying weights by c is the same as dividing eps by its square.",
        "Largest relative difference of the losses",
        "deviation from another eps",
    ),
    (
        "The bias of a convolution before a batch norm has no effect in training.",
        "Largest of the relative change of the loss, where every bias is moved by 10 or so, and of the bias' gradient"
        " over that of batch norm's",
        "effect of the bias",
    ),
)
"""What holds exactly: the claim, what is looked at, and the name of the figure, which should be 0."""


class Rates(Experiment):
    """A sweep of rates, a look at the scale of weights, and trainings along which the gradient is followed."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """Each part and what it compares."""
        yield {"part": SCALE}
        for name in ARMS:
            yield {"part": SMOOTHNESS, "normalization": name}
            for rate in RATES:
                yield {"part": SWEEP, "rate": rate, "normalization": name}

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """One part."""
        images = load(budget.data)
        if condition["part"] == SCALE:
            return _scale(images, seed, budget)
        norm = ARMS[str(condition["normalization"])]
        if condition["part"] == SWEEP:
            return _trained(images, norm, float(condition["rate"]), seed, budget)
        return _along_gradients(images, norm, seed, budget)

    def answer(self, results: Results, budget: Budget) -> str:
        """How much higher, and what both explanations come to."""
        higher = results.where(part=SWEEP).mean_over_seeds(_reach)
        smoothness = results.where(part=SMOOTHNESS)
        steps = _measured(budget)
        whole, early = (
            told(smoothness.mean_over_seeds(partial(_share_below, ALONG[0][0], most)))
            for most in (len(steps), _early(steps))
        )
        exact = results.where(part=SCALE).largest(EXACTLY[0][2])
        times = told(None if higher is None else 10**higher.mean)
        return (
            f"The highest rate at which the network learns is {times} times as high with batch norm. With it the scale"
            f" of weights changes the loss by {told(exact)} of itself, where eps is 0; and the loss varies less along"
            f" its gradient than without at {whole} of the measured steps, and at {early} of the first {_early(steps)}."
        )

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """How high the rate may be, then the explanations."""
        yield from _claims_of_rates(results.where(part=SWEEP))
        scale = results.where(part=SCALE)
        for claim, what, figure in EXACTLY:
            yield within(claim, what, scale.largest(figure), EXACT)
        yield from _claims_along_gradients(results.where(part=SMOOTHNESS), _measured(budget))

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """The sweep, what eps does, and what is found along the gradient."""
        sweep, scale, smoothness = (results.where(part=part) for part in (SWEEP, SCALE, SMOOTHNESS))
        yield LabChart(
            "accuracy",
            "Held-out accuracy against the learning rate",
            "learning rate",
            "share of right answers",
            tuple(sweep.series("accuracy", "rate", name, normalization=name) for name in ARMS),
            (f"SGD with momentum 0.9, batches of {BATCH}, {_steps(budget):,} steps.",),
            x_scale="log",
            bounds=SHARE,
        )
        other_eps = scale.along("change by another eps", FACTORS, "eps over the factor squared instead")
        yield LabChart(
            "scale",
            f"How inexact eps = {EPS:g} makes it",
            "factor of the weights",
            "relative change of the loss",
            (
                scale.along("change of the loss with eps", FACTORS, "weights times the factor"),
                replace(other_eps, theory=True),
            ),
            (
                "Small weights feel eps, as it is no longer small against the variance; for large ones it is as if it"
                " were left out.",
            ),
            x_scale="log",
            y_scale="log",
        )
        steps = _measured(budget)
        yield LabChart(
            "along",
            "Along the gradient, with batch norm over without",
            "steps of training",
            "ratio, in powers of ten",
            tuple(series(name, steps, _ratios(smoothness, name, steps)) for name, *_ in ALONG),
            ("Below 0 it is less with batch norm. A single large value of one seed does not decide a mean of powers.",),
        )
        for name, title, y in (
            ("range of the loss", "How much the loss varies along its gradient", "largest less smallest loss"),
            (
                "effective smoothness",
                "Effective smoothness: how fast the gradient changes along itself",
                "change of the gradient over the distance",
            ),
        ):
            yield LabChart(
                name.split()[-1],
                title,
                "steps of training",
                y,
                tuple(smoothness.where(normalization=arm).along(name, steps, arm) for arm in ARMS),
                (f"Steps of {REACHES[0]:g} to {REACHES[-1]:g} times the learning rate of {RATE:g}.",),
                y_scale="log",
            )

    def tables(self, results: Results, budget: Budget) -> Iterator[LabTable]:
        """What becomes of each rate."""
        sweep = results.where(part=SWEEP)
        figures: Sequence[tuple[str, str, Callable[[Estimate], str]]] = (
            ("loss", "loss", estimate),
            ("exploded", "explodes", lambda found: percent(found.mean)),
            ("growth of weights", "growth of the weights", lambda found: score(found.mean)),
        )

        def row(rate: float) -> Iterator[str]:
            yield f"{rate:g}"
            for _, figure, write in figures:
                for name in ARMS:
                    found = sweep.where(rate=rate, normalization=name).mean(figure)
                    yield "no number" if found is None else write(found)

        yield LabTable(
            "What becomes of each rate",
            ("rate", *(f"{heading}, {name}" for heading, *_ in figures for name in ARMS)),
            tuple(tuple(row(rate)) for rate in RATES),
            (
                "Loss: mean over the last tenth of the steps, of seeds in which it is a number. Exploded: share of"
                " seeds with a loss of more than ten times that of guessing, or of no number, at some step. Growth:"
                " length of the weights of a convolution at the end over that at the start.",
            ),
        )

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """Where this holds, and how far with the usual eps."""
        yield conv_net_architecture(budget.data)
        scale = results.where(part=SCALE)
        yield (
            "In training alone: at inference the running averages normalize, which do not follow weights and biases"
            " that are changed by hand."
        )
        curve = scale.along("change of the loss with eps", FACTORS, "").y
        cosine = scale.largest("cosine with eps")
        small, large = curve[FACTORS.index(0.1)], curve[FACTORS.index(10.0)]
        if small is not None and large is not None and math.isfinite(cosine):
            yield (
                f"With the usual eps of {EPS:g} the loss changes by {score(small)} of itself where weights are a tenth,"
                f" and by {score(large)} where they are ten times as large; the largest cosine between a filter and its"
                f" gradient is {score(cosine)}."
            )
        yield from _note_on_the_beginning(results.where(part=SMOOTHNESS), _measured(budget))


def _claims_of_rates(sweep: Results) -> Iterator[Claim]:
    norm, none = (sweep.where(normalization=name) for name in ARMS)
    yield above(
        "With batch norm the network learns at higher rates.",
        "Highest rate at which it learns, over that without, in powers of ten",
        sweep.mean_over_seeds(_reach),
    )
    best = _best(none)
    thirty = min(RATES, key=lambda rate: abs(math.log(rate / best / TIMES)))
    in_sweep = thirty > TIMES * best / 2
    yield above(
        f"With batch norm and {TIMES} times the rate that is best without, the network is more accurate than without at"
        " that rate (section 4.2.2 of the paper).",
        f"Held-out accuracy at {thirty:g} less that without at {best:g}",
        norm.where(rate=thirty).less("accuracy", none.where(rate=best)) if in_sweep else None,
    )


def _claims_along_gradients(smoothness: Results, steps: Sequence[int]) -> Iterator[Claim]:
    """A share of steps decides, which a spike at one of them does not move."""
    early = steps[: _early(steps)]
    for name, finding, letter in ALONG:
        when = _when(steps, _ratios(smoothness, name, steps))
        claims = [(f"With batch norm {finding} (Santurkar et al., figure 4{letter}).", steps)]
        if name == ALONG[0][0]:
            text = f"With batch norm {finding} at the beginning of training, too (section 3.1: especially there)."
            claims.append((text, early))
        for text, at in claims:
            what = f"Share of the {len(at)} measured steps up to {at[-1]} at which it is less than without"
            claim = above(text, what, smoothness.mean_over_seeds(partial(_share_below, name, len(at))), 0.5)
            yield replace(claim, evidence=f"{claim.evidence}{when}")


def _early(steps: Sequence[int]) -> int:
    """So many of the measured steps are the beginning of training."""
    return max(len(steps) // 5, 1)


def _share_below(name: str, most: int, of_seed: Results) -> float:
    """Share of the first measured steps at which a figure is less with batch norm than without."""
    ratios = [ratio for of_steps in _ratios_by_seed(of_seed, name) for ratio in of_steps[:most]]
    return average([float(ratio < 0) for ratio in ratios if ratio is not None])


def _ratios(smoothness: Results, name: str, steps: Sequence[int]) -> list[Estimate | None]:
    """A figure with batch norm over that without at each measured step, in powers of ten."""
    by_seed = _ratios_by_seed(smoothness, name)
    return [
        mean_of([ratio for ratios in by_seed if (ratio := ratios[place]) is not None]) for place in range(len(steps))
    ]


def _ratios_by_seed(smoothness: Results, name: str) -> list[list[float | None]]:
    norm, none = ([trial.values.get(name) for trial in smoothness.where(normalization=arm)] for arm in ARMS)
    return [
        [math.log10(here / there) if here and there else None for here, there in zip(one, other, strict=True)]
        for one, other in zip(norm, none, strict=True)  # in the order of seeds
        if isinstance(one, tuple) and isinstance(other, tuple)
    ]


def _when(steps: Sequence[int], ratios: Sequence[Estimate | None]) -> str:
    """At which steps the interval of a ratio is above 1, and at which below; begins with a space."""
    ends = [(None, None) if ratio is None or ratio.interval is None else ratio.interval for ratio in ratios]
    more = [low is not None and low > 0 for low, _ in ends]
    less = [high is not None and high < 0 for _, high in ends]
    said = []
    if any(more):
        most = max(ratio.mean for ratio in ratios if ratio is not None)
        said.append(f"above 1 at {_spans(steps, more)} (up to {score(10**most)})")
    if any(less):
        said.append(f"below 1 at {_spans(steps, less)}")
    return f" By its interval the ratio to that without is {joined(said)}." if said else ""


def _spans(steps: Sequence[int], chosen: Sequence[bool]) -> str:
    """Steps in words, e.g. "steps 12 to 36 and 60"."""
    groups = [list(group) for is_in, group in groupby(zip(chosen, steps, strict=True), lambda each: each[0]) if is_in]
    ends = [(group[0][1], group[-1][1]) for group in groups]
    spans = [f"{first}" if first == last else f"{first} to {last}" for first, last in ends]
    return f"{'step' if spans == [str(ends[0][0])] else 'steps'} {joined(spans)}"


def _note_on_the_beginning(smoothness: Results, steps: Sequence[int]) -> Iterator[str]:
    norm, none = (smoothness.where(normalization=arm).along("loss", steps, arm).y[0] for arm in ARMS)
    longer = _ratios(smoothness, "length of the gradient", steps)[0]
    if norm is not None and none is not None and longer is not None:
        yield (
            f"After {steps[0]} steps the loss is {score(norm)} with batch norm and {score(none)} without, and the"
            f" gradient is {score(10**longer.mean)} times as long as without. What is followed is a multiple of it, and"
            " so is longer by as much."
        )


# --- Rates ------------------------------------------------------------------------------------------------------------


def _trained(images: Images, norm: Norm, rate: float, seed: int, budget: Budget) -> Values:
    """Train at one rate; a loss that is no number is none."""
    model = conv_net(images.train.shape[1:], images.classes, norm)
    before = _lengths(model)
    losses: list[float] = []
    train(model, _drawn(images, seed, _steps(budget)), rate, lambda _, loss: losses.append(loss))
    last = losses[-max(len(losses) // 10, 1) :]
    loss = average(last)
    guessing = math.log(images.classes)
    growth = [after / start for after, start in zip(_lengths(model), before, strict=True)]
    return {
        "loss": loss,
        "learns": float(loss < guessing / 2),
        "explodes": float(not all(loss < 10 * guessing for loss in losses)),  # which no number is not either
        "accuracy": held_out_accuracy(model, images.test, images.test_labels),
        "growth of the weights": average(growth),
    }


def _lengths(model: nn.Module) -> list[float]:
    """Of the weights of each convolution."""
    return [each.weight.detach().norm().item() for each in _convolutions(model)]


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [each for each in model.modules() if isinstance(each, nn.Conv2d)]


def _drawn(images: Images, seed: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    return list(batches(images.train, images.train_labels, BATCH, steps, draws))


def _steps(budget: Budget) -> int:
    return budget.of(STEPS, 20)


def _best(sweep: Results) -> float:
    """The rate with the highest accuracy, as a mean over seeds."""
    means = {rate: sweep.where(rate=rate).mean("accuracy") for rate in RATES}
    return max(RATES, key=lambda rate: -1.0 if (found := means[rate]) is None else found.mean)


def _reach(of_seed: Results) -> float:
    """The highest rate at which the network learns with batch norm over that without, in powers of ten."""
    return math.log10(_highest(of_seed, NORM) / _highest(of_seed, NONE))


def _highest(of_seed: Results, normalization: str) -> float:
    arm = of_seed.where(normalization=normalization)
    learns = [rate for rate in RATES if any(arm.where(rate=rate).values("learns"))]
    if not learns:
        raise MissingFigureError("learns")
    return learns[-1]


# --- Scales -----------------------------------------------------------------------------------------------------------


def _scale(images: Images, seed: int, budget: Budget) -> Values:
    """What weights, eps and biases do to the loss of one batch, in double precision, after some training."""
    model = conv_net(images.train.shape[1:], images.classes, BatchNorm)
    *before, last = _drawn(images, seed, budget.of(50, 10))
    train(model, before, 0.05)
    model.double()
    batch = last[0].double(), last[1]
    exact = _with_eps(model, 0.0)
    loss, gradients = _loss_and_gradients(exact, batch)
    usual, _ = _loss_and_gradients(model, batch)
    of_loss, of_gradient, with_eps, other_eps, apart = [], [], [], [], []
    for factor in FACTORS:
        there, found = _loss_and_gradients(_multiplied(exact, factor), batch)
        of_loss.append(abs(there - loss) / loss)
        of_gradient += [
            ((factor * here - expected).norm() / expected.norm()).item()
            for here, expected in zip(found, gradients, strict=True)
        ]
        multiplied, _ = _loss_and_gradients(_multiplied(model, factor), batch)
        divided, _ = _loss_and_gradients(_with_eps(model, EPS / factor**2), batch)
        with_eps.append(abs(multiplied - usual) / usual)
        other_eps.append(abs(divided - usual) / usual)
        apart.append(abs(multiplied - divided) / divided)
    return {
        "change of the loss, eps = 0": worst(of_loss),
        "deviation of the gradient, eps = 0": worst(of_gradient),
        "cosine, eps = 0": _cosine(exact, gradients),
        "cosine with eps": _cosine(model, _loss_and_gradients(model, batch)[1]),
        "deviation of the growth": _growth(exact, images, seed),
        "change of the loss with eps": with_eps,
        "change by another eps": other_eps,
        "deviation from another eps": worst(apart),
        "effect of the bias": _effect_of_bias(exact, batch),
    }


def _with_eps(model: nn.Module, eps: float) -> nn.Module:
    """A copy whose batch norms have another eps."""
    other = copy.deepcopy(model)
    for layer in batch_norms(other):
        layer.eps = eps
    return other


@torch.no_grad()
def _multiplied(model: nn.Module, factor: float) -> nn.Module:
    """A copy with the weights of every convolution multiplied."""
    other = copy.deepcopy(model)
    for layer in _convolutions(other):
        layer.weight *= factor
    return other


def _loss_and_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[float, list[Tensor]]:
    """The loss of a batch in training, and its gradients by the weights of the convolutions."""
    loss = F.cross_entropy(model.train()(batch[0]), batch[1])
    return loss.item(), list(torch.autograd.grad(loss, [each.weight for each in _convolutions(model)]))


def _cosine(model: nn.Module, gradients: Sequence[Tensor]) -> float:
    """The largest between a filter, which makes one channel, and its gradient."""
    pairs = zip(_convolutions(model), gradients, strict=True)
    cosines = [F.cosine_similarity(layer.weight.detach().flatten(1), by.flatten(1)) for layer, by in pairs]
    return float(torch.cat(cosines).abs().max())


@torch.no_grad()
def _growth(model: nn.Module, images: Images, seed: int) -> float:
    """How far the squared length of weights is from the sum of squares, after twenty steps of plain SGD.

    |W - rate g|^2 = |W|^2 + rate^2 |g|^2, as W and g are orthogonal.
    """
    model = copy.deepcopy(model)
    expected = [length**2 for length in _lengths(model)]
    for pixels, labels in _drawn(images, seed + 1, 20):
        with torch.enable_grad():
            _, gradients = _loss_and_gradients(model, (pixels.double(), labels))
        for place, (layer, by) in enumerate(zip(_convolutions(model), gradients, strict=True)):
            layer.weight -= 1.0 * by
            expected[place] += by.square().sum().item()
    return worst(abs(length**2 / square - 1) for length, square in zip(_lengths(model), expected, strict=True))


def _effect_of_bias(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Of the change of the loss by other biases, and their gradient over that of the batch norms' biases."""
    loss, _ = _loss_and_gradients(model, batch)
    moved = copy.deepcopy(model)
    biases = [layer.bias for layer in _convolutions(moved) if layer.bias is not None]
    with torch.no_grad():
        for bias in biases:
            bias += 10 * torch.randn_like(bias)
    there = F.cross_entropy(moved.train()(batch[0]), batch[1])
    shifts = [layer.bias for layer in batch_norms(moved)]
    by_bias, by_shift = (torch.cat(torch.autograd.grad(there, of, retain_graph=True)) for of in (biases, shifts))
    return worst((abs(there.item() - loss) / loss, float(by_bias.norm() / by_shift.norm())))


# --- Smoothness -------------------------------------------------------------------------------------------------------


def _along_gradients(images: Images, norm: Norm, seed: int, budget: Budget) -> Values:
    """Follow the gradient from time to time while a network is trained."""
    steps = _measured(budget)
    drawn = _drawn(images, seed, steps[-1])
    model = conv_net(images.train.shape[1:], images.classes, norm)
    found: list[dict[str, float]] = []

    def after_step(step: int, _: float) -> None:
        if step + 1 in steps:
            found.append(_follow(model, drawn[step]))

    train(model, drawn, RATE, after_step)
    return {name: [each[name] for each in found] for name in found[0]}


def _measured(budget: Budget) -> list[int]:
    """The steps after which the gradient is followed."""
    every = budget.of(12, 2)
    return list(range(every, 20 * every + 1, every))


def _follow(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """What is found along the gradient, by the names in `ALONG`, and what is there at its beginning.

    The losses are those of one batch, L(x - s g), where x are all parameters, g is their gradient and s goes as far as
    `REACHES`. The gradient changes by |g(x - s g) - g(x)|, and smoothness is this over |s g|; the largest counts.
    """
    model = copy.deepcopy(model)  # looking must not move the running averages
    parameters = list(model.parameters())
    start = [each.detach().clone() for each in parameters]
    begins, gradient = _at(model, batch)
    losses, changes, smoothnesses = [], [], []
    for reach in REACHES:
        with torch.no_grad():
            for parameter, begin, by in zip(parameters, start, gradient, strict=True):
                parameter.copy_(begin - reach * RATE * by)
        loss, there = _at(model, batch)
        change = _length([here - by for here, by in zip(there, gradient, strict=True)])
        losses.append(loss)
        changes.append(change)
        smoothnesses.append(change / (reach * RATE * _length(gradient)))
    return {
        "range of the loss": worst(losses) - min(losses),
        "change of the gradient": worst(changes),
        "effective smoothness": worst(smoothnesses),
        "loss": begins,
        "length of the gradient": _length(gradient),
    }


def _at(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[float, Sequence[Tensor]]:
    """Loss and its gradient by all parameters."""
    loss = F.cross_entropy(model(batch[0]), batch[1])
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def _length(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(each.square().sum().item() for each in parts))
