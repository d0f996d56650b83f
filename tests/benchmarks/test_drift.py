"""The detectors beside the monitor give what their definitions say, and shifts are what their names say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn

from benchmarks.drift.detectors import _discrepancy, _kolmogorov, first_above
from benchmarks.drift.task import SHIFTS, Task


@pytest.fixture
def task() -> Task:
    images = torch.randn(3, 90, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    return Task(nn.Identity(), 1.0, *images)


def test_kolmogorov_is_that_of_scipy_in_the_worst_column(task: Task) -> None:
    found = _kolmogorov(lambda x: x.flatten(1), task)(task.service, 0)
    assert len(found) == 11
    for number, end in ((0, 8), (7, 64), (10, 88)):
        window = task.service[max(0, end - 64) : end].flatten(1)
        size = len(window)
        pairs = zip(window.T.numpy(), task.healthy.flatten(1).T.numpy(), strict=True)
        statistic = max(ks_2samp(one, other).statistic for one, other in pairs)
        assert found[number] == pytest.approx(statistic * np.sqrt(size * 90 / (size + 90)), rel=1e-9)


def test_the_discrepancy_is_unbiased_and_its_definition(task: Task) -> None:
    found = _discrepancy(lambda x: x.flatten(1), task)(task.service, 0)
    x, y = task.service[:8].flatten(1).double(), task.healthy.flatten(1).double()
    width = torch.pdist(y).median().square()

    def mean(one: torch.Tensor, other: torch.Tensor, apart: bool) -> float:
        values = [
            float((-(a - b).square().sum() / width).exp())
            for i, a in enumerate(one)
            for j, b in enumerate(other)
            if not apart or i != j
        ]
        return float(np.mean(values))

    assert found[0] == pytest.approx(8 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)), rel=1e-6)


def test_an_alarm_is_the_first_figure_that_reaches_the_threshold() -> None:
    figures = np.array([0.0, 5.0, 1.0, 2.0, 3.0])
    assert first_above(figures, 5.0) == 16
    assert first_above(figures, 2.0, after=16) == 16
    assert first_above(figures, 6.0) is None


def test_strong_shifts_change_more_than_mild_ones(task: Task) -> None:
    for name, (mild, strong) in SHIFTS.items():
        changed = [
            float((change(task.service, task.new, torch.Generator().manual_seed(1)) - task.service).square().mean())
            for change in (mild, strong)
        ]
        assert 0 < changed[0] < changed[1], name
