"""Differences between the outputs of two models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnprobe.probing.batch import tensors_of
from bnprobe.records import Difference


def difference(expected: Any, found: Any, images: int) -> Difference:
    """Compare outputs tensor by tensor, in any nested structure."""
    one, other = tensors_of(expected), tensors_of(found)
    if not one or len(one) != len(other):
        return Difference(images, math.inf, math.inf)
    parts = [_apart(left, right) for left, right in zip(one, other, strict=True)]
    return Difference(images, max(part[0] for part in parts), max(part[1] for part in parts))


def _apart(expected: Tensor, found: Tensor) -> tuple[float, float]:
    if expected.shape != found.shape:
        return math.inf, math.inf
    if expected.numel() == 0:
        return 0.0, 0.0
    one, other = expected.detach().double(), found.detach().double()
    same = (one == other) | (one.isnan() & other.isnan())  # equal infinities are no difference
    gap = torch.where(same, 0.0, (one - other).abs())
    if not bool(torch.isfinite(gap).all()):
        return math.inf, math.inf
    absolute = float(gap.max())
    largest = float(one.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max())
    return absolute, absolute / largest if largest else (math.inf if absolute else 0.0)
