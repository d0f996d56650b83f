"""The detectors: each gives a figure after every 16 samples of a stream, and raises its alarm above a threshold."""

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

STEP, WINDOW = 16, 64
"""Samples from figure to figure, and those that detectors without a memory look at."""

Figures = NDArray[np.float64]
Detector = Callable[[Tensor, int], Figures]
"""Of a stream of images, and a seed."""

MONITOR = "ShiftMonitor"


def detectors(task: Task) -> dict[str, Detector]:
    """All of them, with what they need to know of healthy images; those of evidently where it can be imported."""
    found = {MONITOR: _monitor(task, 8), f"{MONITOR}, blocks of 4": _monitor(task, 4)}
    return found if without_evidently() else {**found, **_of_evidently(task)}


def without_evidently() -> str:
    """Why evidently cannot be imported; "" where it can."""
    try:
        import evidently  # noqa: F401
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return ""


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
        for rows in features.split(block):
            drift.add(rows)
            found.append(drift.e_value)
        return np.array(found).reshape(-1, STEP // block).max(1)

    return run


def _of_evidently(task: Task) -> dict[str, Detector]:
    """Its Kolmogorov-Smirnov test of every column, its squared MMD, and its classifier, which tells two samples apart.

    Of columns the one with the least p-value counts, as in Rabanser, Guennemann and Lipton 2019, arXiv 1810.11953: of
    pixels, and as BBSDs of the softmax outputs. The others have no p-value, but a distance and the area under a ROC
    curve.
    """
    from evidently.legacy.calculations.stattests import ks_stat_test
    from evidently.legacy.core import ColumnType
    from evidently.legacy.metrics.data_drift.embedding_drift_methods import mmd, model
    from pandas import DataFrame

    def least_p(current: DataFrame, reference: DataFrame) -> tuple[float, ...]:
        tests = [ks_stat_test(reference[each], current[each], ColumnType.Numerical, 0.05) for each in reference]
        return (-np.log10(min(test.drift_score for test in tests) + 1e-300),)

    ways = {
        "KS per pixel": (least_p, _pixels),
        "KS on outputs": (least_p, lambda x: torch.softmax(task.model(x), 1)),
        "MMD of pixels": (mmd(), _pixels),
        "MMD of features": (mmd(), task.model[:-1]),
        "classifier of pixels": (model(), _pixels),
        "classifier of features": (model(), task.model[:-1]),
    }

    def detector(judge: Callable[..., tuple[float, ...]], seen: Callable[[Tensor], Tensor]) -> Detector:
        def table(images: Tensor) -> DataFrame:
            with torch.no_grad():
                return DataFrame(seen(images).double().numpy())

        healthy, known = table(task.healthy), {}

        def run(stream: Tensor, seed: int) -> Figures:
            values = table(stream)
            found = []
            for end in range(STEP, len(stream) + 1, STEP):
                window = values[max(0, end - WINDOW) : end]
                seen_before = window.to_numpy().tobytes()  # streams that will be shifted begin alike
                if len(window) < WINDOW:
                    known[seen_before] = -np.inf
                elif seen_before not in known:
                    known[seen_before] = judge(window.copy(), healthy.copy())[0]  # they write into what they are given
                found.append(known[seen_before])
            return np.array(found)

        return run

    return {name: detector(*way) for name, way in ways.items()}


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1)


def first_above(figures: Figures, threshold: float, after: int = 0) -> int | None:
    """Samples from ``after`` on until a figure reaches a threshold; None: never."""
    above: Sequence[int] = np.flatnonzero(figures[after // STEP :] >= threshold).tolist()
    return (above[0] + 1) * STEP if above else None
