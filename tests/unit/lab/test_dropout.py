"""``dropout``: the variance shift against brute force, and that it is there before batch norm only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnprobe import lab
from bnprobe.lab.dropout import AFTER, BEFORE, RECALIBRATED, Dropout, _shift
from bnprobe.lab.experiment import Budget, Results
from bnprobe.lab.layers import BatchNorm
from bnprobe.records import Trial


def test_the_formula_is_the_variance_of_many_draws_of_dependent_inputs() -> None:
    torch.manual_seed(0)
    norm = BatchNorm(3)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(0.4), nn.Conv2d(2, 3, 3, padding=1), norm).double()
    pixels = torch.randn(40, 2, 4, 4, dtype=torch.float64).exp()  # skewed
    measured, expected = _shift(model, norm, pixels, 0.4, 400)
    assert expected > 1.2
    assert measured == pytest.approx(expected, rel=0.01)


def test_what_lagging_averages_gain_is_not_counted() -> None:
    def gain(before: float, behind: float) -> str:
        gains = {BEFORE: before, AFTER: behind}
        trials = [
            Trial({"place": place, "rate": 0.5}, seed, {"accuracy": 0.8, RECALIBRATED: 0.8 + gains[place] + noise}, 0.0)
            for place in (BEFORE, AFTER)
            for seed, noise in enumerate((0.0, 0.001, 0.002))
        ]
        *_, claim = Dropout().claims(Results(trials), Budget())
        return claim.verdict

    assert gain(0.05, 0.02) == "shown"
    assert gain(0.05, 0.05) == "open"
    assert gain(0.02, 0.05) == "refuted"


def test_the_shift_is_before_batch_norm_and_grows_with_the_rate() -> None:
    report = lab.run("dropout", budget=0.05, seeds=2, jobs=1)
    results = Results(report.trials)
    name = "variance shift"
    assert set(results.where(place=AFTER).where(rate=0.5).values(name)) == {1.0}
    by_rate = [results.where(place=BEFORE, rate=rate).mean(name) for rate in (0.0, 0.1, 0.3, 0.5, 0.7)]
    means = [each.mean for each in by_rate if each is not None]
    assert means[0] == 1.0
    assert means == sorted(means)
    assert "refuted" not in {claim.verdict for claim in report.claims[:3]}  # two seeds decide little
