"""Statistics of BN inputs by plain hooks on real batches: nothing of bnprobe's own measurement is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.faults.networks import forward
from benchmarks.faults.samples import Samples, Sampling, batches
from benchmarks.faults.surgery import norms, set_random_layers


@dataclass(frozen=True)
class BatchStatistics:
    """Of the inputs of one layer: means and biased variances, (batches, channels), float64; several calls follow one
    another."""

    mean: Tensor
    variance: Tensor

    def population(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of all batches together, (channels)."""
        mean = self.mean.mean(0)
        return mean, (self.variance + self.mean.square()).mean(0) - mean.square()

    def mismatch(self, mean: Tensor, variance: Tensor, eps: float) -> float:
        """D against the given reference (docs/explanation/equations.md), mean over channels and batches."""
        own, scale = (self.variance + eps).sqrt(), (variance + eps).sqrt()
        rho = self.variance / (self.variance + eps)
        return float((((self.mean - mean) / scale).square() + rho * (own / scale - 1).square()).mean())


@dataclass(frozen=True)
class ImageStatistics:
    """Of the inputs of one layer: each image's mean and mean square over its positions, (images, channels), float64."""

    mean: Tensor
    square: Tensor

    def population(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of all images together, (channels)."""
        mean = self.mean.mean(0)
        return mean, self.square.mean(0) - mean.square()

    def regrouped(self, order: Tensor, size: int) -> BatchStatistics:
        """Batches of ``size`` images in another order."""
        mean, square = (values[order].unflatten(0, (-1, size)).mean(1) for values in (self.mean, self.square))
        return BatchStatistics(mean, square - mean.square())

    def expected_mismatch(self, size: int, mean: Tensor, variance: Tensor, eps: float, rounds: int = 8) -> float:
        """D of batches of independently drawn images, against the given reference.

        Drawing batches alone would take very many: of the two terms that make up nearly all of D, to second order in
        what batch and population differ by, the expectation is known exactly, and only the rest is drawn.
        """
        at, spread = self.population()
        scale, rho = (variance + eps) * (spread + eps), spread / (spread + eps)
        about = self.square - 2 * at * self.mean + at.square()
        known = self.mean.var(0) / (variance + eps) + rho * about.var(0) / (4 * scale)
        generator, rest = torch.Generator().manual_seed(0), 0.0
        for _ in range(rounds):
            order = torch.randperm(len(self.mean), generator=generator)
            batches = self.regrouped(order, size)
            second = about[order].unflatten(0, (-1, size)).mean(1) - spread
            terms = (batches.mean - at).square() / (variance + eps) + rho * second.square() / (4 * scale)
            rest += (batches.mismatch(mean, variance, eps) - float(terms.mean())) / rounds
        return float(known.mean()) / size + rest


def record(
    model: nn.Module, samples: Samples, sampling: Sampling, count: int, *, training: bool, random: bool = True
) -> list[BatchStatistics]:
    """Batch statistics of every layer's input; running statistics stay as they are.

    Args:
        model: Comes back in train mode.
        samples, sampling: The batches.
        count: How many.
        training: In train mode, or in eval mode.
        random: False: dropout is off, also in train mode.
    """
    model.train(training)
    if not random:
        set_random_layers(model, False)
    found = _inputs(model, samples, sampling, count, _of_batch)
    return [BatchStatistics(*(torch.stack(parts) for parts in layer)) for layer in found]


def record_images(model: nn.Module, samples: Samples, sampling: Sampling, count: int) -> list[ImageStatistics]:
    """Statistics of every image in every layer's input, in eval mode."""
    found = _inputs(model.eval(), samples, sampling, count, _of_images)
    return [ImageStatistics(*(torch.cat(parts) for parts in layer)) for layer in found]


def running(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Running mean and variance in float64."""
    return norm.running_mean.double(), norm.running_var.double()


Reduced = tuple[Tensor, Tensor]


@torch.no_grad()
def _inputs(
    model: nn.Module, samples: Samples, sampling: Sampling, count: int, reduce: Callable[[Tensor], Reduced]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """For every layer the two figures of each call, in a list each; the model comes back in train mode."""
    layers = norms(model)
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in layers]
    momenta = [norm.momentum for norm in layers]
    handles = [norm.register_forward_pre_hook(_keeper(into, reduce)) for norm, into in zip(layers, found, strict=True)]
    for norm in layers:
        norm.momentum = 0.0
    for _, batch in zip(range(count), batches(samples, sampling), strict=False):
        forward(model, batch)
    for norm, momentum, handle in zip(layers, momenta, handles, strict=True):
        norm.momentum = momentum
        handle.remove()
    model.train()
    return found


def _keeper(into: tuple[list[Tensor], list[Tensor]], reduce: Callable[[Tensor], Reduced]) -> Callable[..., None]:
    def keep(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for values, figure in zip(into, reduce(inputs[0].double().unsqueeze(2).flatten(2)), strict=True):
            values.append(figure)

    return keep


def _of_batch(values: Tensor) -> Reduced:
    variance, mean = torch.var_mean(values, dim=(0, 2), correction=0)
    return mean, variance


def _of_images(values: Tensor) -> Reduced:
    return values.mean(2), values.square().mean(2)
