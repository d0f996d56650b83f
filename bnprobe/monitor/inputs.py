"""Whether the batches of a training run stay like those before: the means and deviations of the model's inputs.

Running averages follow another domain within a few dozen steps, and after that no layer shows it. The inputs do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnprobe.loading.samples import count_samples_of_call, named_leaves
from bnprobe.measure.batch import as_plain
from bnprobe.monitor.sampling import Inputs
from bnprobe.numbers import joined, number
from bnprobe.stats.moments import pool_moments, row_moments
from bnprobe.stats.sequential import Exchangeable

INPUTS = "inputs"
"""What the inputs are called, beside the layers; and what a finding on them has in place of the code of a rule."""

CAUSE = "input_shift"

REMEDY = (
    "If this is not intended, shuffle the training data, and prepare all of it alike. The running statistics follow the"
    " new batches, and describe those before no longer: measure what that does to data of the kind before with bnprobe"
    " scan --eval-data, or evaluation= in Python."
)

_CHANNELS = 32
"""So many channels of a tensor are looked at, evenly spaced among more."""

_ROWS = 256
"""Batches that a new one is compared with, at most."""

_LATELY = 128
"""Batches that are kept to say how far the inputs moved, and since when."""

_WAITING = 64
"""Batches that wait to be read, at most."""

_FOR_GOOD = 10
"""So many batches in a row of another size or form, all alike, are what batches are from now on."""

_DIGITS = 6
"""Of the scores: what is saved with a checkpoint stays small."""


@dataclass(frozen=True)
class _Watched:
    """A tensor of the inputs.

    Attributes:
        name: In words, e.g. "Input 1", or "pixel_values".
        channels: How many it has along its second dimension.
    """

    name: str
    channels: int

    @property
    def chosen(self) -> list[int]:
        """The channels that are looked at."""
        if self.channels <= _CHANNELS:
            return list(range(self.channels))
        return [place * (self.channels - 1) // (_CHANNELS - 1) for place in range(_CHANNELS)]

    @property
    def series(self) -> int:
        """Mean and standard deviation of the whole and of each channel."""
        return 2 * (1 + len(self.chosen))


_Form = tuple[list[_Watched], int | None]
"""What the inputs of a batch are, and how many samples it has, where that is known."""


class InputShift:
    """A test whether batches stay exchangeable with those before, by a few scores of each.

    Of every floating-point tensor of the inputs that nothing trained has computed: mean and standard deviation, of the
    whole and of channels (dimension 1). Only batches of as many samples, and of the same form, as the first one are
    compared, since small ones vary more; where that changes for good, the test begins again. The evidence is a mean of
    the e-values of ``Exchangeable``, in which those of whole tensors count half.
    """

    def __init__(self) -> None:
        self._restarts = 0
        self._begin()

    def _begin(self) -> None:
        self._form: _Form = [], None
        self._other: tuple[_Form, int] = self._form, 0
        self._test: Exchangeable | None = None
        self._weights = np.zeros(0)
        self._lately: deque[tuple[int, NDArray[np.float64]]] = deque(maxlen=_LATELY)
        self._waiting: deque[tuple[int, Tensor]] = deque(maxlen=_WAITING)

    def forget(self) -> None:
        """Begin again, with what comes now as what is usual."""
        self._restarts += 1
        self._begin()

    @torch.no_grad()
    def take(self, step: int, inputs: Inputs) -> None:
        """Compute the scores of a batch; nothing waits for the device."""
        tensors = _tensors(inputs)
        if not tensors:
            return
        form = [_Watched(name, x.shape[1]) for name, x in tensors], count_samples_of_call(*inputs)
        other, times = self._other
        self._other = form, times + 1 if form == other else 1
        if self._other[1] == _FOR_GOOD and form != self._form:
            self.forget()
        if self._test is None:
            self._set_up(form)
        if form == self._form:
            device = tensors[0][1].device
            parts = [_scores(x, each.chosen).to(device) for (_, x), each in zip(tensors, form[0], strict=True)]
            self._waiting.append((step, torch.cat(parts)))

    def _set_up(self, form: _Form) -> None:
        self._form, (watched, _) = form, form
        weights = [[0.25, 0.25, *[0.25 / len(each.chosen)] * (each.series - 2)] for each in watched]
        self._weights = np.array([weight for part in weights for weight in part]) / len(watched)
        self._test = Exchangeable(np.empty((0, len(self._weights))), self._restarts, _ROWS, signed=True)

    def waiting(self) -> list[Tensor]:
        """The scores that were not read yet, for ``update``."""
        return [scores for _, scores in self._waiting]

    def update(self, values: Sequence[float]) -> None:
        """Take in what was ``waiting``, one after the other."""
        if self._test is None or not values:
            return
        rows = _rounded(np.asarray(values, dtype=np.float64).reshape(-1, len(self._weights)))
        for (step, _), row in zip(self._waiting, rows, strict=True):
            self._test.update(row)
            self._lately.append((step, row))
        self._waiting.clear()

    @property
    def e_value(self) -> float:
        """Evidence that batches are not exchangeable."""
        return 1.0 if self._test is None else float(self._weights @ self._test.e_values())

    def message(self) -> str:
        """What moved, from what to what, and since when: sentences."""
        assert self._test is not None  # there was an alarm
        known = len(self._lately)
        worst = int((self._weights * self._test.e_values()).argmax())
        since = min(max(known - int(self._test.since[worst]), 1), known - 1)
        rows = np.array([row for _, row in self._lately])
        ends = np.cumsum([each.series for each in self._form[0]])
        each, end = next((each, end) for each, end in zip(self._form[0], ends, strict=True) if worst < end)
        part = rows[:, end - each.series : end]
        return (
            f"Since about step {self._lately[since][0]:,} batches are not like those before."
            f" {_moved(each, part[:since], part[since:], worst - int(end) + each.series)}"
        )

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes, of plain values; without what waits to be read."""
        own = {"restarts": self._restarts, "samples": self._form[1]}
        watched = [[each.name, each.channels] for each in self._form[0]]
        lately = [[step, row.tolist()] for step, row in self._lately]
        test = None if self._test is None else self._test.state()
        return {**own, "watched": watched, "lately": lately, "test": test}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._restarts = state["restarts"]
        self._begin()
        if state["test"] is None:
            return
        self._set_up(([_Watched(name, channels) for name, channels in state["watched"]], state["samples"]))
        assert self._test is not None
        self._test.restore(state["test"])
        self._lately.extend((step, np.array(row)) for step, row in state["lately"])


def _tensors(inputs: Inputs) -> list[tuple[str, Tensor]]:
    """The tensors that are looked at, of shape (N, C, *), by their names."""
    args, kwargs = inputs
    named = [(f"Input {place}", given) for place, given in enumerate(args, 1)] + [*kwargs.items()]
    leaves = [(f"{name}{path}", leaf) for name, given in named for path, leaf in named_leaves(given)]
    return [
        (name, as_plain(leaf.detach() if leaf.dim() > 1 else leaf.detach()[:, None]))
        for name, leaf in leaves
        if isinstance(leaf, Tensor)
        and leaf.is_floating_point()
        and leaf.layout is torch.strided
        and leaf.dim()
        and leaf.numel()
        and leaf.grad_fn is None
    ]


def _scores(x: Tensor, chosen: list[int]) -> Tensor:
    mean, variance = (each[0] for each in pool_moments(*row_moments(x), x.shape[0]))
    whole = [mean.mean(), (variance.mean() + mean.var(correction=0)).sqrt()]
    if len(chosen) < len(mean):
        mean, variance = mean[chosen], variance[chosen]
    return torch.cat([torch.stack(whole), mean, variance.sqrt()])


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):
        scale = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(np.abs(values))))
        rounded = np.round(values * scale) / scale
    found: NDArray[np.float64] = np.where(np.isfinite(rounded), rounded, values)
    return found


def _moved(watched: _Watched, before: NDArray[np.float64], after: NDArray[np.float64], most: int) -> str:
    """How a tensor as a whole and its channel that moved farthest did: sentences.

    Args:
        watched: The tensor.
        before, after: Its scores, shape (batches, series).
        most: The series with the most evidence.
    """
    old, new = before.mean(0), after.mean(0)
    found = f"{watched.name}: the mean {_went(old[0], new[0])}, the standard deviation {_went(old[1], new[1])}"
    count, spread = len(watched.chosen), np.maximum(old[1], _TINY)
    shift = (new[2 : 2 + count] - old[2 : 2 + count]) / np.maximum(old[2 + count :], _TINY * spread)
    stretch = new[2 + count :] / np.maximum(old[2 + count :], _TINY * spread)
    distance = np.nan_to_num(shift**2 + (stretch - 1) ** 2, nan=np.inf)
    if watched.channels > 1:
        worst = int(distance.argmax())
        moved = (
            [f"the mean by {number(float(shift[worst]))} standard deviations"] if abs(shift[worst]) >= _LITTLE else []
        )
        if abs(stretch[worst] - 1) >= _LITTLE:
            moved.append(f"the standard deviation to {number(float(stretch[worst]))} times what it was")
        found += f"; in channel {watched.chosen[worst]}, which went farthest, {joined(moved)}" if moved else ""
    if min(len(before), len(after)) >= _FEWEST:
        # From one batch to the next, so that the shift itself counts little.
        noise, now = (float(np.median(np.abs(np.diff(rows[:, most])))) for rows in (before, after))
        what = "mean" if most == 0 or 2 <= most < 2 + count else "standard deviation"
        where = "" if most < 2 or count == 1 else f" of channel {watched.chosen[(most - 2) % count]}"
        if now > (1 + _SURELY / min(len(before), len(after)) ** 0.5) * noise > 0:
            found += f". From batch to batch the {what}{where} varies {number(now / noise)} times as much as before"
    return f"{found}."


def _went(before: float, after: float) -> str:
    one, other = number(before), number(after)
    return f"stays at {one}" if one == other else f"went from {one} to {other}"


_TINY = 1e-6
"""Standard deviations below this part of that of the whole tensor do not scale anything."""

_LITTLE = 0.1
"""Of less, in standard deviations, nothing is said of a channel."""

_FEWEST, _SURELY = 5, 3.0
"""Of fewer batches nothing is said of how they vary, nor where that may be chance: so many relative errors of it."""
