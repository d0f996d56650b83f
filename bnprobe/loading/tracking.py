"""Running statistics for layers that keep none (track_running_stats=False)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def keeps_none(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether a module is a BN layer without running statistics: it normalizes by its batch at inference too."""
    return isinstance(module, _BatchNorm) and module.running_mean is None and module.running_var is None


@contextmanager
def tracking(layers: Iterable[nn.Module], device: torch.device | None = None) -> Iterator[None]:
    """Give layers without running statistics those of a new layer, mean 0 and variance 1, and switch tracking on.

    If the block raises, the layers are as they were.

    Args:
        layers: BN layers; those that keep running statistics are left alone.
        device: Of the statistics of layers without parameters; those of others are where their parameters are.
    """
    switched = [(layer, layer.track_running_stats) for layer in layers if keeps_none(layer)]
    for layer, _ in switched:
        like = layer.weight if layer.weight is not None else torch.empty(0, device=device)
        layer.running_mean = torch.zeros(layer.num_features, dtype=like.dtype, device=like.device)
        layer.running_var = torch.ones(layer.num_features, dtype=like.dtype, device=like.device)
        layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device=like.device)
        layer.track_running_stats = True
    try:
        yield
    except BaseException:
        for layer, tracked in switched:
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            layer.track_running_stats = tracked
        raise
