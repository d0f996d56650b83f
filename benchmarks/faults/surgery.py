"""What faults change in a model: units, norms, and wrappers around either."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from benchmarks.faults.architectures import PreUnit, Unit


class Checkpointed(nn.Module):
    """A unit whose forward pass runs again in the backward pass, to save memory: its BN updates twice per step."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.unit, x, use_reentrant=False)
        return result


class TwoDomains(nn.Module):
    """The model sees its inputs and, in a pass of its own, the same inputs from a second domain.

    Attributes:
        joined: Both domains go through the layers in one call.
    """

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.change = change
        self.joined = False

    def forward(self, x: Tensor) -> Tensor:
        """The mean of both scores, so that losses stay as they are."""
        if self.joined:
            scores: Tensor = self.model(torch.cat([x, self.change(x)])).unflatten(0, (2, -1)).mean(0)
            return scores
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


class AlwaysDrop(nn.Module):
    """Dropout as ``F.dropout`` does it where nobody says that training is over."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.probability)


class WithCopy(nn.Module):
    """A model beside a copy that is no longer trained by gradients, as momentum encoders have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.copy = copy.deepcopy(model).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (self.model(x) + self.copy(x)) / 2
        return result


class WithSideHead(nn.Module):
    """A model with a head that runs in training only."""

    def __init__(self, model: nn.Module, inputs: int) -> None:
        super().__init__()
        self.model = model
        self.side = nn.Sequential(nn.Linear(inputs, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x)
        if self.training:
            result = result + 0 * self.side(x.flatten(1)).mean()
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


def always_drop(model: nn.Module, probability: float) -> None:
    """Dropout that ``eval()`` does not stop, in the last unit."""
    units(model)[-1].drop = AlwaysDrop(probability)


def heed_eval(model: nn.Module) -> None:
    """Dropout that ``eval()`` does not stop becomes one that it stops."""
    for unit in units(model):
        if isinstance(unit.drop, AlwaysDrop):
            unit.drop = nn.Dropout(unit.drop.probability)


def set_random_layers(model: nn.Module, active: bool) -> None:
    """Switch dropout alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train(active)


def checkpoint_units(model: nn.Module) -> None:
    """Every unit is checkpointed."""
    for parent, name, unit in list(_placed_units(model)):
        setattr(parent, name, Checkpointed(unit))


@torch.no_grad()
def kill_channels(model: nn.Module, fraction: float) -> list[nn.Parameter]:
    """In every second unit the first channels of the norm get a constant input: zero weights before it.

    Returns:
        The weights that were changed.
    """
    changed = []
    for unit in units(model)[::2]:
        weight = unit.operation.weight
        if isinstance(unit, PreUnit) or unit.operation.bias is not None:
            continue  # the norm comes first, or sees a bias: its input is made elsewhere
        outputs = weight.transpose(0, 1) if isinstance(unit.operation, nn.ConvTranspose2d) else weight
        outputs[: max(1, round(fraction * len(outputs)))] = 0
        changed.append(weight)
    return changed


def set_momentum(model: nn.Module, momentum: float) -> None:
    """The same weight of the new batch in all layers."""
    for norm in norms(model):
        norm.momentum = momentum


def set_eps(model: nn.Module, eps: float) -> None:
    """The same eps in all layers."""
    for norm in norms(model):
        norm.eps = eps


@torch.no_grad()
def prune(model: nn.Module, fraction: float) -> None:
    """The smallest weights of every unit but the first are zero."""
    for unit in units(model)[1:]:
        weight = unit.operation.weight
        weight[weight.abs() < weight.abs().flatten().quantile(fraction)] = 0


@torch.no_grad()
def quantize(model: nn.Module, bits: int) -> None:
    """The weights of every unit on 2 ** bits - 1 levels between plus and minus their largest."""
    for unit in units(model):
        weight = unit.operation.weight
        step = weight.abs().max() / (2 ** (bits - 1) - 1 or 1)
        weight.copy_((weight / step).round() * step)


@contextmanager
def rounded_buffers(model: nn.Module) -> Iterator[None]:
    """Running statistics are rounded to bfloat16 after every update."""

    def round_off(norm: nn.Module, inputs: object, outputs: object) -> None:
        for buffer in (norm.running_mean, norm.running_var):
            buffer.data.copy_(buffer.bfloat16())  # autograd has saved the buffer

    handles = [norm.register_forward_hook(round_off) for norm in norms(model)]
    yield
    for handle in handles:
        handle.remove()


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
