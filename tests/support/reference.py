"""The slow, obvious measurement: real micro-batches one by one, in float64, with plain hooks.

Nothing here comes from bnprobe, so that an error there cannot hide here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Call = tuple[str, int]
"""(name of the layer, index of its call within one forward pass)."""


@dataclass
class CallFigures:
    """One call of one layer on one path: a row for each micro-batch, a column for each channel."""

    values_per_channel: int = 0
    r: list[np.ndarray] = field(default_factory=list)
    d: list[np.ndarray] = field(default_factory=list)
    mismatch: list[np.ndarray] = field(default_factory=list)


@dataclass
class ReferencePath:
    """One path: every call in call order, and the outputs of each micro-batch."""

    calls: dict[Call, CallFigures]
    outputs: list[Any]

    def layer(self, name: str) -> list[CallFigures]:
        return [figures for (layer, _), figures in self.calls.items() if layer == name]


@dataclass(frozen=True)
class OwnNorm:
    """What a norm of a test's own does; shapes (channels,), float64.

    Attributes:
        owner: Name of the module whose inputs it normalizes.
        unbiased: With the unbiased variance of its batch, in training.
        limits: r_max and d_max of Batch Renorm.
        on_std: eps is added to the standard deviation, not to the variance.
        counts: Whether a call of the owner, by its number in the forward pass, is one of this norm.
    """

    owner: str
    mean: Tensor
    variance: Tensor
    eps: float
    unbiased: bool = False
    limits: tuple[float, float] = (1.0, 0.0)
    counts: Callable[[int], bool] = lambda call: True
    on_std: bool = False


def measure(
    model: nn.Module,
    batches: Sequence[Any],
    path: str,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    norms: dict[str, OwnNorm] | None = None,
) -> ReferencePath:
    """Run ``path`` ("train" or "eval") on a float64 copy of the model, one micro-batch at a time.

    Every micro-batch meets the model as it is: a fresh copy. ``norms`` are further layers, by name.
    """
    statistics = {
        name: (module.running_mean.double(), module.running_var.double(), module.eps)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    result = ReferencePath({}, [])
    for batch in batches:
        twin = copy.deepcopy(model).double()
        twin.train(path == "train")
        own = [
            twin.get_submodule(norm.owner).register_forward_pre_hook(_own_recorder(name, norm, result.calls))
            for name, norm in (norms or {}).items()
        ]
        seen: dict[str, int] = {}
        handles = [
            module.register_forward_pre_hook(_recorder(name, statistics[name], result.calls, seen))
            for name, module in twin.named_modules()
            if name in statistics
        ]
        with torch.no_grad():
            result.outputs.append((forward or _plain)(twin, _double(batch)))
        for handle in (*handles, *own):
            handle.remove()
    return result


def _own_recorder(name: str, norm: OwnNorm, calls: dict[Call, CallFigures]) -> Any:
    numbers = iter(range(1000))

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not norm.counts(next(numbers)):
            return
        columns = inputs[0].detach().transpose(0, 1).reshape(inputs[0].shape[1], -1)
        batch_mean, n = columns.mean(1, keepdim=True), columns.shape[1]
        variance = ((columns - batch_mean) ** 2).sum(1, keepdim=True) / (n - 1 if norm.unbiased else n)
        batch_std, std = (
            value.sqrt() + norm.eps if norm.on_std else (value + norm.eps).sqrt()
            for value in (variance, norm.variance[:, None])
        )
        r, d = batch_std / std, (batch_mean - norm.mean[:, None]) / std
        r_max, d_max = norm.limits
        z_train = (columns - batch_mean) / batch_std * r.clamp(1 / r_max, r_max) + d.clamp(-d_max, d_max)
        z_test = (columns - norm.mean[:, None]) / std
        figures = calls.setdefault((name, 0), CallFigures(values_per_channel=n))
        figures.r.append(r[:, 0].numpy())
        figures.d.append(d[:, 0].numpy())
        figures.mismatch.append(((z_train - z_test) ** 2).mean(1).numpy())

    return hook


def _plain(model: nn.Module, batch: Any) -> Any:
    return model(batch if isinstance(batch, Tensor) else batch[0])


def _double(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: _double(value) for key, value in batch.items()}
    return tuple(_double(item) for item in batch)


def _recorder(name: str, statistics: Any, calls: dict[Call, CallFigures], seen: dict[str, int]) -> Any:
    mean, variance, eps = statistics

    def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
        call = (name or "(root)", seen.get(name, 0))
        seen[name] = call[1] + 1
        columns = inputs[0].detach().transpose(0, 1).reshape(inputs[0].shape[1], -1)
        figures = calls.setdefault(call, CallFigures())
        figures.values_per_channel = columns.shape[1]
        batch_mean = columns.mean(1)
        batch_variance = ((columns - batch_mean[:, None]) ** 2).mean(1)
        batch_std, std = (batch_variance + eps).sqrt(), (variance + eps).sqrt()
        z_train = (columns - batch_mean[:, None]) / batch_std[:, None]
        z_test = (columns - mean[:, None]) / std[:, None]
        figures.r.append((batch_std / std).numpy())
        figures.d.append(((batch_mean - mean) / std).numpy())
        figures.mismatch.append(((z_train - z_test) ** 2).mean(1).numpy())

    return hook
