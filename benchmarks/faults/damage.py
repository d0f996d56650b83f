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
from benchmarks.faults.samples import Samples

SCORED = 1200
"""Held-out samples that a case is scored on."""

POINTS = 0.02
"""A metric that fell by more is damage, if it surely fell."""


@dataclass(frozen=True)
class Damage:
    """A case beside the healthy network that it was made from, both scored on the same samples.

    Attributes:
        healthy, faulty: Means of the metric.
        error: Standard error of their difference.
    """

    healthy: float
    faulty: float
    error: float

    @property
    def lost(self) -> float:
        """By how much the metric fell."""
        return self.healthy - self.faulty

    @property
    def is_damaged(self) -> bool:
        """The metric fell by more than two points and two standard errors; NaN is damage."""
        return not self.lost <= max(POINTS, 2 * self.error)


def damage_of(case: Case) -> Damage | None:
    """What the case lost against the healthy network on unchanged data; None: it sees inputs of another size."""
    if case.unseen().inputs.shape[1:] != case.network.data().held_out.inputs.shape[1:]:
        return None
    good, bad = _healthy(case.network.name, case.seed), served_points(case)
    if len(bad) != len(good):  # another choice of samples
        return Damage(float(good.mean()), float(bad.mean()), _error(good) + _error(bad))
    return Damage(float(good.mean()), float(bad.mean()), _error(good - bad))


def served_points(case: Case) -> Tensor:
    """The metric of every sample, (N), as the model is used."""
    return _points(case, case.unseen())


@functools.cache
def _healthy(name: str, seed: int) -> Tensor:
    return served_points(healthy_case(name, seed))


@torch.no_grad()
def _points(case: Case, samples: Samples) -> Tensor:
    case = replace(case, model=copy.deepcopy(case.model))  # train mode moves running statistics
    case.model.train(case.served_in_training)
    torch.manual_seed(case.seed)
    chosen = samples.take(torch.arange(min(SCORED, len(samples))))
    size = case.served_batch or 200
    found = [
        case.network.points(forward(case.model, (inputs, targets)), targets)
        for inputs, targets in zip(chosen.inputs.split(size), chosen.targets.split(size), strict=True)
    ]
    return torch.cat(found)


def _error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))
