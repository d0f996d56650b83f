"""How far the two paths are apart at the model's output, summed over micro-batches on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnprobe.errors import DataError
from bnprobe.probing.batches import tensors_of
from bnprobe.probing.intercept import Pass
from bnprobe.probing.replay import Outputs, rows_of
from bnprobe.probing.runner import PathName, Runner
from bnprobe.records import Output, PathValues


class OutputSums:
    """Sums behind ``records.Output``."""

    def __init__(self, device: torch.device) -> None:
        self._totals: dict[str, Tensor] = {}
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._different_shapes = False
        self._probabilities: bool | None = None

    def add(self, batch: Any, train: Any, eval_: Any) -> None:
        """Add the outputs of both paths for one physical batch."""
        pairs = list(zip(_floating(train), _floating(eval_), strict=False))
        if any(one.shape != other.shape for one, other in pairs):
            self._different_shapes = True
            return
        for one, other in pairs:
            self._count("difference", _square_norm(one - other))
            self._count("norm", _square_norm(other))
        scores = next(((one, other) for one, other in pairs if one.dim() >= 2), None)
        if scores and is_class_scores(batch, scores[0]):
            self._add_scores(*scores)

    def add_value(self, name: str, path: PathName, value: Any) -> None:
        """Add one micro-batch's loss or metric.

        Raises:
            DataError: It is not one number.
        """
        number = torch.as_tensor(value, dtype=torch.float64, device=self._zero.device)
        if number.numel() != 1:
            raise DataError(
                f"{name}(model, batch) must return one number, but gave a tensor of shape {tuple(number.shape)}."
                " Reduce it, e.g. with .mean()."
            )
        self._count(f"{name} {path}", number.detach().reshape(()))
        self._count(f"{name} {path} count", torch.ones_like(self._zero))

    def result(self) -> Output:
        """Transfer the sums and divide."""
        totals = {name: float(total) for name, total in self._totals.items()}
        divergence = _ratio(totals, "kl", "predictions")
        return Output(
            relative_l2=_root(_ratio(totals, "difference", "norm")),
            argmax_changed=None if divergence is None else _ratio(totals, "changed", "predictions"),
            kl_divergence=divergence,
            loss=_path_values(totals, "loss"),
            metric=_path_values(totals, "metric"),
            note=self._note(totals),
        )

    def _add_scores(self, train: Tensor, eval_: Tensor) -> None:
        if self._probabilities is None:
            self._probabilities = _are_probabilities(eval_)
        train_log, eval_log = (_log_probabilities(scores, self._probabilities) for scores in (train, eval_))
        divergence = (eval_log.exp() * (eval_log - train_log)).sum(1)
        self._count("kl", divergence.sum())
        self._count("changed", (train.argmax(1) != eval_.argmax(1)).sum())
        self._count("predictions", torch.full_like(self._zero, divergence.numel()))

    def _count(self, name: str, value: Tensor) -> None:
        self._totals[name] = self._totals.get(name, self._zero) + value

    def _note(self, totals: dict[str, float]) -> str | None:
        if self._different_shapes:
            return "The outputs of the two paths have different shapes and cannot be compared."
        if "norm" not in totals:
            return "The forward pass returned no floating-point tensor to compare."
        if _ratio(totals, "difference", "norm") is None:
            return "The output of a path is NaN or Inf, or zero everywhere."
        return None


def user_values(
    runner: Runner, path: PathName, micro_batches: Sequence[Any], outputs: Outputs, batch_size: int
) -> list[tuple[str, Any]]:
    """("loss" or "metric", value) for each micro-batch on one path.

    They see real micro-batches, as in training, also where these ran together. Where they call the model on the
    batch's own tensors they get the output that is there already.
    """
    functions = {"loss": runner.functions.loss, "metric": runner.functions.metric}
    values = []
    for position, batch in enumerate(micro_batches):
        start, images = position * batch_size, batch_size * len(micro_batches)
        for name, function in functions.items():
            if function is not None:
                rows = rows_of(outputs, start, start + batch_size, images)
                values.append((name, runner.call(path, name, function, batch, rows, Pass(batch_size, batch_size))))
    return values


def is_class_scores(batch: Any, scores: Tensor) -> bool:
    """Whether an output (images, classes, *positions) holds scores of classes.

    It does if the batch holds integer labels, one for each image (and position); or if the batch holds no targets
    at all and the output is a plain table.
    """
    if scores.shape[1] < 2:
        return False
    labels = (scores.shape[0], *scores.shape[2:])
    others = tensors_of(batch)[1:]
    if any(not tensor.is_floating_point() and tensor.shape == labels for tensor in others):
        return True
    return scores.dim() == 2 and not others


def _floating(output: Any) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors_of(output) if tensor.is_floating_point()]


def _square_norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _are_probabilities(scores: Tensor) -> bool:
    sums = scores.double().sum(1)
    return bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def _log_probabilities(scores: Tensor, probabilities: bool) -> Tensor:
    """Log probabilities from logits, log probabilities or probabilities."""
    scores = scores.double()
    if probabilities:
        return scores.clamp_min(torch.finfo(torch.float32).tiny).log()
    return torch.log_softmax(scores, 1)


def _ratio(totals: dict[str, float], numerator: str, denominator: str) -> float | None:
    below = totals.get(denominator, 0.0)
    value = totals.get(numerator, 0.0) / below if below else torch.inf
    return value if value < torch.inf else None


def _root(value: float | None) -> float | None:
    return None if value is None else value**0.5


def _path_values(totals: dict[str, float], name: str) -> PathValues | None:
    train, eval_ = (_ratio(totals, f"{name} {path}", f"{name} {path} count") for path in ("train", "eval"))
    return None if train is None or eval_ is None else PathValues(train, eval_)
