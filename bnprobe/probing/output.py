"""How far the two paths are apart at the model's output, summed over micro-batches on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bnprobe.errors import DataError
from bnprobe.probing.batches import tensors_of
from bnprobe.probing.classes import ClassScores, find_class_scores
from bnprobe.probing.intercept import Pass
from bnprobe.probing.replay import Outputs, rows_of
from bnprobe.probing.runner import PathName, Runner
from bnprobe.records import Output, PathValues, Score

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
        pairs = list(zip(_floating(train), _floating(eval_), strict=False))
        if any(one.shape != other.shape for one, other in pairs):
            self._different_shapes = True
            return {}
        found: Contributions = {}
        if pairs:
            found["difference"] = sum((_square_norm(one - other) for one, other in pairs), start=_zero(pairs))
            found["norm"] = sum((_square_norm(other) for _, other in pairs), start=_zero(pairs))
        if not self._looked_for_scores:
            self._scores = find_class_scores(batch, inputs, [other for _, other in pairs])
            self._looked_for_scores = True
        if self._scores is not None:
            found |= self._scores.measure(*pairs[self._scores.position])
        return found

    def add(self, contributions: Contributions) -> None:
        """Add what one step contributes."""
        for name, value in contributions.items():
            self._totals[name] = self._totals[name] + value if name in self._totals else value

    def on_host(self) -> OutputSums:
        """The same sums on the host: they can be sent to another process."""
        copy = OutputSums()
        copy._totals = {name: total.cpu() for name, total in self._totals.items()}
        copy._different_shapes = self._different_shapes
        return copy

    def merged(self, other: OutputSums) -> OutputSums:
        """The sums of both, which are on the host."""
        both = self.on_host()
        both.add(other._totals)
        both._different_shapes |= other._different_shapes
        return both

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
            note=" ".join(self._notes(totals)) or None,
        )

    def score(self, path: PathName) -> Score:
        """Mean of loss and metric over micro-batches on one path; None where not given, or not finite."""
        totals = {name: float(total) for name, total in self._totals.items()}
        loss, metric = (_ratio(totals, f"{name} {path}", f"{name} {path} count") for name in ("loss", "metric"))
        return Score(loss, metric)

    def _notes(self, totals: dict[str, float]) -> Iterator[str]:
        if self._different_shapes:
            yield "The outputs of the two paths have different shapes and cannot be compared."
        elif "norm" not in totals:
            yield "The forward pass returned no floating-point tensor to compare."
        elif _ratio(totals, "difference", "norm") is None:
            yield "The output of a path is NaN or Inf, or zero everywhere."
        for name in ("loss", "metric"):
            bad = [path for path in ("train", "eval") if not math.isfinite(totals.get(f"{name} {path}", 0.0))]
            if bad:
                yield f"The {name} is NaN or Inf on the {' and the '.join(bad)} path."


def user_values(
    runner: Runner, path: PathName, micro_batches: Sequence[Any], outputs: Outputs, batch_size: int
) -> Contributions:
    """Sum and count of loss and metric over micro-batches on one path.

    They see real micro-batches, as in training, also where these ran together. Where they call the model on the
    batch's own tensors they get the output that is there already.
    """
    functions = {"loss": runner.functions.loss, "metric": runner.functions.metric}
    found: Contributions = {}
    for position, batch in enumerate(micro_batches):
        start, images = position * batch_size, batch_size * len(micro_batches)
        for name, function in functions.items():
            if function is None:
                continue
            rows = rows_of(outputs, start, start + batch_size, images)
            value = runner.call(path, name, function, batch, rows, Pass(batch_size, batch_size))
            number = _one_number(name, value, runner.device)
            found[f"{name} {path}"] = found.get(f"{name} {path}", 0) + number
            found[f"{name} {path} count"] = found.get(f"{name} {path} count", 0) + torch.ones_like(number)
    return found


def _one_number(name: str, value: Any, device: torch.device) -> Tensor:
    number = torch.as_tensor(value, dtype=torch.float64, device=device)
    if number.numel() != 1:
        raise DataError(
            f"{name}(model, batch) must return one number, but gave a tensor of shape {tuple(number.shape)}."
            " Reduce it, e.g. with .mean()."
        )
    return number.detach().reshape(())


def _zero(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=pairs[0][0].device)


def _floating(output: Any) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors_of(output) if tensor.is_floating_point()]


def _square_norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _ratio(totals: dict[str, float], numerator: str, denominator: str) -> float | None:
    below = totals.get(denominator, 0.0)
    value = totals.get(numerator, 0.0) / below if below else torch.inf
    return value if math.isfinite(value) else None


def _root(value: float | None) -> float | None:
    return None if value is None else value**0.5


def _path_values(totals: dict[str, float], name: str) -> PathValues | None:
    train, eval_ = (_ratio(totals, f"{name} {path}", f"{name} {path} count") for path in ("train", "eval"))
    return None if train is None or eval_ is None else PathValues(train, eval_)
