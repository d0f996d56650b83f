"""How good a case is where it is used, on held-out data that no scan sees; without bnprobe."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.faults.cases import Case, healthy_case
from benchmarks.faults.networks import forward

SCORED = 1200
"""Held-out samples that a case is scored on."""

POINTS = 0.02
"""A metric that fell by more is damage, if it surely fell."""

LOSS = 0.1
"""A loss that rose by more than this part is no harm, but not as good as before either."""


@dataclass(frozen=True)
class Damage:
    """A case beside the healthy network that it was made from, or its twin, both scored on the same samples.

    Attributes:
        healthy, faulty: Means of the metric.
        error: Standard error of their difference.
        healthy_loss, faulty_loss: Means of the loss.
    """

    healthy: float
    faulty: float
    error: float
    healthy_loss: float = 0.0
    faulty_loss: float = 0.0

    @property
    def lost(self) -> float:
        """By how much the metric fell."""
        return self.healthy - self.faulty

    @property
    def is_damaged(self) -> bool:
        """The metric fell by more than two points and two standard errors; NaN is damage."""
        return not self.lost <= max(POINTS, 2 * self.error)

    @property
    def is_harmless(self) -> bool:
        """Neither the metric nor the loss is worse."""
        return not self.is_damaged and self.faulty_loss <= (1 + LOSS) * self.healthy_loss


def damage_of(case: Case) -> Damage | None:
    """What the case lost against what it was made from on unchanged data; None: it sees inputs of another size."""
    if case.unseen().inputs.shape[1:] != case.network.data().held_out.inputs.shape[1:]:
        return None
    good, bad = _healthy(case.network.name, case.seed), served(case)
    if case.twin is not None:
        good = served(replace(healthy_case(case.network.name, case.seed), model=case.twin))
    losses = good.loss, bad.loss
    if len(bad.points) != len(good.points):  # another choice of samples
        error = _error(good.points) + _error(bad.points)
        return Damage(float(good.points.mean()), float(bad.points.mean()), error, *losses)
    return Damage(float(good.points.mean()), float(bad.points.mean()), _error(good.points - bad.points), *losses)


@dataclass(frozen=True)
class Served:
    """How a model does where it is used.

    Attributes:
        points: The metric of every sample, (N).
        loss: Mean over the samples.
    """

    points: Tensor
    loss: float


@torch.no_grad()
def served(case: Case) -> Served:
    """Score a copy of the model as it is used, on samples that no scan sees."""
    model = copy.deepcopy(case.model).train(case.served_in_training)  # train mode moves running statistics
    torch.manual_seed(case.seed)
    samples = case.unseen()
    chosen = samples.take(torch.arange(min(SCORED, len(samples))))
    size = case.served_batch or 200
    points, loss = [], 0.0
    for batch in zip(chosen.inputs.split(size), chosen.targets.split(size), strict=True):
        points.append(case.network.points(forward(model, batch), batch[1]).nan_to_num(0.0))
        loss += float(case.network.loss(model, batch)) * len(batch[0]) / len(chosen)
    return Served(torch.cat(points), loss)


@functools.cache
def _healthy(name: str, seed: int) -> Served:
    return served(healthy_case(name, seed))


def _error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))
