"""Answer a layer's call so that its scale and shift, or its own statistics, can be differentiated through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnprobe.norms import NormCall
from bnprobe.probing.grouping import Grouping


@dataclass(frozen=True)
class Leaves:
    """Scale and shift of one call, y = scale * z + shift with z normalized by the running statistics.

    Attributes:
        scale, shift: Shape (units, channels), leaves of the graph that require grad.
    """

    scale: Tensor
    shift: Tensor


def affine(call: NormCall, grouping: Grouping) -> tuple[Tensor, Leaves]:
    """The layer's output with its running statistics, and its leaves.

    Args:
        call: A call that uses its running statistics.
        grouping: A unit is what it takes for a micro-batch.
    """
    assert call.running_mean is not None  # the caller answers other calls otherwise
    assert call.running_variance is not None
    x = call.input
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = call.running_mean.to(wide)
    rstd = (call.running_variance.double() + call.eps).rsqrt().to(wide)
    z = (x - _as_channels(mean, x)) * _as_channels(rstd, x)
    scale = torch.ones_like(mean) if call.weight is None else call.weight.to(wide)
    shift = torch.zeros_like(mean) if call.bias is None else call.bias.to(wide)
    leaves = Leaves(_leaf(scale, grouping.groups), _leaf(shift, grouping.groups))
    unit = grouping.group_of_row(x.device)
    output = torch.addcmul(_as_rows(leaves.shift, unit, x), z, _as_rows(leaves.scale, unit, x))
    return output.to(x.dtype), leaves


def normalize_together(call: NormCall) -> Tensor:
    """The output with the statistics of all rows taken together, differentiable through these.

    Batch Renorm's r and d are constants.
    """
    x = call.input
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    axes = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(values, axes, correction=0, keepdim=True)
    output = (values - mean) * (variance + call.eps).rsqrt()
    found = call.corrections(mean.reshape(1, -1).double(), variance.reshape(1, -1).double())
    if found is not None:
        r, d = (_as_channels(value[0].to(values.dtype), x) for value in (found.r_clipped, found.d_clipped))
        output = output * r + d
    if call.weight is not None:
        output = output * _as_channels(call.weight, x)
    if call.bias is not None:
        output = output + _as_channels(call.bias, x)
    return output.to(x.dtype)


def _leaf(value: Tensor, units: int) -> Tensor:
    return value.detach().expand(units, -1).clone().requires_grad_()


def _as_channels(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.reshape(-1, *[1] * (x.dim() - 2))


def _as_rows(leaf: Tensor, unit_of_row: Tensor | None, x: Tensor) -> Tensor:
    rows = leaf if unit_of_row is None else leaf[unit_of_row]
    return rows.reshape(*rows.shape, *[1] * (x.dim() - 2))
