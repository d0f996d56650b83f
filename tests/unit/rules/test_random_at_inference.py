"""BN213."""

from __future__ import annotations

import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnprobe import scan
from bnprobe.records import Output
from bnprobe.testing import make_evidence, make_layer, run_rule
from unit.rules.expect import skipped


@pytest.mark.parametrize(
    ("repeat", "outcome", "severity"),
    [(0.0, "passed", "error"), (1e-6, "passed", "error"), (0.005, "failed", "warning"), (0.4, "failed", "error")],
)
def test_it_is_an_error_where_the_output_really_moves(repeat: float, outcome: str, severity: str) -> None:
    output = Output(0.1, None, None, None, None, repeat=repeat)
    [verdict] = run_rule("BN213", make_evidence(make_layer(), output=output))
    assert (verdict.outcome, verdict.severity, verdict.value) == (outcome, severity, repeat)


def test_one_pass_says_nothing() -> None:
    facts = make_evidence(make_layer(), output=Output(0.1, None, None, None, None))
    assert run_rule("BN213", facts) == [skipped("BN213", None, "inference was not run twice")]


class Drawing(nn.Module):
    """Adds noise in both modes, by one generator or another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.own = kind, torch.Generator()
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        if self.kind == "dropout":
            return F.dropout(x, 0.3)
        if self.kind == "numpy":
            return x + torch.from_numpy(np.random.standard_normal(x.shape)).to(x)
        if self.kind == "random":
            return x * random.random()
        return x + torch.randn(x.shape, generator=self.own if self.kind == "own" else None)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("dropout", "state of torch moves, in inner (Drawing). torch.nn.functional.dropout draws from it."),
        ("torch", "state of torch moves, in inner (Drawing). torch.randn draws from it."),
        ("numpy", "state of numpy moves, in inner (Drawing)."),
        ("random", "state of Python's random moves, in inner (Drawing)."),
        ("own", "so the model has a random generator of its own, or a state that passes change."),
    ],
)
def test_it_is_said_what_draws(kind: str, said: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(inner=Drawing(kind), head=nn.Linear(6, 3)))
    [found] = [each for each in scan(model, list(torch.randn(256, 6).split(32)), 32).verdicts if each.rule == "BN213"]
    assert found.outcome == "failed"
    assert found.message.endswith(said)
    assert ("dropout" in found.message + found.remedy) == (kind == "dropout")
