"""Let torchvision be imported beside a CPU build of PyTorch, which its wheels' compiled operators are not made for."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache

import torch
from torch import Tensor

_OPERATORS = (
    ("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
)
"""What torchvision gives shapes to when it is imported."""


@cache
def provide() -> None:
    """Declare the operators, unless torchvision's own can be loaded, and compute the one that detection needs here."""
    if importlib.util.find_spec("torchvision") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError:
            pass
        for name, schema in _OPERATORS:
            torch.library.define(name, schema)
        torch.library.impl("torchvision::nms", "cpu", _nms)
        importlib.import_module("torchvision")
        boxes = importlib.import_module("torchvision.ops.boxes")
    vars(boxes)["_assert_has_ops"] = lambda: None


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: the best box, then the best of those that overlap it little, and so on."""
    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[_overlap(dets[best], dets[left]) <= iou_threshold]
    return torch.stack(kept) if kept else left


def _overlap(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box with each of several."""
    low, high = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    common = (high - low).clamp(min=0).prod(1)
    area = (box[2:] - box[:2]).prod()
    return common / (area + (others[:, 2:] - others[:, :2]).prod(1) - common)
