"""What the model's outputs say: the distance of the two paths, and class changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnprobe.measure.batch import as_plain, tensors_of
from bnprobe.measure.scores import ScoreTable
from bnprobe.measure.session import PATHS
from bnprobe.numbers import IN_MODE
from bnprobe.records import MEASURES, Measure, Output, PathValues

_CHUNK_VALUES = 2**22
"""Scores turned into float64 probabilities at a time."""


@dataclass(frozen=True)
class ClassScores:
    """Which output holds class scores of shape (samples, classes, *positions).

    Attributes:
        position: Among the floating-point tensors of the output.
        probabilities: They are probabilities, not logits or log probabilities.
        labels: Position of the labels among the tensors of the batch; None without labels.
    """

    position: int
    probabilities: bool
    labels: int | None = None

    def measure(self, train: Tensor, eval_: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Sums over predictions: changed arg-max, KL(eval || train) in nats, their number, and labels that they hit."""
        rows = max(1, _CHUNK_VALUES // max(eval_[:1].numel(), 1))
        parts = list(zip(train.split(rows), eval_.split(rows), strict=True))
        changed = torch.stack([(one.argmax(1) != other.argmax(1)).sum() for one, other in parts]).sum()
        divergence = torch.stack([self._divergence(one, other) for one, other in parts]).sum()
        predictions = torch.full_like(divergence, eval_.numel() // eval_.shape[1])
        found = {"changed": changed.double(), "kl": divergence, "predictions": predictions}
        if target is not None:
            labels = target.argmax(1) if target.is_floating_point() else target
            hits = torch.stack([(scores.argmax(1) == labels).sum() for scores in (train, eval_)]).max()
            # Others are to be ignored: -100, or 255 as segmentation data has it, which the first batch need not hold.
            known = (labels >= 0) & (labels < eval_.shape[1])
            counts = divergence.new_zeros(eval_.shape[1])
            # To leave the others out by their places, or to call bincount, would wait for the device.
            counts.index_add_(0, labels.where(known, 0).long().flatten(), known.flatten().double())
            found |= {"hits": hits.double(), "labels": counts}
        return found

    def _divergence(self, train: Tensor, eval_: Tensor) -> Tensor:
        train, eval_ = self._log(train), self._log(eval_)
        return (eval_.exp() * (eval_ - train)).sum()

    def _log(self, scores: Tensor) -> Tensor:
        if self.probabilities:
            return scores.double().clamp_min(torch.finfo(torch.float32).tiny).log()
        return torch.log_softmax(scores.double(), 1)


def find_class_scores(batch: Any, inputs: set[int], outputs: list[Tensor]) -> ClassScores | None:
    """The output that holds class scores, if one does.

    It may if the batch holds a label for each of its samples (and positions): an integer below the number of classes,
    or a distribution over the classes; whether these are what it predicts, ``OutputSums`` finds out. Of several such
    outputs it is the one with the fewest classes. It also may if the batch holds no targets at all and the one output
    is a plain table.

    Args:
        batch: The physical batch.
        inputs: Positions of the tensors of the batch that the model was called on; the first tensor if empty.
        outputs: The floating-point outputs.
    """
    others = [
        (position, tensor) for position, tensor in enumerate(tensors_of(batch)) if position not in (inputs or {0})
    ]
    tables = [
        (position, scores) for position, scores in enumerate(outputs) if scores.dim() >= 2 and scores.shape[1] > 1
    ]
    fitting = [
        (scores.shape[1], position, label)
        for position, scores in tables
        for label, target in others
        if _labels(target, scores)
    ]
    if fitting:
        _, position, label = min(fitting)
        return ClassScores(position, _are_probabilities(outputs[position]), label)
    if others or len(outputs) != 1 or not tables or outputs[0].dim() != 2:
        return None
    return ClassScores(0, _are_probabilities(outputs[0]))


def _labels(target: Tensor, scores: Tensor) -> bool:
    if target.is_floating_point():
        return target.shape == scores.shape and _are_probabilities(target)
    same_places = target.shape == (scores.shape[0], *scores.shape[2:])
    return same_places and target.numel() > 0 and int(target.max()) < scores.shape[1]


def _are_probabilities(scores: Tensor) -> bool:
    sums = scores.double().sum(1)
    return bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


CONFIDENT = 2.0
"""Standard errors by which the labels must be hit more often than chance does."""

Contributions = dict[str, Tensor]
"""Float64 sums of one step, by name."""


class OutputSums:
    """Sums behind ``records.Output``. ``measure`` may fail for want of memory and changes nothing; ``add`` adds."""

    def __init__(self) -> None:
        self._totals: Contributions = {}
        self._different_shapes = False
        self._scores: ClassScores | None = None
        self._looked_for_scores = False

    def measure(self, batch: Any, inputs: set[int], train: Any, eval_: Any) -> Contributions:
        """What the outputs of both paths for one physical batch contribute.

        Args:
            batch: The physical batch.
            inputs: Positions of the tensors of the batch that the model was called on: these are no labels.
            train, eval_: The outputs.
        """
        pairs = list(zip(floating(train), floating(eval_), strict=False))
        if any(one.shape != other.shape for one, other in pairs):
            self._different_shapes = True
            return {}
        found = _distance(pairs) if pairs else {}
        if not self._looked_for_scores:
            self._scores = find_class_scores(batch, inputs, [other for _, other in pairs])
            self._looked_for_scores = True
        if self._scores is not None:
            label = self._scores.labels
            target = None if label is None else tensors_of(batch)[label]
            found |= self._scores.measure(*pairs[self._scores.position], target)
        return found

    def add(self, contributions: Contributions) -> None:
        """Add what one step contributes."""
        for name, value in contributions.items():
            self._totals[name] = self._totals[name] + value if name in self._totals else value

    def merge(self, other: OutputSums) -> None:
        """Add what was measured on other micro-batches."""
        self.add(other._totals)
        self._different_shapes |= other._different_shapes

    def on_host(self) -> OutputSums:
        """The same sums on the host: they can be sent to another process."""
        copy = OutputSums()
        copy._totals = {name: total.cpu() for name, total in self._totals.items()}
        copy._different_shapes = self._different_shapes
        return copy

    def compute(self, scores: ScoreTable) -> Output:
        """Transfer the sums and divide; loss and metric are taken from ``scores``."""
        totals = {name: float(total) for name, total in self._totals.items() if name != "labels"}
        squared = _ratio(totals, "difference", "norm")
        divergence = _ratio(totals, "kl", "predictions")
        return Output(
            relative_l2=None if squared is None else squared**0.5,
            argmax_changed=None if divergence is None else _ratio(totals, "changed", "predictions"),
            kl_divergence=divergence,
            loss=_path_values(scores, "loss"),
            metric=_path_values(scores, "metric"),
            note=" ".join(self._notes(totals, scores)) or None,
            predicts_labels=None if divergence is None else self._predicts_labels(totals),
        )

    def _predicts_labels(self, totals: dict[str, float]) -> bool | None:
        """Whether a path hits the labels surely more often than always naming the commonest one; None without labels.

        Whole numbers beside an embedding may look like labels of its columns.
        """
        labels = self._totals.get("labels")
        if labels is None:
            return None
        number = max(float(labels.sum()), 1.0)
        commonest = float(labels.max()) / number
        margin = CONFIDENT * math.sqrt(commonest * (1 - commonest) / number)
        return totals["hits"] / number > commonest + margin

    def _notes(self, totals: dict[str, float], scores: ScoreTable) -> Iterator[str]:
        if self._different_shapes:
            yield "The outputs of training and inference have different shapes and cannot be compared."
        elif "norm" not in totals:
            yield "The forward pass returned no floating-point tensor to compare."
        elif _ratio(totals, "difference", "norm") is None:
            yield "The outputs cannot be compared: in training or at inference they are NaN or Inf, or 0 everywhere."
        for measure in MEASURES:
            bad = [IN_MODE[path] for path in PATHS if not scores.finite(measure, path)]
            if bad:
                yield f"The {measure} is NaN or Inf {' and '.join(bad)}."


def _distance(pairs: list[tuple[Tensor, Tensor]]) -> Contributions:
    """||one - other||^2 and ||other||^2 over all pairs."""
    zero = torch.zeros((), dtype=torch.float64, device=pairs[0][0].device)
    return {
        "difference": sum((square_norm(one - other) for one, other in pairs), start=zero),
        "norm": sum((square_norm(other) for _, other in pairs), start=zero),
    }


def floating(output: Any) -> list[Tensor]:
    """The tensors of an output that are compared."""
    return [as_plain(tensor) for tensor in tensors_of(output) if tensor.is_floating_point()]


def square_norm(values: Tensor) -> Tensor:
    """Sum of the squares of all values, float64, without a graph."""
    norm: Tensor = torch.linalg.vector_norm(values.detach(), dtype=torch.float64)
    return norm.square()


def relative_distance(one: Any, other: Any) -> float | None:
    """||one - other|| / ||other|| over all floating-point outputs; None if not finite, or of different shapes."""
    pairs = list(zip(floating(one), floating(other), strict=False))
    if not pairs or any(left.shape != right.shape for left, right in pairs):
        return None
    totals = {name: float(value) for name, value in _distance(pairs).items()}
    squared = _ratio(totals, "difference", "norm")
    return None if squared is None else squared**0.5


def _ratio(totals: dict[str, float], numerator: str, denominator: str) -> float | None:
    below = totals.get(denominator, 0.0)
    value = totals.get(numerator, 0.0) / below if below else torch.inf
    return value if math.isfinite(value) else None


def _path_values(scores: ScoreTable, measure: Measure) -> PathValues | None:
    train, eval_ = (scores.scores(measure, path) for path in PATHS)
    return None if train is None or eval_ is None else PathValues(train.mean, eval_.mean)
