"""The data of the benchmark: images, pairs, a table and volumes, each split into training and held-out samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset

DIGIT_COPIES, ROW_COPIES, VOLUMES, CLOUDS = 20, 60, 16_000, 16_000
"""Jittered copies of every measured sample, and volumes made up: so many that a batch is a hundredth of the data or
less, and batches drawn without replacement are nearly independent of one another."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Samples:
    """Inputs (N, ...), targets (N, ...), and the group of each sample (N): what a careless loader sorts by."""

    inputs: Tensor
    targets: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Tensor) -> Samples:
        """Some of the samples."""
        return Samples(self.inputs[rows], self.targets[rows], self.groups[rows])


@dataclass(frozen=True)
class Split:
    """Samples to train on, and others of the same distribution that no training sees."""

    training: Samples
    held_out: Samples


@dataclass(frozen=True)
class Sampling:
    """How batches are drawn.

    Attributes:
        batch_size: Samples in a batch.
        order: "shuffled", or "grouped": every batch is made of ``runs`` runs of samples of one group each.
        runs: In a batch, where it is grouped.
        images: Only so many samples take part; None: all.
        drop_last: Whether a partial last batch is left out.
        seed: Of the order.
    """

    batch_size: int
    order: str = "shuffled"
    runs: int = 1
    images: int | None = None
    drop_last: bool = True
    seed: int = 0


class Order(Sampler[int]):
    """Positions of samples in the order of a ``Sampling``; every iteration draws a new order."""

    def __init__(self, groups: Tensor, sampling: Sampling) -> None:
        self.groups = groups[: sampling.images]
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions().tolist())

    def __len__(self) -> int:
        return len(self.groups) if self.sampling.order == "shuffled" else len(self.positions())

    def positions(self) -> Tensor:
        """One epoch."""
        if self.sampling.order == "shuffled":
            return torch.randperm(len(self.groups), generator=self.generator)
        runs = [run for group in self.groups.unique() for run in self._runs_of(group)]
        return torch.cat([runs[index] for index in torch.randperm(len(runs), generator=self.generator)])

    def _runs_of(self, group: Tensor) -> list[Tensor]:
        members = (self.groups == group).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=self.generator)]
        length = max(1, self.sampling.batch_size // self.sampling.runs)
        return [run for run in shuffled.split(length) if len(run) == length]


def loader(samples: Samples, sampling: Sampling) -> DataLoader[Batch]:
    """A DataLoader as a user has one."""
    dataset = TensorDataset(samples.inputs[: sampling.images], samples.targets[: sampling.images])
    order = Order(samples.groups, sampling)
    return DataLoader(dataset, sampling.batch_size, sampler=order, drop_last=sampling.drop_last)


def batches(samples: Samples, sampling: Sampling) -> Iterator[Batch]:
    """The same batches, full ones only, without end and without the cost of collating sample by sample."""
    order = Order(samples.groups, sampling)
    while True:
        for rows in order.positions().split(sampling.batch_size):
            if len(rows) == sampling.batch_size:
                yield samples.inputs[rows], samples.targets[rows]


@functools.cache
def digits() -> Split:
    """Images (N, 1, 8, 8) in 0..1 and their classes; grouped by class."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    return _split(Samples(images, labels, labels), _jittered_images, DIGIT_COPIES)


@functools.cache
def signals() -> Split:
    """The digits, read from left to right: 8 channels, 8 steps; (N, 8, 8), grouped by class."""
    split = digits()
    return Split(*(changed(side, lambda images: images[:, 0]) for side in (split.training, split.held_out)))


@functools.cache
def codes() -> Split:
    """Codes (N, 16), of a class and 6 random numbers, and the images (N, 1, 8, 8) that they stand for; by class."""
    images, labels = (torch.from_numpy(values) for values in load_digits(return_X_y=True))
    images = images.float().div(16)
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    directions = torch.linalg.svd(images - means[labels], full_matrices=False).Vh[:6]
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(10, (CLOUDS,), generator=generator)
    numbers = torch.randn(CLOUDS, 6, generator=generator)
    targets = (means[label] + 0.3 * numbers @ directions).view(-1, 1, 8, 8)
    return _fifth_held_out(Samples(torch.cat([F.one_hot(label, 10).float(), numbers], 1), targets, label))


@functools.cache
def clouds(points: int = 24) -> Split:
    """Clouds (N, 2, P) of points around one of five figures, and which; grouped by figure."""
    generator = torch.Generator().manual_seed(0)
    at = 2 * torch.pi * torch.rand(CLOUDS, points, generator=generator)
    figure = torch.randint(5, (CLOUDS,), generator=generator)
    shapes = torch.stack([torch.ones_like(at), *(1 + 0.5 * torch.cos(lobes * at) for lobes in (1, 2, 3, 4))])
    radius = shapes[figure, torch.arange(CLOUDS)] * (0.8 + 0.4 * torch.rand(CLOUDS, 1, generator=generator))
    inputs = torch.stack([radius * at.cos(), radius * at.sin()], 1)
    inputs = inputs + 0.25 * torch.randn(inputs.shape, generator=generator)
    return _fifth_held_out(Samples(inputs, figure, figure))


@functools.cache
def pairs() -> Split:
    """Pairs of digits (N, 2, 1, 8, 8) and whether both show the same one; grouped by class of the first."""
    split = digits()
    return Split(_paired(split.training, 1), _paired(split.held_out, 2))


@functools.cache
def table() -> Split:
    """Standardized logarithms of the breast-cancer features (N, 30) and the diagnosis; grouped by diagnosis."""
    bunch = load_breast_cancer()
    features = torch.from_numpy(np.log1p(100 * bunch.data)).float()
    features = ((features - features.mean(0)) / features.std(0)).clamp(-4, 4)
    labels = torch.from_numpy(bunch.target).long()
    return _split(Samples(features, labels, labels), _jittered_rows, ROW_COPIES)


@functools.cache
def volumes(count: int = VOLUMES, size: int = 8, sites: int = 4) -> Split:
    """Volumes (N, 1, 8, 8, 8) with a bright ball, and where it is; grouped by site, which sets brightness and gain."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.arange(size).float()
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    centre = 2 + (size - 5) * torch.rand((count, 3, 1, 1, 1), generator=generator)
    radius = 1.5 + torch.rand((count, 1, 1, 1), generator=generator)
    mask = ((grid - centre).square().sum(1).sqrt() < radius).float().unsqueeze(1)
    site = torch.randint(sites, (count,), generator=generator)
    level = site.float() / (sites - 1) + 0.1 * torch.randn(count, generator=generator)
    noise = 0.4 * torch.randn((count, 1, size, size, size), generator=generator)
    inputs = (1 + 0.5 * level).view(-1, 1, 1, 1, 1) * (mask + noise) + 1.5 * level.view(-1, 1, 1, 1, 1)
    return _fifth_held_out(Samples(inputs, mask, site))


def changed(samples: Samples, change: Callable[[Tensor], Tensor]) -> Samples:
    """The same samples with other inputs."""
    return replace(samples, inputs=change(samples.inputs))


def _fifth_held_out(samples: Samples) -> Split:
    chosen = torch.arange(len(samples)) % 5 == 0
    return Split(samples.take(~chosen), samples.take(chosen))


def _split(samples: Samples, jittered: Callable[[Tensor, torch.Generator], Tensor], copies: int) -> Split:
    """Every fifth sample is held out; the copies of a sample stay on its side."""
    generator = torch.Generator().manual_seed(0)
    shuffled = samples.take(torch.randperm(len(samples), generator=generator))
    chosen = torch.arange(len(samples)) % 5 == 0
    sides = [shuffled.take(side.nonzero().flatten().repeat(copies)) for side in (~chosen, chosen)]
    return Split(*(changed(side, lambda inputs: jittered(inputs, generator)) for side in sides))


def _jittered_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by up to one pixel, with a little noise."""
    padded = F.pad(images, (1, 1, 1, 1))
    moves = torch.randint(3, (len(images), 2), generator=generator)
    moved = torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, moves.tolist(), strict=True)])
    return moved + 0.05 * torch.randn(moved.shape, generator=generator)


def _jittered_rows(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows + 0.2 * torch.randn(rows.shape, generator=generator)


def _paired(samples: Samples, seed: int) -> Samples:
    """Half of the pairs show the same class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator)
    by_class = samples.groups[order].sort(stable=True).indices
    position = torch.empty_like(order).scatter_(0, order[by_class], torch.arange(len(samples)))
    neighbour = order[by_class][(position + 1) % len(samples)]
    other = torch.where(torch.rand(len(samples), generator=generator) < 0.5, neighbour, order)
    both = torch.stack([samples.inputs, samples.inputs[other]], dim=1)
    same = (samples.groups == samples.groups[other]).float()
    return Samples(both, same, samples.groups)
