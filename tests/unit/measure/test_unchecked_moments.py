"""Moments are taken without a look at them; where digits were lost, the pass runs once more, and is looked at."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnprobe.measure.forward_pass import Pass
from support.networks import Residual, images, unsettled
from support.running import session_of


class Far(nn.Module):
    """Input whose mean is a thousand standard deviations away; beside it, after a convolution, ordinary input."""

    def __init__(self) -> None:
        super().__init__()
        self.far, self.near, self.drop = nn.BatchNorm2d(3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.drop(self.near(self.conv(self.far(x + 1000))))


@pytest.mark.parametrize("path", ["train", "eval"])
def test_a_pass_that_lost_digits_runs_once_more(path: Any) -> None:
    model, calls = unsettled(Far()), Counter[str]()
    model.register_forward_pre_hook(lambda *_: calls.update(["model"]))
    [x] = images(1, 4, 3, 6, 6)
    session = session_of(model)
    with session.installed():
        first = Pass(4, 2, per_sample=path == "eval")
        torch.manual_seed(0)
        output, _ = session.forward(path, x, first)
        assert calls["model"] == 2
        again = Pass(4, 2, per_sample=path == "eval")
        torch.manual_seed(0)
        repeated, _ = session.forward(path, x, again)
        assert calls["model"] == 3
    # As if the pass had been careful at once: the same random draws, and each call recorded once.
    assert torch.equal(output, repeated)
    assert list(first.records) == list(again.records) == [(0, 0), (1, 0)]
    rows = (x + 1000).double().unflatten(0, (-1, 1 if path == "eval" else 2))
    variance, mean = torch.var_mean(rows, (1, 3, 4), correction=0)
    for found in (first, again):
        torch.testing.assert_close(found.records[0, 0].variance, variance, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.records[0, 0].mean, mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_values_that_are_not_finite_stay_so(bad: float) -> None:
    model = unsettled(Far())
    [x] = images(1, 4, 3, 6, 6)
    x[1, 2, 0, 0] = bad
    session = session_of(model)
    with session.installed():
        pass_ = Pass(4, 2)
        session.forward("eval", x, pass_)
    finite = torch.isfinite(pass_.records[0, 0].mean)
    assert finite.tolist() == [[True, True, False], [True, True, True]]


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("path", "most"), [("eval", 4.5), ("train", 8.5)])
def test_what_a_path_costs_does_not_depend_on_the_machine(path: Any, most: float) -> None:
    """Operators beside those of a plain forward pass, and one wait for the device: that for the look at all moments."""
    model = unsettled(Residual())
    [x] = images(1, 8, 3, 12, 12)
    session = session_of(model)
    with session.installed():
        session.forward(path, x, Pass(8, 2, per_sample=path == "eval"))
        with _Count() as measured:
            session.forward(path, x, Pass(8, 2, per_sample=path == "eval"))
    with torch.no_grad(), _Count() as plain:
        model.eval()(x)
    assert measured.counts["aten._local_scalar_dense.default"] <= 2
    assert sum(measured.counts.values()) < most * sum(plain.counts.values())
