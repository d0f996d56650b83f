"""The streams of the benchmark go wrong when they should, its arms do what they say, and its report is whole."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from benchmarks.reversion import __main__ as reversion
from benchmarks.reversion.__main__ import ALONE, ARMS, STREAMS, Stream, render, run
from bnprobe.monitor.changes import Change


def test_streams_are_wrong_from_one_third_on() -> None:
    data = reversion._parts()[0]
    for name, stream in STREAMS.items():
        batches = list(reversion._batches(stream, data, seed=0, steps=30))
        wrong = [
            len(y) == 2 or bool((y.bincount(minlength=10) > 0).sum() <= 2) or float(x.mean()) > 0.5 for x, y in batches
        ]
        expected = [False] * 30 if name == "healthy" else [False] * 10 + [True] * 10 + [not stream.back] * 10
        assert wrong == expected, name


def test_a_knowing_arm_converts_and_takes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    taken = reversion.take_back

    def take_back(model: nn.Module, made: Change) -> None:
        kinds.append(type(model.get_submodule("1")).__name__)
        taken(model, made)

    monkeypatch.setattr(reversion, "take_back", take_back)
    accuracy, changes = run(Stream(sort=True), "freeze at once", seed=0, steps=30)
    assert kinds == ["FrozenBatchNorm2d"]
    assert changes == 0
    assert 0 <= accuracy <= 1


def test_a_run_is_the_same_for_the_same_seed_and_learns() -> None:
    state = torch.get_rng_state()
    first, again = (run(STREAMS["healthy"], ALONE, seed=1, steps=150) for _ in range(2))
    torch.set_rng_state(state)
    assert first == again
    assert first[0] > 0.9


def test_the_report_has_every_stream_and_arm() -> None:
    found = {(name, arm): [(0.5, 1), (0.75, 0)] for name in STREAMS for arm in ARMS}
    found["shifted", "freeze"] = [(0.9, 2), (0.9, 1)]
    text = render(found, 600, 1.0)
    assert all(len(re.findall(rf"\| {arm} +\|", text)) == len(STREAMS) for arm in ARMS)
    assert text.count("| 1, 0 ") == 3 * len(STREAMS) - 1
    assert "0.900 [0.900, 0.900]" in text
