"""What faults change in a model: units, norms, and wrappers around either."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from benchmarks.faults.architectures import Unit


class Checkpointed(nn.Module):
    """A unit whose forward pass runs again in the backward pass, to save memory: its BN updates twice per step."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.unit, x, use_reentrant=False)
        return result


class TwoDomains(nn.Module):
    """The model sees its inputs and, in a pass of its own, the same inputs from a second domain."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        """The mean of both scores, so that losses stay as they are."""
        result: Tensor = (self.model(x) + self.model(self.change(x))) / 2
        return result


class HeldStatistics(nn.Module):
    """A model whose own ``train()`` keeps every BN in eval mode, while weights and biases train on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> HeldStatistics:
        super().train(mode)
        for norm in norms(self):
            norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x)
        return result


def norms(model: nn.Module) -> list[_BatchNorm]:
    """All BN layers, in network order."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def units(model: nn.Module) -> list[Unit]:
    """All units, in network order."""
    return [module for module in model.modules() if isinstance(module, Unit)]


def plant_dropout(model: nn.Module, probability: float) -> None:
    """Dropout in front of every unit but the first, which sees the data."""
    for unit in units(model)[1:]:
        unit.drop = nn.Dropout(probability)


def set_random_layers(model: nn.Module, active: bool) -> None:
    """Switch dropout alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train(active)


def checkpoint_units(model: nn.Module) -> None:
    """Every unit is checkpointed."""
    for parent, name, unit in list(_placed_units(model)):
        setattr(parent, name, Checkpointed(unit))


def kill_channels(model: nn.Module, fraction: float) -> None:
    """In every second unit the first channels of the norm get a constant input: zero weights before it."""
    for unit in units(model)[::2]:
        weight = unit.operation.weight
        if not isinstance(weight, Tensor) or len(weight) != unit.norm.num_features:
            continue  # the norm comes first: what it sees is made elsewhere
        with torch.no_grad():
            weight[: max(1, round(fraction * len(weight)))] = 0


def set_momentum(model: nn.Module, momentum: float) -> None:
    """The same weight of the new batch in all layers."""
    for norm in norms(model):
        norm.momentum = momentum


def statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copies of all running means and variances."""
    return [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms(model)]


def restore(model: nn.Module, saved: list[tuple[Tensor, Tensor]]) -> None:
    """Put the copies back."""
    for norm, (mean, variance) in zip(norms(model), saved, strict=True):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def _placed_units(model: nn.Module) -> Iterator[tuple[nn.Module, str, Unit]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, Unit):
                yield parent, name, child
