"""Outputs that are scores of classes: how many predictions differ between the paths, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnprobe.probing.batches import tensors_of

_CHUNK_VALUES = 2**22
"""Scores turned into float64 probabilities at a time."""


@dataclass(frozen=True)
class ClassScores:
    """Which output holds class scores of shape (images, classes, *positions).

    Attributes:
        position: Among the floating-point tensors of the output.
        probabilities: They are probabilities, not logits or log probabilities.
    """

    position: int
    probabilities: bool

    def measure(self, train: Tensor, eval_: Tensor) -> dict[str, Tensor]:
        """Sums over predictions: changed arg-max, KL(eval || train) in nats, and their number."""
        rows = max(1, _CHUNK_VALUES // max(eval_[:1].numel(), 1))
        parts = list(zip(train.split(rows), eval_.split(rows), strict=True))
        changed = torch.stack([(one.argmax(1) != other.argmax(1)).sum() for one, other in parts]).sum()
        divergence = torch.stack([self._divergence(one, other) for one, other in parts]).sum()
        predictions = torch.full_like(divergence, eval_.numel() // eval_.shape[1])
        return {"changed": changed.double(), "kl": divergence, "predictions": predictions}

    def _divergence(self, train: Tensor, eval_: Tensor) -> Tensor:
        train, eval_ = self._log(train), self._log(eval_)
        return (eval_.exp() * (eval_ - train)).sum()

    def _log(self, scores: Tensor) -> Tensor:
        if self.probabilities:
            return scores.double().clamp_min(torch.finfo(torch.float32).tiny).log()
        return torch.log_softmax(scores.double(), 1)


def find_class_scores(batch: Any, inputs: set[int], outputs: list[Tensor]) -> ClassScores | None:
    """The output that holds class scores, if one does.

    It does if the batch holds a label for each of its images (and positions): an integer below the number of
    classes, or a distribution over the classes. Of several such outputs it is the one with the fewest classes. It
    also does if the batch holds no targets at all and the one output is a plain table.

    Args:
        batch: The physical batch.
        inputs: Positions of the tensors of the batch that the model was called on; the first tensor if empty.
        outputs: The floating-point outputs.
    """
    others = [tensor for position, tensor in enumerate(tensors_of(batch)) if position not in (inputs or {0})]
    tables = [
        (position, scores) for position, scores in enumerate(outputs) if scores.dim() >= 2 and scores.shape[1] > 1
    ]
    fitting = [(scores.shape[1], position) for position, scores in tables if any(_labels(t, scores) for t in others)]
    if not fitting and not others and len(outputs) == 1:
        fitting = [(scores.shape[1], position) for position, scores in tables if scores.dim() == 2]
    if not fitting:
        return None
    position = min(fitting)[1]
    return ClassScores(position, _are_probabilities(outputs[position]))


def _labels(target: Tensor, scores: Tensor) -> bool:
    if target.is_floating_point():
        return target.shape == scores.shape and _are_probabilities(target)
    same_places = target.shape == (scores.shape[0], *scores.shape[2:])
    return same_places and target.numel() > 0 and int(target.max()) < scores.shape[1]


def _are_probabilities(scores: Tensor) -> bool:
    sums = scores.double().sum(1)
    return bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
