"""What each free remedy would give, measured on evaluation batches; the model's own statistics stay as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bnprobe.errors import UsageError
from bnprobe.probing.batches import CannotEmulateError, join
from bnprobe.probing.emulation import Emulation
from bnprobe.probing.memory import Footprint, fits
from bnprobe.probing.population import steady_population
from bnprobe.probing.runner import Runner
from bnprobe.probing.score import Statistics, evaluate
from bnprobe.records import Remedy, Score

LARGER = (4, 16)
"""Times as many images in a batch as are scanned."""


def what_if(
    runner: Runner,
    training: Sequence[Any],
    evaluation: Sequence[Any],
    batch_size: int,
    at_once: int,
    emulation: Emulation,
) -> tuple[Remedy, ...]:
    """Loss and metric on the evaluation batches, eval path, as loaded and with each remedy.

    * "recalibrated": the population statistics of the training images for running statistics.
    * "evaluation statistics": those of the evaluation images.
    * "batch statistics": every evaluation batch normalizes with its own statistics.
    * "batch statistics, batches of N": the same in larger batches, as far as data and memory go and images of different
      batches may be mixed. Loss and metric see these larger batches, and a metric may not be a mean over images: the
      control is the model as loaded, scored in batches of the same size.

    The layers concerned are those that are selected, keep running statistics and update them in training; the layers
    that model.train() leaves in eval mode are left alone. Population statistics are pooled over all images, their
    variance is unbiased, like that of the buffers, and they are cast to the buffers' dtype; see ``steady_population``.

    Args:
        runner: Installed.
        training, evaluation: Micro-batches of ``batch_size`` images, on the host. Both are bounded by the caller.
        at_once: Micro-batches per physical batch, where ``emulation`` allows it.
        emulation: Whether micro-batches may run together.

    Returns:
        In the order above; none if no layer is concerned. "recalibrated" needs training batches.

    Raises:
        UsageError: There is neither loss nor metric, or no evaluation batch.
        DeviceError, UserCodeError, DataError: As in any pass.
    """
    _require_a_measure(runner, evaluation)
    trial = _Trial(runner, batch_size, at_once if emulation.trusted else 1, emulation)
    before = trial.score(evaluation)
    own, image = steady_population(runner, evaluation, batch_size, trial.at_once, emulation)
    layers = frozenset(own.statistics())
    if not layers:
        return ()
    found: list[Remedy] = []
    if training:
        population, _ = steady_population(runner, training, batch_size, trial.at_once, emulation)
        found.append(trial.with_statistics("recalibrated", population.statistics(), training, evaluation, before))
    found.append(trial.with_statistics("evaluation statistics", own.statistics(), evaluation, evaluation, before))
    found.append(trial.by_batch("batch statistics", layers, evaluation, before))
    return *found, *trial.larger_batches(layers, evaluation, before, image)


@dataclass(frozen=True)
class _Trial:
    """Scores remedies one by one."""

    runner: Runner
    batch_size: int
    at_once: int
    emulation: Emulation

    def score(
        self, batches: Sequence[Any], by_batch: frozenset[int] = frozenset(), statistics: Statistics | None = None
    ) -> Score:
        options = (self.batch_size, self.emulation, self.at_once)
        return evaluate(self.runner, "eval", batches, *options, by_batch=by_batch, statistics=statistics)

    def with_statistics(
        self, name: str, statistics: Statistics, source: Sequence[Any], evaluation: Sequence[Any], before: Score
    ) -> Remedy:
        after = self.score(evaluation, statistics=statistics)
        images = len(source) * self.batch_size
        which = f"the same {images} evaluation" if source is evaluation else f"{images} training"
        detail = f"pooled mean and unbiased variance of {which} images"
        return self._remedy(name, frozenset(statistics), evaluation, before, after, None, detail)

    def by_batch(
        self,
        name: str,
        layers: frozenset[int],
        batches: Sequence[Any],
        before: Score,
        control: Score | None = None,
    ) -> Remedy:
        after = self.score(batches, by_batch=layers)
        detail = f"batches of {self.batch_size} evaluation images, each normalized with its own statistics"
        return self._remedy(name, layers, batches, before, after, control, detail)

    def larger_batches(
        self, layers: frozenset[int], evaluation: Sequence[Any], before: Score, image: Footprint
    ) -> Iterator[Remedy]:
        for factor in LARGER:
            size = factor * self.batch_size
            batches = self._regrouped(evaluation, factor) if fits(image, size, self.runner.device) else []
            if batches:
                trial = _Trial(self.runner, size, max(1, self.at_once // factor), self.emulation)
                control = trial.score(batches)
                same = _close(control.loss, before.loss) and _close(control.metric, before.metric)
                name = f"batch statistics, batches of {size}"
                yield trial.by_batch(name, layers, batches, before, None if same else control)

    def _regrouped(self, evaluation: Sequence[Any], factor: int) -> list[Any]:
        """Larger batches of consecutive images; none if these cannot be made, or images cannot be mixed."""
        if not self.emulation.trusted:
            return []
        whole = len(evaluation) // factor * factor
        try:
            return [join(list(evaluation[i : i + factor])) for i in range(0, whole, factor)]
        except CannotEmulateError:
            return []

    def _remedy(
        self,
        name: str,
        layers: frozenset[int],
        batches: Sequence[Any],
        before: Score,
        after: Score,
        control: Score | None,
        detail: str,
    ) -> Remedy:
        names = tuple(layer.name for layer in self.runner.layers.layers if layer.index in layers)
        return Remedy(name, names, before, after, control, len(batches) * self.batch_size, detail)


def _close(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and math.isclose(one, other, rel_tol=1e-6))


def _require_a_measure(runner: Runner, evaluation: Sequence[Any]) -> None:
    if runner.functions.loss is None and runner.functions.metric is None:
        raise UsageError(
            "What-if compares remedies by a loss or metric, and neither was given. Add loss(model, batch) or"
            " metric(model, batch) to the model file, or name one in the spec."
        )
    if not evaluation:
        raise UsageError(
            "What-if measures remedies on evaluation data, and there is none. Add load_eval_data(batch_size) to the"
            " model file, or name eval_data in the spec."
        )
