"""How models of images are called and scored, as the libraries train them: classes, segmentation and detection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnprobe.errors import DataError
from bnprobe.loading.model import attribute, kind_of

_IGNORED = 255
"""The label of pixels that have none, in the training scripts of torchvision."""

_AUXILIARY = 0.5
"""Weight of the auxiliary head of a segmentation model in its loss, as there."""


def _scores(output: Any) -> Tensor:
    """The class scores of an output, which may come with those of auxiliary heads (Inception, GoogLeNet)."""
    scores = output["out"] if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else output
    if not isinstance(scores, Tensor):
        raise DataError(f"the model returns {kind_of(output)}, not class scores")
    return scores


def _labels(batch: Any, axes: int) -> Tensor:
    """The class indices of a batch of (images, labels).

    Raises:
        DataError: It has none.
    """
    labels = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != axes:
        per = "an index of a class for each sample" if axes == 1 else "an index of a class for each pixel"
        raise DataError(f"the batches are no pairs of images and labels with {per}")
    return labels.long()


def class_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy."""
    labels = _labels(batch, 1)
    return F.cross_entropy(_scores(model(batch[0])), labels)


def class_accuracy(model: nn.Module, batch: Any) -> Tensor:
    """The share of labels that the largest score hits."""
    labels = _labels(batch, 1)
    hits: Tensor = (_scores(model(batch[0])).argmax(1) == labels).float()
    return hits.mean()


def pixel_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of pixels, and half of that of the auxiliary head where there is one."""
    labels, output = _labels(batch, 3), model(batch[0])
    loss = F.cross_entropy(_scores(output), labels, ignore_index=_IGNORED)
    if isinstance(output, Mapping) and isinstance(output.get("aux"), Tensor):
        loss = loss + _AUXILIARY * F.cross_entropy(output["aux"], labels, ignore_index=_IGNORED)
    return loss


def pixel_accuracy(model: nn.Module, batch: Any) -> Tensor:
    """The share of pixels with a label that the largest score hits."""
    labels = _labels(batch, 3)
    hits = _scores(model(batch[0])).argmax(1) == labels
    hits = hits[labels != _IGNORED].float()
    return hits.mean()


# ---- detection


def detect(model: nn.Module, batch: Any) -> Any:
    """Losses in training, detections at inference."""
    images, targets = _images_and_targets(model, batch)
    return model(images, targets) if model.training else model(images)


def detection_loss(model: nn.Module, batch: Any) -> Tensor:
    """The sum of a detector's losses, at inference too: heads compare with the targets, norms stay as they are.

    Raises:
        DataError: The model returned no losses.
    """
    images, targets = _images_and_targets(model, batch)
    with _heads_in_training(model):
        losses = model(images, targets)
    if not isinstance(losses, Mapping) or not losses:
        raise DataError(f"{type(model).__name__} returned {kind_of(losses)} in training, not a dictionary of losses")
    return torch.stack([value.mean() for value in losses.values()]).sum()


@contextmanager
def _heads_in_training(model: nn.Module) -> Iterator[None]:
    """While the block runs, the modules that choose between losses and detections are in train mode, and no other."""
    heads = [model, *(attribute(model, name) for name in ("rpn", "roi_heads"))]
    flags = [(head, head.training) for head in heads if isinstance(head, nn.Module)]
    try:
        for head, _ in flags:
            head.training = True
        yield
    finally:
        for head, flag in flags:
            head.training = flag


def _images_and_targets(model: nn.Module, batch: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """A list of images with their targets; synthetic images have a box in the middle each.

    Raises:
        DataError: The batch is something else.
    """
    if isinstance(batch, Tensor) and batch.dim() == 4:
        return list(batch), [_made_up(model, image) for image in batch]
    if isinstance(batch, list | tuple) and len(batch) == 2:
        images, targets = batch
        lists = all(isinstance(part, list | tuple | Tensor) for part in batch) and len(images) == len(targets)
        if lists and not isinstance(targets, Tensor) and all(isinstance(each, Mapping) for each in targets):
            return list(images), [dict(each) for each in targets]
    raise DataError(
        f"{type(model).__name__} takes a list of images and a list of targets (dictionaries with boxes and labels), but"
        f" a batch is {kind_of(batch)}. Give a loader with collate_fn=lambda samples: tuple(zip(*samples)), or write"
        " forward(model, batch) in a model file."
    )


def _made_up(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """A target with one box of class 1, for an image that shows nothing."""
    height, width = image.shape[-2:]
    box = image.new_tensor([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]])
    target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64, device=image.device)}
    roi_heads = attribute(model, "roi_heads")
    if attribute(roi_heads, "mask_predictor") is not None:
        mask = torch.zeros(1, height, width, dtype=torch.uint8, device=image.device)
        mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
        target["masks"] = mask
    keypoints = attribute(attribute(roi_heads, "keypoint_predictor"), "kps_score_lowres")
    if keypoints is not None:
        middle = image.new_tensor([width / 2, height / 2, 1])
        target["keypoints"] = middle.expand(1, keypoints.out_channels, 3).clone()
    return target
