"""Values that a compiled layer reads, and that change before its backward."""

from __future__ import annotations

import torch
from torch import Tensor


def snapshot(tensor: Tensor) -> Tensor:
    """The values as they are now, constant for the gradient; no copy outside of ``torch.compile``.

    A compiler may compute a value a second time in the backward rather than keep it. It does so too where the value
    comes from a buffer that the forward has moved in between, and the gradients are silently wrong (found with
    PyTorch 2.13, whose pull request 197039 describes it). An operation of our own is never computed a second time.
    """
    if torch.compiler.is_compiling():
        copied: Tensor = _copied(tensor.detach())
        return copied
    return tensor.detach()


@torch.library.custom_op("bnprobe::snapshot", mutates_args=(), schema="(Tensor tensor) -> Tensor")
def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone()


@_copied.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)
