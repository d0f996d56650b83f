"""What the layers of a model are set to and hold, without running it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bnprobe.probing.layers import ROOT, LayerSet, ProbedLayer
from bnprobe.probing.origins import origin
from bnprobe.rules.evidence import Anatomy
from bnprobe.usercode import user_code

_RANDOM_KIND = re.compile(r"drop_?path|stochastic_?depth|drop_?block", re.IGNORECASE)
"""Random layers that torch does not have; every library has its own."""

_PROBABILITIES = ("drop_prob", "p", "prob", "drop_path", "drop_rate")
"""What they call their probability."""


def anatomy(layers: LayerSet | Sequence[ProbedLayer], model: nn.Module) -> tuple[Anatomy, ...]:
    """Describe the layers (of a set: those selected), in network order. The model's flags come back as they were.

    Args:
        layers: Found in ``model``.
        model: Its flags are read as they are after ``model.train()``.

    Raises:
        UserCodeError: The model's own train() raised.
    """
    chosen = layers.selected if isinstance(layers, LayerSet) else layers
    with _as_in_training(model):
        before = _random_layers_before(model)
        return tuple(_describe(layer, model, before.get(id(layer.module), ())) for layer in chosen)


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Set the flags as training does; what the user keeps in eval mode beside a root in train mode stays so."""
    flags = [(module, module.training) for module in model.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kept = [module for module, training in flags if model.training and not training]
    try:
        with user_code("calling train() of the model"):
            model.train()
        for module in kept:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training
        for parameter, requires_grad in frozen:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad


def _describe(layer: ProbedLayer, model: nn.Module, before: tuple[str, ...]) -> Anatomy:
    mean, variance = layer.info.running_mean, layer.info.running_variance
    affine = [parameter.requires_grad for parameter in layer.module.parameters(recurse=False)]
    buffers = [buffer for buffer in (mean, variance) if buffer is not None]
    return Anatomy(
        name=layer.name,
        location=origin(model, "" if layer.name == ROOT else layer.name),
        kind=type(layer.module).__name__,
        channels=layer.info.channels,
        eps=layer.info.eps,
        momentum=layer.info.momentum,
        batches_tracked=layer.info.batches_tracked,
        has_running_statistics=mean is not None,
        trains_statistics=layer.module.training and mean is not None,
        trains_affine=any(affine) if affine else None,
        untouched=_is_untouched(mean, variance),
        non_finite=sum(int((~torch.isfinite(buffer)).sum()) for buffer in buffers),
        negative=0 if variance is None else int((variance < 0).sum()),
        dead=0 if variance is None else int(((variance >= 0) & (variance < layer.info.eps)).sum()),
        median_variance=_median(variance),
        dropouts_before=before,
    )


def _is_untouched(mean: Tensor | None, variance: Tensor | None) -> bool:
    return mean is not None and variance is not None and bool((mean == 0).all()) and bool((variance == 1).all())


def _median(variance: Tensor | None) -> float | None:
    if variance is None or not bool(torch.isfinite(variance).all()):
        return None
    return float(variance.detach().double().median())


def has_random_layers(model: nn.Module) -> bool:
    """Whether a layer that is known to be random is active in training, whatever else draws random numbers."""
    with _as_in_training(model):
        return any(module.training and _probability(module) > 0 for module in model.modules())


def _random_layers_before(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """For each module, the names of the random layers that are defined before it and active."""
    found: dict[int, tuple[str, ...]] = {}
    names: tuple[str, ...] = ()
    for name, module in model.named_modules():
        found[id(module)] = names
        if module.training and _probability(module) > 0:
            names = (*names, name or ROOT)
    return found


def _probability(module: nn.Module) -> float:
    """How likely a random layer drops something; 0 for any other module."""
    if isinstance(module, _DropoutNd):
        return float(module.p)
    if not _RANDOM_KIND.search(type(module).__name__):
        return 0.0
    given = (getattr(module, name, None) for name in _PROBABILITIES)
    return next((float(value) for value in given if isinstance(value, int | float)), 0.0)
