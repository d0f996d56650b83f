"""``gan``: a discriminator with one batch norm sees real and generated images, which have different statistics.

Real and generated images usually come in batches of one kind (Chintala et al. 2016, How to Train a GAN?, tip 4). Then
each batch is normalized with the statistics of its kind, while the running statistics average over both: in training
a layer never normalizes as it does at inference. The mismatch of a layer, D = E[d^2 + (1 - r)^2], where r and d lead
from the statistics of a batch to the running ones (Ioffe 2017, section 3), says how far they are apart. Two things are
held against it: for n i.i.d. values of one distribution, as many as a batch has in a channel, it is 2 (1 - e_n), about
3/(2n); and the same batches have one against the mean of the batches of their own kind. What is above both is no matter
of the size of the batch.

Four discriminators are trained against generators of one architecture: with a call for each kind and one batch norm,
with one call for a batch of both kinds, with a call and statistics for each kind (``bnprobe.nn.DomainBatchNorm2d``;
Xie et al. 2020), and with a call for each kind and Batch Renorm. Each is asked which images are real, in both modes;
and samples of the generator, in eval mode, are held against real images by the Frechet distance of their features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.lab.data import POPULATION, Images, batches, load
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
    told,
)
from bnprobe.lab.layers import SCHEDULE, BatchNorm, BatchRenorm, mismatch, opening, set_limits
from bnprobe.lab.networks import Call, Norm, calls_in_training, conv_net, input_of, keep_statistics, train
from bnprobe.nn import DomainBatchNorm2d, domain
from bnprobe.numbers import joined
from bnprobe.records import Claim, LabChart
from bnprobe.stats.theory import mismatch_iid

ONE, MIXED, EACH, RENORM = "one batch norm", "one mixed batch", "statistics for each kind", "Batch Renorm"
ARMS: Mapping[str, Norm] = {ONE: BatchNorm, MIXED: BatchNorm, EACH: DomainBatchNorm2d, RENORM: BatchRenorm}
"""What normalizes in the discriminator."""

KINDS = REAL, FAKE = "real", "generated"
"""Their order is that of the domains, 0 and 1."""

BATCH = 32
"""Images of each kind in a step."""

STEPS, RATE, LATENT, WIDTH = 800, 1e-3, 16, 16
MEASURED = 32
"""Batches of each kind that a trained discriminator is measured on."""

SAMPLES = 2048
"""Generated images that the Frechet distance is of."""


class Gan(Experiment):
    """Four ways to normalize in a discriminator."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """The ways."""
        return [{"discriminator": arm} for arm in ARMS]

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Train both networks, then measure the discriminator and the samples."""
        images, arm = load(budget.data), str(condition["discriminator"])
        generator, discriminator = _generator(images.train.shape[1:]), _discriminator(images.train.shape[1:], ARMS[arm])
        draws = torch.Generator().manual_seed(seed)
        steps = budget.of(STEPS, 4)
        _play(arm, generator, discriminator, batches(images.train, images.train_labels, BATCH, steps, draws), steps)
        keep_statistics(generator)
        keep_statistics(discriminator)
        return {
            **_measured(arm, generator, discriminator, images, budget.of(MEASURED, 4), draws),
            **_quality(generator, images, seed, budget),
        }

    def answer(self, results: Results, budget: Budget) -> str:
        """What eval mode costs with one batch norm, and with what may mend it."""

        costs = {arm: results.where(discriminator=arm).mean("cost of eval mode") for arm in (ONE, MIXED, EACH, RENORM)}
        return (
            "In eval mode the discriminator loses so much of its accuracy in train mode: "
            f"{joined([f'{told(cost)} with {arm}' for arm, cost in costs.items()])}."
        )

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """Whether running statistics fit, what that costs the discriminator, and what the samples are worth."""
        one, mixed, each, renorm = (results.where(discriminator=arm) for arm in ARMS)
        cost, distance = "cost of eval mode", "log10 of the Frechet distance"
        yield above(
            "With one batch norm and a call for each kind, the running statistics fit neither kind: D is above that of"
            " as many i.i.d. values.",
            "D over 2 (1 - e_n), of the kind where it is less",
            one.mean("D over the formula's"),
            1.0,
        )
        yield above(
            "With one batch norm, D of batches of a kind is above that against the mean of all of the kind.",
            "D over that against the mean of all batches, of the kind where it is less",
            one.mean("D over that of sampling"),
            1.0,
        )
        yield below(
            "With statistics for each kind, D is lower.",
            "D with statistics for each kind less that with one batch norm, mean of both kinds",
            each.less("D", one),
        )
        yield above(
            "With one batch norm and a call for each kind, the discriminator is worse in eval mode than in train mode.",
            "Its accuracy in train mode less that in eval mode",
            one.mean(cost),
        )
        for name, arm, usual in (
            ("statistics for each kind", each, "one batch norm"),
            ("one mixed batch", mixed, "a call for each kind"),
            ("Batch Renorm", renorm, "one batch norm"),
        ):
            what = f"Cost of eval mode in accuracy, less that with {usual}"
            yield below(f"With {name}, eval mode costs less.", what, arm.less(cost, one))
        yield below(
            "Batches of one kind give better samples than mixed ones.",
            f"{distance} with a call for each kind less that with a mixed batch",
            one.less(distance, mixed),
        )
        yield below(
            "Statistics for each kind give better samples than one batch norm.",
            f"{distance} with statistics for each kind less that with one batch norm",
            each.less(distance, one),
        )

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """Answers of the discriminator, D of its layers, and the samples."""
        modes = {"accuracy in train mode": "train mode", "accuracy in eval mode": "eval mode"}
        yield LabChart(
            "discriminator",
            "Whether the discriminator knows real images from generated ones",
            "discriminator",
            "accuracy",
            results.several_series("discriminator", modes),
            (
                f"Held-out real images, and batches of {BATCH} of each kind in both modes.",
                "Statistics for each kind know which kind a batch is of, in both modes.",
            ),
            bounds=SHARE,
        )
        measured = {f"D of {kind} images": f"{kind} images" for kind in KINDS}
        measured["D of sampling"] = "against the mean of the batches of a kind"
        by_formula = results.series("D by the formula", "discriminator", "as many i.i.d. values, 2 (1 - e_n)")
        yield LabChart(
            "mismatch",
            "D of the discriminator's layers, with its statistics at inference",
            "discriminator",
            "D, mean over layers",
            (*results.several_series("discriminator", measured), replace(by_formula, theory=True)),
            ("A mixed batch is one call with both kinds. Batch Renorm corrects in training what its D shows.",),
            bounds=NOT_NEGATIVE,
        )
        distances = {
            "Frechet distance": "generated in eval mode",
            "Frechet distance in train mode": "generated in train mode",
            "Frechet distance of held-out images": "held-out real images",
        }
        yield LabChart(
            "samples",
            "Samples of the generator against real images",
            "discriminator",
            "Frechet distance",
            results.several_series("discriminator", distances),
            ("Between normal distributions of the features of a classifier; less is better.",),
            y_scale="log",
        )

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """The networks, and how limits open."""
        channels, height, width = load(budget.data).train.shape[1:]
        positions = f"{height // 4} x {width // 4} positions"
        yield (
            f"The generator: {LATENT} normal numbers, a linear layer to {2 * WIDTH} channels at {positions}, and two"
            f" transposed convolutions of 4 x 4 (stride 2) to {WIDTH} and {channels}, with batch norm and ReLU before"
            f" each. The discriminator: convolutions of 4 x 4 (stride 2) to {WIDTH} and {2 * WIDTH} and of 3 x 3 to"
            f" {2 * WIDTH} channels, the last two with a normalization, leaky ReLU behind each, and a linear layer over"
            " all positions."
        )
        yield SCHEDULE


# --- The game ---------------------------------------------------------------------------------------------------------


def _generator(shape: torch.Size) -> nn.Sequential:
    """From noise to images, by convolutions that double height and width."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Linear(LATENT, 2 * WIDTH * (height // 4) * (width // 4)),
        nn.Unflatten(1, (2 * WIDTH, height // 4, width // 4)),
        BatchNorm(2 * WIDTH),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * WIDTH, WIDTH, 4, stride=2, padding=1),
        BatchNorm(WIDTH),
        nn.ReLU(),
        nn.ConvTranspose2d(WIDTH, channels, 4, stride=2, padding=1),
    )


def _discriminator(shape: torch.Size, norm: Norm) -> nn.Sequential:
    """Three convolutions and a linear layer; the first has no normalization (Radford et al. 2016, section 3)."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, WIDTH, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(WIDTH, 2 * WIDTH, 4, stride=2, padding=1),
        norm(2 * WIDTH),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1),
        norm(2 * WIDTH),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(2 * WIDTH * (height // 4) * (width // 4), 1),
    )


def _play(
    arm: str,
    generator: nn.Sequential,
    discriminator: nn.Sequential,
    data: Iterable[tuple[Tensor, Tensor]],
    steps: int,
) -> None:
    """Train both in turn with the losses of Goodfellow et al. 2014, that of the generator not saturating.

    Both steps show the discriminator both kinds, so that its running statistics see as much of each.
    """
    of_generator, of_discriminator = (
        torch.optim.Adam(network.parameters(), lr=RATE, betas=(0.5, 0.999)) for network in (generator, discriminator)
    )
    schedule = opening(steps)
    for step, (real, _) in enumerate(data):
        set_limits(discriminator, *schedule.at(step))
        fake = generator(torch.randn(len(real), LATENT))
        of_real, of_fake = answers(arm, discriminator, real, fake.detach())
        of_discriminator.zero_grad()
        (F.softplus(-of_real).mean() + F.softplus(of_fake).mean()).backward()
        of_discriminator.step()
        of_generator.zero_grad()
        F.softplus(-answers(arm, discriminator, real, fake)[1]).mean().backward()
        of_generator.step()


def answers(arm: str, discriminator: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Log odds of being real, of as many images of each kind, called as the arm says."""
    if arm == MIXED:
        of_real, of_fake = discriminator(torch.cat([real, fake])).chunk(2)
        return of_real, of_fake
    with domain(0):
        of_real = discriminator(real)
    with domain(1):
        return of_real, discriminator(fake)


# --- The discriminator ------------------------------------------------------------------------------------------------


@torch.no_grad()
def _measured(
    arm: str,
    generator: nn.Sequential,
    discriminator: nn.Sequential,
    images: Images,
    count: int,
    draws: torch.Generator,
) -> Values:
    """D of batches of each kind, and accuracy in both modes, on held-out images and as many generated in train mode."""
    layers = [layer for layer in discriminator if isinstance(layer, BatchNorm | DomainBatchNorm2d)]
    right = {"train": 0, "eval": 0}
    with ExitStack() as watching:
        seen = [watching.enter_context(calls_in_training(layer)) for layer in layers]
        for real, _ in batches(images.test, images.test_labels, BATCH, count, draws):
            fake = generator(torch.randn(BATCH, LATENT))
            for mode in right:
                of_real, of_fake = answers(arm, discriminator.train(mode == "train"), real, fake)
                right[mode] += int((of_real > 0).sum()) + int((of_fake < 0).sum())
    of = _mismatches(arm, layers, seen)
    accuracies = {mode: number / (2 * BATCH * count) for mode, number in right.items()}
    return {
        **{f"D of {kind} images": of[kind].running for kind in KINDS},
        "D": (of[REAL].running + of[FAKE].running) / 2,
        "D of sampling": (of[REAL].own + of[FAKE].own) / 2,
        "D by the formula": of[REAL].formula,
        "D over the formula's": min(of[kind].running / of[kind].formula for kind in KINDS),
        "D over that of sampling": min(of[kind].running / of[kind].own for kind in KINDS),
        **{f"accuracy in {mode} mode": accuracy for mode, accuracy in accuracies.items()},
        "cost of eval mode": accuracies["train"] - accuracies["eval"],
    }


class _Mismatches(NamedTuple):
    """D of the batches of one kind, mean over layers: with running statistics, with those of all, of i.i.d. values."""

    running: float
    own: float
    formula: float


def _mismatches(
    arm: str, layers: Sequence[BatchNorm | DomainBatchNorm2d], seen: Sequence[Sequence[Call]]
) -> dict[str, _Mismatches]:
    """Of each kind; a mixed batch is of both."""
    found = {}
    for number, kind in enumerate(KINDS):
        of_layers = []
        for layer, calls in zip(layers, seen, strict=True):
            those = calls if arm == MIXED else calls[number::2]
            known = (
                layer.statistics_of(number)[:2]
                if isinstance(layer, DomainBatchNorm2d)
                else (layer.running_mean, layer.running_var)
            )
            of_layers.append(
                (_mean_mismatch(those, *known), _mean_mismatch(those, *pooled(those)), mismatch_iid(those[0].values))
            )
        found[kind] = _Mismatches(*(sum(each) / len(layers) for each in zip(*of_layers, strict=True)))
    return found


def _mean_mismatch(calls: Sequence[Call], mean: Tensor, variance: Tensor) -> float:
    return sum(mismatch(call.mean, call.variance, mean, variance).item() for call in calls) / len(calls)


def pooled(calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    """Mean and variance of all values of batches of one size."""
    means = torch.stack([call.mean for call in calls])
    variances = torch.stack([call.variance for call in calls])
    return means.mean(0), variances.mean(0) + means.var(0, unbiased=False)


# --- The samples ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _quality(generator: nn.Sequential, images: Images, seed: int, budget: Budget) -> Values:
    """The Frechet distance from images to train on: of samples in both modes, and of held-out images."""
    classifier = _classifier(seed, budget)
    real = features(classifier, images.train[:POPULATION])
    noise = torch.randn(budget.of(SAMPLES, 512), LATENT).split(BATCH)
    drawn = {mode: torch.cat([generator.train(mode)(each) for each in noise]) for mode in (False, True)}
    distance = frechet_distance(real, features(classifier, drawn[False]))
    return {
        "Frechet distance": distance,
        "log10 of the Frechet distance": math.log10(max(distance, 1e-12)),
        "Frechet distance in train mode": frechet_distance(real, features(classifier, drawn[True])),
        "Frechet distance of held-out images": frechet_distance(real, features(classifier, images.test)),
    }


@functools.lru_cache(maxsize=1)
def _classifier(seed: int, budget: Budget) -> nn.Sequential:
    """A classifier in eval mode: the same for all arms of a seed."""
    images = load(budget.data)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = conv_net(images.train.shape[1:], images.classes, BatchNorm)
        draws = torch.Generator().manual_seed(seed)
        train(model, batches(images.train, images.train_labels, 64, budget.of(200, 20), draws), 0.05)
    return model.eval()


def features(classifier: nn.Sequential, images: Tensor) -> Tensor:
    """What the last linear layer gets, shape (images, features), float64."""
    return input_of(classifier, classifier[-1], images).double()


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Between normal distributions with the moments of two samples (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), where the trace of the root is the sum of the roots of the eigenvalues
    of C1^(1/2) C2 C1^(1/2).

    Args:
        one, other: Shape (samples, features), float64.
    """
    first, second = one.T.cov(), other.T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    apart = (one.mean(0) - other.mean(0)).square().sum()
    return float(apart + first.trace() + second.trace() - 2 * overlap)
