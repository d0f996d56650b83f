"""Modules that look like a norm with running statistics but belong to no known family."""

from __future__ import annotations

import re

from torch import nn

_BATCH_INDEPENDENT = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
"""Norms that treat every image alone and keep no statistics: nothing can differ, nothing to report."""

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_BUFFERS = {"running_mean", "running_var", "moving_mean", "moving_variance", "moving_var"}
_NAME = re.compile(r"(batch|sync|instance|frozen|group|layer|re)_?norm|norm([123]d)?$|^a?bn([123]d)?$", re.IGNORECASE)


def lookalike_reason(module: nn.Module) -> str | None:
    """Why a norm-like module is skipped; None if it is no norm, or one that cannot behave differently."""
    if isinstance(module, _INSTANCE_NORMS):
        return "instance norm with running statistics: not a batch norm" if module.track_running_stats else None
    if isinstance(module, _BATCH_INDEPENDENT):
        return None
    if type(module).__module__.startswith("torch.nn.utils."):  # weight and spectral norm: of weights, not of batches
        return None
    kind = type(module).__name__
    own_buffers = {name for name, _ in module.named_buffers(recurse=False)}
    if "frozen" in kind.lower() and own_buffers & _BUFFERS:
        return "frozen batch norm: the same constants in training and at inference"
    if own_buffers & _BUFFERS:
        return f"unknown norm {kind}: it keeps running statistics but does not derive from torch's BatchNorm"
    if _NAME.search(kind) and not any(module.children()):
        return f"unknown norm-like module {kind}"
    return None
