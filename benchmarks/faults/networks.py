"""Healthy networks: trained on shuffled batches that are large enough, until their running statistics have settled."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.faults.architectures import ARCHITECTURES
from benchmarks.faults.samples import (
    Batch,
    Samples,
    Sampling,
    Split,
    batches,
    clouds,
    codes,
    digits,
    pairs,
    signals,
    table,
    volumes,
)

Loss = Callable[[nn.Module, Batch], Tensor]

Points = Callable[[Tensor, Tensor], Tensor]
"""How good every sample's prediction is: scores and targets in, (N) in 0..1 out."""

SETTLING = 60
"""Batches after the last change of the weights: what the running average (momentum 0.1) still remembers of the time
before is 0.9 ** 60 = 0.2 %."""


@dataclass(frozen=True)
class Network:
    """One architecture with its data.

    Attributes:
        name: Of the architecture.
        data: What it is trained on.
        loss: Mean over the batch.
        points: How good the prediction of every sample is; the metric is their mean.
        batch_size: At which it is healthy: every layer behaves as if it saw well over 32 values.
        steps: Of the training.
    """

    name: str
    data: Callable[[], Split]
    loss: Loss
    points: Points
    batch_size: int
    steps: int

    def metric(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the batch; larger is better."""
        return self.points(forward(model, batch), batch[1]).mean()


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """The scores of a batch."""
    scores: Tensor = model(batch[0])
    return scores


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy in nats, of class scores (N, C)."""
    return F.cross_entropy(forward(model, batch), batch[1])


def detection(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy in nats, of one score per target."""
    return F.binary_cross_entropy_with_logits(forward(model, batch), batch[1])


def generation(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of images."""
    return F.mse_loss(forward(model, batch), batch[1])


def right_class(scores: Tensor, targets: Tensor) -> Tensor:
    """Whether the class is right: its mean is the accuracy."""
    return (scores.argmax(1) == targets).float()


def right_side(scores: Tensor, targets: Tensor) -> Tensor:
    """Whether the answer to a question of yes or no is right."""
    return ((scores > 0) == (targets > 0.5)).float()


def overlap(scores: Tensor, targets: Tensor) -> Tensor:
    """Dice of every volume."""
    found, wanted = (scores > 0).flatten(1).float(), targets.flatten(1)
    return 2 * (found * wanted).sum(1) / (found.sum(1) + wanted.sum(1)).clamp_min(1)


def likeness(scores: Tensor, targets: Tensor) -> Tensor:
    """1 - squared error over the squared distance to a uniform image, at least 0."""
    spread = (targets - targets.mean((1, 2, 3), keepdim=True)).square().sum((1, 2, 3))
    return (1 - (scores - targets).square().sum((1, 2, 3)) / spread).clamp_min(0)


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("plain", digits, classification, right_class, 64, 250),
        Network("residual", digits, classification, right_class, 64, 250),
        Network("dense", digits, classification, right_class, 64, 250),
        Network("unet3d", volumes, detection, overlap, 64, 120),
        Network("mlp", table, classification, right_class, 128, 250),
        Network("siamese", pairs, detection, right_side, 96, 400),
        Network("audio", signals, classification, right_class, 64, 250),
        Network("points", clouds, classification, right_class, 96, 300),
        Network("mixer", digits, classification, right_class, 64, 250),
        Network("generator", codes, generation, likeness, 96, 300),
    )
}


def healthy(name: str, seed: int) -> nn.Module:
    """A trained network of its own, in train mode; the same bit for bit on one machine."""
    return copy.deepcopy(_trained(name, seed))


@functools.cache
def _trained(name: str, seed: int) -> nn.Module:
    network = NETWORKS[name]
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]()
    train(model, network.loss, network.data().training, Sampling(network.batch_size, seed=seed), network.steps)
    return model


def train(
    model: nn.Module,
    loss: Loss,
    samples: Samples,
    sampling: Sampling,
    steps: int,
    rate: float = 3e-3,
    settling: int = SETTLING,
) -> None:
    """Adam at a rate that falls to zero, then forward passes alone, so that the statistics are those of the weights."""
    model.train()
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=rate)
    drawn = batches(samples, sampling)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(model, next(drawn)).backward()
        optimizer.step()
    optimizer.zero_grad()
    settle(model, samples, sampling, settling)


@torch.no_grad()
def settle(model: nn.Module, samples: Samples, sampling: Sampling, steps: int) -> None:
    """Forward passes in train mode: only the running statistics move."""
    model.train()
    for _, batch in zip(range(steps), batches(samples, sampling), strict=False):
        forward(model, batch)
