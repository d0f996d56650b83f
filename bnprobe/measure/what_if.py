"""What each free remedy would give, measured on held-out data. The model's own statistics do not change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bnprobe.errors import UsageError
from bnprobe.measure.batch import CannotEmulateError, join
from bnprobe.measure.hooks import LayerStatistics
from bnprobe.measure.memory import Footprint, fits_in_memory
from bnprobe.measure.physical_batch import Batching
from bnprobe.measure.population import steady_population
from bnprobe.measure.scores import score_batches
from bnprobe.measure.session import Session
from bnprobe.records import FREE_REMEDIES, Remedy, Score

_RECALIBRATED, _EVALUATION_STATISTICS, _BATCH_STATISTICS = FREE_REMEDIES

LARGER = (4, 16)
"""Factors by which batches are made larger than those scanned."""


def what_if(
    session: Session, training: Sequence[Any], held_out: Sequence[Any], batching: Batching
) -> tuple[Remedy, ...]:
    """Loss and metric on the held-out batches, eval path, as loaded and with each remedy.

    * "recalibrated": the population statistics of the training data as running statistics.
    * "evaluation statistics": those of the held-out data.
    * "batch statistics": every held-out batch normalizes with its own statistics.
    * "batch statistics, batches of N": the same in larger batches, as far as data and memory allow and samples of
      different batches may be mixed. Loss and metric see these larger batches, and a metric may not be a mean over
      samples: the control is the model as loaded, scored in batches of the same size.

    The layers concerned are those that are selected, keep running statistics and update them in training; the layers
    that model.train() leaves in eval mode are left alone. Population statistics are pooled over all samples, their
    variance is unbiased, like that of the buffers, and they are cast to the buffers' dtype; see ``steady_population``.

    Args:
        session: Installed.
        training, held_out: Micro-batches on the host. Both are bounded by the caller.
        batching: How they run.

    Returns:
        In the order above; none if no layer is concerned. "recalibrated" needs training batches.

    Raises:
        UsageError: There is neither loss nor metric, or no held-out batch.
        DeviceError, UserCodeError, DataError: As in any pass.
    """
    _require_a_measure(session, held_out)
    trial = _Trial(session, batching)
    before = trial.score(held_out)
    own, footprint = steady_population(session, held_out, batching)
    layers = frozenset(own.statistics())
    if not layers:
        return ()
    found: list[Remedy] = []
    if training:
        population, _ = steady_population(session, training, batching)
        found.append(trial.with_statistics(_RECALIBRATED, population.statistics(), training, held_out, before))
    found.append(trial.with_statistics(_EVALUATION_STATISTICS, own.statistics(), held_out, held_out, before))
    found.append(trial.by_batch(_BATCH_STATISTICS, layers, held_out, before))
    return *found, *trial.larger_batches(layers, held_out, before, footprint)


@dataclass(frozen=True)
class _Trial:
    """Scores remedies one by one."""

    session: Session
    batching: Batching

    def score(
        self, batches: Sequence[Any], by_batch: frozenset[int] = frozenset(), statistics: LayerStatistics | None = None
    ) -> Score:
        table = score_batches(self.session, "eval", batches, self.batching, by_batch=by_batch, statistics=statistics)
        return table.score("eval")

    def with_statistics(
        self, name: str, statistics: LayerStatistics, source: Sequence[Any], held_out: Sequence[Any], before: Score
    ) -> Remedy:
        after = self.score(held_out, statistics=statistics)
        samples = len(source) * self.batching.batch_size
        which = f"the same {samples} held-out" if source is held_out else f"{samples} training"
        detail = f"pooled mean and unbiased variance of {which} samples"
        return self._remedy(name, frozenset(statistics), held_out, before, after, None, detail)

    def by_batch(
        self,
        name: str,
        layers: frozenset[int],
        batches: Sequence[Any],
        before: Score,
        control: Score | None = None,
    ) -> Remedy:
        after = self.score(batches, by_batch=layers)
        size = self.batching.batch_size
        detail = f"batches of {size} held-out samples, each normalized with its own statistics"
        return self._remedy(name, layers, batches, before, after, control, detail)

    def larger_batches(
        self, layers: frozenset[int], held_out: Sequence[Any], before: Score, footprint: Footprint
    ) -> Iterator[Remedy]:
        for factor in LARGER:
            size = factor * self.batching.batch_size
            batches = self._regrouped(held_out, factor) if fits_in_memory(footprint, size, self.session.device) else []
            if batches:
                batching = Batching(size, self.batching.emulation, max(1, self.batching.at_once // factor))
                trial = _Trial(self.session, batching)
                control = trial.score(batches)
                same = _close(control.loss, before.loss) and _close(control.metric, before.metric)
                name = f"{_BATCH_STATISTICS}, batches of {size}"
                yield trial.by_batch(name, layers, batches, before, None if same else control)

    def _regrouped(self, held_out: Sequence[Any], factor: int) -> list[Any]:
        """Larger batches of consecutive samples; empty if samples cannot be joined or mixed."""
        if not self.batching.emulation.trusted:
            return []
        whole = len(held_out) // factor * factor
        try:
            return [join(list(held_out[i : i + factor]), self.batching.batch_size) for i in range(0, whole, factor)]
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
        names = tuple(layer.name for layer in self.session.layers.layers if layer.index in layers)
        return Remedy(name, names, before, after, control, len(batches) * self.batching.batch_size, detail)


def _close(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and math.isclose(one, other, rel_tol=1e-6))


def _require_a_measure(session: Session, held_out: Sequence[Any]) -> None:
    if session.functions.loss is None and session.functions.metric is None:
        raise UsageError(
            "What-if compares remedies by a loss or metric, but there is neither. Add loss(model, batch) or"
            " metric(model, batch) to the model file, or name one in the spec."
        )
    if not held_out:
        raise UsageError(
            "What-if measures remedies on held-out data, but there is none. Add load_eval_data(batch_size) to the"
            " model file, or name eval_data in the spec."
        )
