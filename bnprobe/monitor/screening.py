"""Whether a training run is worth a closer look: tests over its samples, with one rate of false alarms for the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bnprobe.records import DEFAULT_THRESHOLD, MonitorSample
from bnprobe.rules.shares import deciding_limit, noise_limit
from bnprobe.stats.sequential import MeansAbove, rejected

LOSS = "loss"
"""The series of the loss, beside those of the layers."""

WORSE = 0.1
"""The loss of a batch is worse in eval mode if it is so by more than this part of what it is in train mode."""

LEFT_ON_START = 0.03
"""Above this weight on what they were at the start, running statistics are not judged."""

MOST_UPDATES = 2000
"""From so many updates on they are judged, however slow the average: training is often over soon after."""

_MEMORY = 0.9
"""Weight of the past in the parts of noise and of all else, from sample to sample."""


class Screening:
    """One test for each layer, and one for the loss.

    A layer: its D is, on average, no more than the limit above which a scan flags it. The limit lies between that of
    noise and that of all else, in proportion to what the samples before were made of. The loss: in eval mode it is no
    more often worse than it is not.

    Args:
        layers: Their names.
        alpha: The probability of a false alarm in a whole run, however long.
    """

    def __init__(self, layers: Sequence[str], alpha: float) -> None:
        self._alpha = alpha
        self._series = [*layers, LOSS]
        self._tests = MeansAbove(len(self._series))
        self._over = MeansAbove(len(layers))
        self._noise, self._whole = (np.zeros(len(layers)) for _ in range(2))

    def update(
        self,
        sample: MonitorSample,
        noise: Mapping[str, float],
        ripe: Mapping[str, bool],
        changed: Mapping[str, float],
    ) -> list[str]:
        """Take in a sample; the series that raise an alarm.

        Args:
            changed: For each layer that was changed after an alarm its D against running statistics that had gone on,
                NaN where that is not known: it raises no alarm, and it is tested whether the cause is gone, see
                ``is_over``.
            sample: The sample.
            noise: For each of its layers the D of i.i.d. batches of this size.
            ripe: For each of its layers whether its running statistics have forgotten their start.
        """
        values, limits = [math.nan] * len(self._series), [1.0] * len(self._series)
        within = [math.nan] * (len(self._series) - 1)
        for position, name in enumerate(self._series[:-1]):
            limits[position] = self._limit(position)
            if (layer := sample.layers.get(name)) is not None and ripe[name]:
                if name in changed:
                    known = not math.isnan(changed[name])
                    within[position] = 2.0 * (changed[name] <= limits[position]) if known else math.nan
                else:
                    values[position] = layer.mismatch if math.isfinite(layer.mismatch) else math.inf
                self._add(position, noise[name], changed.get(name, layer.mismatch))
        if sample.loss is not None and all(ripe.values()):
            worse = not sample.loss.eval - sample.loss.train <= WORSE * abs(sample.loss.train)
            values[-1] = 2.0 * worse  # at most 1 on average, where it is no more often so than not
        self._over.update(within, 1.0)
        self._tests.update(values, limits)
        return [self._series[position] for position in rejected(self._tests.e_values(), self._alpha)]

    def _limit(self, position: int) -> float:
        whole, noise = float(self._whole[position]), float(self._noise[position])
        if not whole:
            return noise_limit(DEFAULT_THRESHOLD)
        return deciding_limit(min(noise, whole), max(whole - noise, 0.0), DEFAULT_THRESHOLD)

    def _add(self, position: int, noise: float, whole: float) -> None:
        if math.isfinite(noise) and math.isfinite(whole):
            self._noise[position] = _MEMORY * self._noise[position] + noise
            self._whole[position] = _MEMORY * self._whole[position] + whole

    def is_over(self, layers: Iterable[str]) -> bool:
        """Whether the D of all these layers, which were changed, is surely more often within its limit than not."""
        evidence = self._over.e_values()
        return all(evidence[self._series.index(name)] >= 1 / self._alpha for name in layers)

    def forget(self) -> None:
        """Begin again, once an alarm was looked into."""
        for position in range(len(self._series)):
            self._tests.forget(position)

    def forget_over(self, layers: Iterable[str]) -> None:
        """Begin again to ask of these layers whether a cause is gone."""
        for name in layers:
            self._over.forget(self._series.index(name))

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes, of plain lists."""
        return {
            "tests": self._tests.state(),
            "over": self._over.state(),
            "noise": self._noise.tolist(),
            "whole": self._whole.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._tests.restore(state["tests"])
        self._over.restore(state["over"])
        self._noise, self._whole = np.array(state["noise"]), np.array(state["whole"])


def updates_to_ripen(momentum: float | None) -> int:
    """Updates after which an average has forgotten its start; one of all batches never does."""
    if momentum is None or momentum <= 0:
        return MOST_UPDATES
    if momentum >= 1:
        return 1
    return min(MOST_UPDATES, math.ceil(math.log(LEFT_ON_START) / math.log1p(-momentum)))
