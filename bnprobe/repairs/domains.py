"""Running statistics of every domain, pooled over the samples of a domain in the training data."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.loading.model import BatchFunction, user_code
from bnprobe.measure.batch import copy_tensors, to_device
from bnprobe.nn.per_domain import DomainBatchNorm
from bnprobe.nn.plain import pooled

_Moments = tuple[Tensor, Tensor, Tensor]
"""Mean and biased variance, shape (domains, channels), and values, shape (domains, 1), float64."""


@torch.no_grad()
def recalibrate_domains(model: nn.Module, batches: Iterable[Any], forward: BatchFunction, device: torch.device) -> None:
    """Give the layers with statistics per domain the mean and unbiased variance of the samples of each domain.

    These layers normalize with the statistics of their batch meanwhile, and all others as at inference. A domain of
    which a layer sees at most one value keeps its statistics.

    Args:
        model: Changed in place; the mode of every module is put back.
        batches: Batches of the training data.
        forward: The user's function of (model, batch), which says the domains by ``bnprobe.nn.domain``.
        device: Where the model is.

    Raises:
        UserCodeError: The function raised.
    """
    layers = [module for module in model.modules() if isinstance(module, DomainBatchNorm)]
    modes = [(module, module.training) for module in model.modules()]
    tracking = [(layer, layer.track_running_stats) for layer in layers]
    sums: dict[nn.Module, _Moments] = {}
    with ExitStack() as stack:
        stack.callback(_put_back, modes, tracking)
        model.eval()
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
            hook = layer.register_forward_pre_hook(partial(_gather, sums), with_kwargs=True)
            stack.callback(hook.remove)
        for batch in batches:
            with user_code("calling forward(model, batch) of the converted model"):
                forward(model, copy_tensors(to_device(batch, device)))
    for layer in layers:
        if layer in sums:
            mean, variance, count = (values.to(layer.domain_mean) for values in sums[layer])
            known = count > 1
            layer.domain_mean.copy_(torch.where(known, mean, layer.domain_mean))
            layer.domain_var.copy_(torch.where(known, variance * count / (count - 1), layer.domain_var))


def _put_back(modes: list[tuple[nn.Module, bool]], tracking: list[tuple[DomainBatchNorm, bool]]) -> None:
    for module, training in modes:
        module.training = training
    for layer, track in tracking:
        layer.track_running_stats = track


def _gather(sums: dict[nn.Module, _Moments], layer: DomainBatchNorm, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: add the moments of a call."""
    new = layer.moments_by_domain(*args, **kwargs)
    if layer not in sums:
        sums[layer] = new
        return
    mean, variance, count = (torch.stack(pair) for pair in zip(sums[layer], new, strict=True))
    each, spread, number = (values.flatten(1) for values in (mean, variance, count.expand_as(mean)))
    total = pooled(each, spread, number)
    shape = new[0].shape
    sums[layer] = (total[0].view(shape), total[1].view(shape), total[2].view(shape)[:, :1])
