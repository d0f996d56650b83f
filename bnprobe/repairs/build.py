"""What building a replacement takes, whatever the repair."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Variants = dict[int | None, type[nn.Module]]
"""Class by the dimensions of space (1 takes none as well); None: for layers that are not bound to any."""

_SPACE_BY_DIMENSIONS = {(2, 3): 1, (4,): 2, (5,): 3}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def space_dimensions(module: _BatchNorm) -> int | None:
    """1, 2 or 3, by the inputs that the layer's own check lets pass; None if it takes several."""
    return _SPACE_BY_DIMENSIONS.get(tuple(n for n in range(2, 6) if _takes(module, n)))


def arguments(module: _BatchNorm) -> dict[str, Any]:
    """What a BN-like replacement is made with, momentum apart."""
    weight = module.weight if module.weight is not None else module.running_mean
    return {
        "num_features": module.num_features,
        "eps": module.eps,
        "affine": module.weight is not None or module.bias is not None,
        "device": None if weight is None else weight.device,
        "dtype": None if weight is None else weight.dtype,
    }


def adopt(replacement: nn.Module, module: _BatchNorm, buffers: bool = True) -> nn.Module:
    """Give a replacement the very Parameters and buffers of a layer, so that an optimizer goes on with them."""
    replacement.register_parameter("weight", module.weight)
    replacement.register_parameter("bias", module.bias)
    for name in _STATISTICS if buffers else ():
        setattr(replacement, name, getattr(module, name))
    return replacement


def no_statistics(module: _BatchNorm) -> str | None:
    """The obstacle of repairs that normalize with running statistics."""
    if module.running_mean is None or module.running_var is None or module.num_batches_tracked is None:
        return (
            "keeps no running statistics (track_running_stats=False): make it with track_running_stats=True and"
            " recalibrate first"
        )
    return None


def _takes(module: _BatchNorm, dimensions: int) -> bool:
    try:
        module._check_input_dim(torch.empty((1,) * dimensions, device="meta"))
    except (ValueError, NotImplementedError, RuntimeError):
        return False
    return True
