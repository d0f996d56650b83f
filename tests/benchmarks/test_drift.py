"""The detectors beside the monitor give what their definitions say, and shifts are what their names say."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn

from benchmarks.drift.__main__ import _others
from benchmarks.drift.detectors import MONITOR, detectors, first_above
from benchmarks.drift.task import SHIFTS, Task

FEW = (MONITOR, f"{MONITOR}, blocks of 4")


@pytest.fixture
def task() -> Task:
    images = torch.randn(3, 208, 1, 2, 2, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    return Task(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).eval(), 1.0, *images)


def test_the_monitor_watches_where_evidently_is_not(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evidently", None)
    found = detectors(task)
    assert tuple(found) == FEW
    assert "evidently is not here" in _others()
    shifted = torch.cat([task.service[:64], task.service[64:] + 3])
    for run in found.values():
        figures = run(shifted, 0)
        assert len(figures) == 13
        assert figures[:4].max() < 20 < figures[-1]


def test_tests_of_columns_are_those_of_scipy_in_the_worst_one(task: Task) -> None:
    pytest.importorskip("evidently", exc_type=ImportError)
    found = {name: run(task.service, 0) for name, run in detectors(task).items() if name not in FEW}
    assert all(len(figures) == 13 and np.isneginf(figures[:3]).all() for figures in found.values())
    pairs = zip(task.service[48:112].flatten(1).T.numpy(), task.healthy.flatten(1).T.numpy(), strict=True)
    least = min(ks_2samp(other, one).pvalue for one, other in pairs)
    assert found["KS per pixel"][6] == pytest.approx(-np.log10(least), rel=1e-6)


def test_an_alarm_is_the_first_figure_that_reaches_the_threshold() -> None:
    figures = np.array([0.0, 5.0, 1.0, 2.0, 3.0])
    assert first_above(figures, 5.0) == 32
    assert first_above(figures, 2.0, after=32) == 32
    assert first_above(figures, 6.0) is None


def test_strong_shifts_change_more_than_mild_ones(task: Task) -> None:
    for name, (mild, strong) in SHIFTS.items():
        changed = [
            float((change(task.service, task.new, torch.Generator().manual_seed(1)) - task.service).square().mean())
            for change in (mild, strong)
        ]
        assert 0 < changed[0] < changed[1], name
