"""The detectors: each gives a figure after every 8 samples of a stream, and raises its alarm above a threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import bnprobe
from benchmarks.drift.task import Task
from bnprobe.measure.drift import Drift, LayerInputs, slots_of, watchable
from bnprobe.measure.layers import find_layers

STEP, WINDOW = 8, 64
"""Samples from figure to figure, and those that detectors without a memory look at."""

Figures = NDArray[np.float64]
Detector = Callable[[Tensor, int], Figures]
"""Of a stream of images, and a seed."""

MONITOR = "ShiftMonitor"


def detectors(task: Task) -> dict[str, Detector]:
    """All of them, with what they need to know of healthy images."""
    return {
        MONITOR: _monitor(task, 8),
        f"{MONITOR}, blocks of 4": _monitor(task, 4),
        "KS per pixel": _kolmogorov(lambda x: x.flatten(1), task),
        "KS on outputs": _kolmogorov(lambda x: torch.softmax(task.model(x), 1), task),
        "MMD of pixels": _discrepancy(lambda x: x.flatten(1), task),
        "MMD of features": _discrepancy(lambda x: task.model[:-1](x), task),
    }


def _monitor(task: Task, block: int) -> Detector:
    profile = bnprobe.profile(task.model, list(task.healthy.split(32)), block=block)
    layers, _ = watchable(find_layers(task.model, lambda *names: True).layers)
    inputs, slots = LayerInputs(layers), slots_of(profile, layers)

    def run(stream: Tensor, seed: int) -> Figures:
        with inputs.taking(len(stream)), torch.no_grad():
            task.model(stream)
        features = inputs.features(slots)
        assert features is not None
        drift, found = Drift(profile, 0.01, seed), []
        for block in features.split(STEP):
            drift.add(block)
            found.append(drift.e_value)
        return np.array(found)

    return run


def _windows(stream: Tensor) -> list[slice]:
    """What has been seen after every 8 samples, at most the last 64."""
    return [slice(max(0, end - WINDOW), end) for end in range(STEP, len(stream) + 1, STEP)]


def _kolmogorov(seen: Callable[[Tensor], Tensor], task: Task) -> Detector:
    """The largest two-sample statistic over columns, times sqrt(n m / (n + m)): Bonferroni's choice of a column.

    Rabanser, Guennemann and Lipton 2019, arXiv 1810.11953: of pixels, and as BBSDs of the softmax outputs.
    """
    with torch.no_grad():
        reference = seen(task.healthy).double().numpy()
    columns = [np.sort(column) for column in reference.T]

    def run(stream: Tensor, seed: int) -> Figures:
        with torch.no_grad():
            values = seen(stream).double().numpy()
        # Shares of the reference at and below each value, from which both one-sided statistics follow.
        below = np.stack([np.searchsorted(c, v, "left") for c, v in zip(columns, values.T, strict=True)], 1)
        upto = np.stack([np.searchsorted(c, v, "right") for c, v in zip(columns, values.T, strict=True)], 1)
        size = len(reference)
        found = []
        for window in _windows(stream):
            count = window.stop - window.start
            low, high = np.sort(below[window], 0) / size, np.sort(upto[window], 0) / size
            ranks = np.arange(1, count + 1)[:, None] / count
            own_low = np.array([np.searchsorted(each, each, "left") for each in low.T]).T / count
            statistic = max((ranks - high).max(), (low - own_low).max())
            found.append(statistic * np.sqrt(count * size / (count + size)))
        return np.array(found)

    return run


def _discrepancy(seen: Callable[[Tensor], Tensor], task: Task) -> Detector:
    """Squared MMD of the last samples and the healthy ones, a Gaussian kernel of the median width; Gretton et al. 2012.

    Unbiased, and times the samples in the window. The permutations that give a p-value are not needed: thresholds are
    those of healthy streams.
    """
    with torch.no_grad():
        reference = seen(task.healthy).double()
    width = torch.pdist(reference).median().square()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-torch.cdist(x, y).square() / width).exp()

    own = kernel(reference, reference)
    among = (own.sum() - own.trace()) / (len(own) * (len(own) - 1))

    def run(stream: Tensor, seed: int) -> Figures:
        with torch.no_grad():
            values = seen(stream).double()
        within, across = kernel(values, values), kernel(values, reference).mean(1)
        found = []
        for window in _windows(stream):
            part, count = within[window, window], window.stop - window.start
            unbiased = (part.sum() - part.trace()) / (count * (count - 1)) + among - 2 * across[window].mean()
            found.append(float(unbiased) * count)
        return np.array(found)

    return run


def first_above(figures: Figures, threshold: float, after: int = 0) -> int | None:
    """Samples from ``after`` on until a figure reaches a threshold; None: never."""
    above: Sequence[int] = np.flatnonzero(figures[after // STEP :] >= threshold).tolist()
    return (above[0] + 1) * STEP if above else None
