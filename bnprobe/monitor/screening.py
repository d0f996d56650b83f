"""Whether a training run is worth a closer look: tests over its samples, with one rate of false alarms for the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnprobe.errors import StateError
from bnprobe.monitor.sampling import TOGETHER
from bnprobe.numbers import listed
from bnprobe.records import DEFAULT_THRESHOLD, ModeLoss, MonitorSample
from bnprobe.rules.shares import deciding_limit, noise_limit
from bnprobe.stats.sequential import MeansAbove, rejected
from bnprobe.stats.theory import mismatch_iid

LOSS, UPDATES = "loss", "updates"
"""What the loss, and updates of running statistics that no loss is of, are called beside the layers."""

GROSS = 4.0
"""A D of more than so many times its limit is looked into whatever the loss says."""

DOUBLE = 2.0
"""So is a loss that is more often than not beyond this multiple in eval mode, whatever D is."""

FEW_STEPS = 0.1
"""Extra updates in no more than this part of the samples are not looked into."""

LEFT_ON_START = 0.03
"""Above this weight on what they were at the start, running statistics are not judged."""

MOST_UPDATES = 2000
"""From so many updates on they are judged, however slow the average: training is often over soon after."""

FIRST = 5
"""Samples after a change that say what D is while its cause lasts."""

_MEMORY = 0.9
"""Weight of the past in the parts of noise and of all else, from sample to sample."""


class Screening:
    """Whether batches are too small, the two modes differ, or the loss in eval mode is out of all proportion.

    A layer raises an alarm where one of these is rejected:

    * The D that i.i.d. batches of this size have is, on average, within the limit of noise.
    * Its D is, on average, no more than the limit above which a scan flags it, or the loss is neither more often larger
      nor more often smaller in eval mode. At a high learning rate running statistics lag behind the weights in every
      sound run; that is a fault where the loss shows it. Where no loss is known, D alone is judged.
    * Its D is, on average, no more than ``GROSS`` times that limit.
    * Of a layer that training holds in eval mode this one alone: the D of its last batches, ``TOGETHER`` samples or
      more of them, is on average no more than the limit of all that is no noise, and the noise of as many values. The
      loss shows nothing of it.

    The limit of D lies between that of noise and that of all else, in proportion to what the samples before were made
    of. The loss raises an alarm where this is rejected: it is in eval mode no more often beyond ``DOUBLE`` times what
    it is in train mode than not. And so do updates, where this is: no more than ``FEW_STEPS`` of the samples have extra
    ones.

    Args:
        layers: Their names.
        alpha: The probability of a false alarm in a whole run, however long.
    """

    def __init__(self, layers: Sequence[str], alpha: float) -> None:
        self._alpha, self._layers = alpha, list(layers)
        self._over = MeansAbove(len(layers))
        self._noise, self._whole = (np.zeros(len(layers)) for _ in range(2))
        self._first: list[list[float]] = [[] for _ in layers]
        self._knows_loss = False
        self.forget()

    def update(
        self,
        sample: MonitorSample,
        noise: Mapping[str, float],
        ripe: Mapping[str, bool],
        changed: Mapping[str, float],
        frozen: Mapping[str, float] | None = None,
        extra: bool = False,
        others: Mapping[str, float] | None = None,
    ) -> list[str]:
        """Take in a sample; the layers that raise an alarm, ``LOSS``, ``UPDATES``, and those of ``others``.

        Args:
            sample: The sample.
            noise: For each of its layers the D of i.i.d. batches of this size.
            ripe: For each of its layers whether its running statistics have forgotten their start.
            changed: For each layer that was changed after an alarm its D against running statistics that had gone on,
                NaN where that is not known: it raises no alarm, and it is tested whether the cause is gone, see
                ``is_over``.
            frozen: For each layer that training holds in eval mode the D of the last batches together, NaN where it is
                not known.
            extra: The step updated running statistics beyond what it was trained by.
            others: E-values of further hypotheses, by name.
        """
        count = len(self._layers)
        whole, iid, within, gross = (np.full(count, np.nan) for _ in range(4))
        held, most_noise = frozen or {}, noise_limit(DEFAULT_THRESHOLD)
        limits = np.array([self._limit(position) for position in range(count)])
        most = GROSS * limits
        for position, name in enumerate(self._layers):
            if name in held:
                gross[position] = held[name]
                most[position] = mismatch_iid(TOGETHER) + mismatch_iid(DEFAULT_THRESHOLD)
            elif (layer := sample.layers.get(name)) is not None and ripe[name]:
                if name not in changed:
                    whole[position] = gross[position] = _finite(layer.mismatch)
                    iid[position] = noise[name]
                elif not math.isnan(changed[name]):
                    is_within = changed[name] <= self._limit_over(position) and noise[name] <= most_noise
                    within[position] = 2.0 * is_within
                    if len(self._first[position]) < FIRST:
                        self._first[position].append(min(changed[name], 1e6))
                self._add(position, noise[name], changed.get(name, layer.mismatch))
        loss = sample.loss if all(ripe.values()) else None
        self._knows_loss |= loss is not None
        self._over.update(within, 1.0)
        self._tests.update(
            np.concatenate([whole, iid, gross, _of_loss(loss), [float(extra)]]),
            np.concatenate([limits, np.full(count, most_noise), most, np.ones(3), [FEW_STEPS]]),
        )
        # Of hypotheses of which one holds, the smallest e-value is an e-value; of hypotheses that all hold, the mean.
        beyond, small, far, (larger, smaller, doubled, updates) = np.split(
            self._tests.e_values(), [count, 2 * count, 3 * count]
        )
        shown = (larger + smaller) / 2 if self._knows_loss else math.inf
        more = others or {}
        evidence = np.concatenate([(np.minimum(beyond, shown) + far) / 2, small, [doubled, updates, *more.values()]])
        names = [*self._layers, *self._layers, LOSS, UPDATES, *more]
        return list(dict.fromkeys(names[position] for position in rejected(evidence, self._alpha)))

    def _limit(self, position: int) -> float:
        whole, noise = float(self._whole[position]), float(self._noise[position])
        if not whole:
            return noise_limit(DEFAULT_THRESHOLD)
        return deciding_limit(min(noise, whole), max(whole - noise, 0.0), DEFAULT_THRESHOLD)

    def _limit_over(self, position: int) -> float:
        """Up to which D of a changed layer its cause counts as gone; see ``is_over``."""
        limit, first = self._limit(position), self._first[position]
        fallen = sum(first) / FIRST / GROSS if len(first) == FIRST else 0.0
        return max(limit, min(fallen, GROSS * limit))

    def _add(self, position: int, noise: float, whole: float) -> None:
        if math.isfinite(noise) and math.isfinite(whole):
            self._noise[position] = _MEMORY * self._noise[position] + noise
            self._whole[position] = _MEMORY * self._whole[position] + whole

    def is_over(self, layers: Iterable[str]) -> bool:
        """Whether the cause of a change is gone: of each of these layers D is surely more often small than not.

        D is small within its limit. In many sound runs it never is for long in a changed layer, which sees what changed
        layers before it pass on. So it is small, too, where it is at most a ``GROSS``-th of what it was in the first
        samples after the change, and no more than ``GROSS`` times the limit, below which D alone raises no alarm.
        """
        evidence = self._over.e_values()
        return all(evidence[self._layers.index(name)] >= 1 / self._alpha for name in layers)

    def forget(self) -> None:
        """Begin again, once an alarm was looked into."""
        self._tests = MeansAbove(3 * len(self._layers) + 4)

    def forget_over(self, layers: Iterable[str]) -> None:
        """Begin again to ask of these layers whether a cause is gone."""
        for name in layers:
            self._over.forget(self._layers.index(name))
            self._first[self._layers.index(name)] = []

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes, of plain lists."""
        own = {
            "noise": self._noise.tolist(),
            "whole": self._whole.tolist(),
            "first": [list(each) for each in self._first],
        }
        tests = {"tests": self._tests.state(), "over": self._over.state()}
        return {"layers": list(self._layers), **tests, **own, "knows_loss": self._knows_loss}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            StateError: It is of other layers.
        """
        if state["layers"] != self._layers:
            gone = [name for name in state["layers"] if name not in self._layers]
            new = [name for name in self._layers if name not in state["layers"]]
            whose = (("only that one watched", gone), ("only this one watches", new))
            differ = "; ".join(f"{who} {listed(names)}" for who, names in whose if names) or "in another order"
            raise StateError(
                f"The state is of a monitor of other layers ({differ}). Give this one the same model, include and"
                " exclude, or do not load the state: then its tests begin anew."
            )
        self._tests.restore(state["tests"])
        self._over.restore(state["over"])
        self._noise, self._whole = np.array(state["noise"]), np.array(state["whole"])
        self._first = [list(each) for each in state["first"]]
        self._knows_loss = state["knows_loss"]


def _of_loss(loss: ModeLoss | None) -> NDArray[np.float64]:
    """Whether it is larger, smaller, and far larger in eval mode: at most 1 on average if no more often so than not."""
    if loss is None:
        return np.full(3, np.nan)
    train, other = loss.train, loss.eval
    return 2.0 * np.array([not other <= train, not train <= other, not other <= train + (DOUBLE - 1) * abs(train)])


def _finite(mismatch: float) -> float:
    return mismatch if math.isfinite(mismatch) else math.inf


def updates_to_ripen(momentum: float | None) -> int:
    """Updates after which an average has forgotten its start; one of all batches never does."""
    if momentum is None or momentum <= 0:
        return MOST_UPDATES
    if momentum >= 1:
        return 1
    return min(MOST_UPDATES, math.ceil(math.log(LEFT_ON_START) / math.log1p(-momentum)))
