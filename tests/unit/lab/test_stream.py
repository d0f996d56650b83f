"""``stream``: drifts that keep the bound, and a run that reaches it."""

from __future__ import annotations

import math

import pytest

from bnprobe import lab
from bnprobe.lab import stream
from bnprobe.lab.drift import averaged, lag
from bnprobe.lab.experiment import Results
from bnprobe.lab.stream import BOUNDED, DRIFT, SEARCHED, WALK


@pytest.mark.parametrize("kind", BOUNDED)
def test_no_drift_is_more_than_said_and_none_breaks_the_bound(kind: str) -> None:
    drift = BOUNDED[kind](300)
    assert len(drift) == 300
    assert float(drift.abs().max()) <= DRIFT * (1 + 1e-12)
    mean = drift.cumsum(0)[:, None]
    for momentum in (0.01, 0.1, 0.5):
        error = (averaged(mean, mean.new_zeros(1), momentum) - mean).abs()
        assert float(error.max()) <= lag(DRIFT, momentum) * (1 + 1e-9)


def test_a_run_keeps_the_bound_and_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCHES", 200)  # the shape checks of tests make each of them slow
    report = lab.run("stream", budget=0.02, seeds=1, jobs=1)
    results = Results(report.trials)
    searched = results.where(drift=SEARCHED)
    for trial in results.where(part="bounded"):
        for name, value in trial.values.items():
            assert isinstance(value, float), name
            assert 0 < value <= 1 + 1e-9
    found = searched.averaged("largest error without noise over the lag")
    assert found is not None
    assert found.mean > 0.99
    slow, fast = (results.where(part=WALK, speed=speed, **{"over best": 1.0}).values("D over N") for speed in (0.01, 1))
    assert slow[0] < fast[0]
    assert not any(claim.verdict == "refuted" and "bound" in claim.text for claim in report.claims)
    assert all(math.isfinite(value) for trial in results for value in trial.values.values() if isinstance(value, float))
