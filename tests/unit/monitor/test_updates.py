"""Updates of running statistics that no loss is of, and steps that have several for good reason."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnprobe
from bnprobe.records import MonitorFinding
from unit.monitor.test_monitor import FEATURES, Net, _batch, _net

STEPS = 200

Watch = Callable[[nn.Module], Any]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01)


def _learn(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# --- Faults -----------------------------------------------------------------------------------------------------------


def _for_a_log(watch: Watch) -> None:
    model = _net()
    optimizer = _sgd(model)
    with watch(model):
        for step in range(STEPS):
            x, y = _batch(step)
            with torch.no_grad():
                model(x)
            _learn(model, optimizer, F.cross_entropy(model(x), y))


def _with_gradients_for_nothing(watch: Watch) -> None:
    model = _net()
    optimizer = _sgd(model)
    with watch(model):
        for step in range(STEPS):
            x, y = _batch(step)
            loss = F.cross_entropy(model(x), y)
            model(x + torch.randn_like(x))
            _learn(model, optimizer, loss)


def _recomputed(watch: Watch, reentrant: bool) -> None:
    model = _net()
    inner, model.second.forward = model.second.forward, lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    optimizer = _sgd(model)
    with watch(model):
        for step in range(STEPS):
            x, y = _batch(step)
            _learn(model, optimizer, F.cross_entropy(model(x), y))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("loop", "layers", "expected"),
    [
        (_for_a_log, ("first.1", "second.1"), "Updates per training step: 2, expected 1"),
        (_with_gradients_for_nothing, ("first.1", "second.1"), "Updates per training step: 2, expected 1"),
        (lambda watch: _recomputed(watch, False), ("second.1",), "Updates per training step: 2, expected 1"),
        (lambda watch: _recomputed(watch, True), ("second.1",), "Updates per training step: 2, expected 1"),
    ],
    ids=["log", "gradients", "checkpoint", "reentrant"],
)
def test_updates_that_no_loss_is_of_are_found_in_the_words_of_a_scan(
    loop: Callable[[Watch], None], layers: tuple[str, ...], expected: str
) -> None:
    found: list[MonitorFinding] = []
    alarms: list[dict[str, Any]] = []

    def log(event: dict[str, Any]) -> None:
        if event["event"] == "alarm":
            alarms.append(event)

    loop(lambda model: bnprobe.Monitor(model, 5, log=log, on_finding=lambda monitor, each: found.append(each)))
    assert [each.rule for each in found] == ["BN301"]
    assert found[0].layers == layers
    assert expected in found[0].message
    assert alarms[0]["series"] == ["updates"]
    assert found[0].step <= 60


# --- What is none -----------------------------------------------------------------------------------------------------


def _accumulating(watch: Watch) -> None:
    model = _net()
    optimizer = _sgd(model)
    with watch(model):
        for step in range(STEPS):
            for part in range(3):
                x, y = _batch(3 * step + part)
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()


def _siamese(watch: Watch) -> None:
    model = _net()
    optimizer = _sgd(model)
    with watch(model):
        for step in range(STEPS):
            x, y = _batch(step)
            one, other = model(x + 0.1 * torch.randn_like(x)), model(x + 0.1 * torch.randn_like(x))
            _learn(model, optimizer, F.cross_entropy(one, y) + F.cross_entropy(other, y))


def _adversarial(watch: Watch) -> None:
    """Both models are watched; the maker runs once for the judge, without a gradient, and once for itself."""
    maker, judge = _net(), _net()
    of_maker, of_judge = (torch.optim.Adam(each.parameters(), 0.0005) for each in (maker, judge))
    with watch(maker), watch(judge):
        for step in range(STEPS):
            noise, (real, _) = torch.randn(32, FEATURES), _batch(step)
            with torch.no_grad():
                made = F.pad(maker(noise), (0, FEATURES - 4))
            _learn(judge, of_judge, F.softplus(-judge(real)).mean() + F.softplus(judge(made)).mean())
            made = F.pad(maker(noise), (0, FEATURES - 4))
            _learn(maker, of_maker, F.softplus(-judge(made)).mean())


def _in_closures(watch: Watch) -> None:
    model = _net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)
    with watch(model):
        for step in range(STEPS // 2):
            x, y = _batch(step)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)


def _averaging_all(watch: Watch) -> None:
    model = _net(momentum=None)
    optimizer = _sgd(model)
    with watch(model):
        for step in range(STEPS):
            x, y = _batch(step)
            _learn(model, optimizer, F.cross_entropy(model(x), y))


def _with_a_momentum_encoder(watch: Watch) -> None:
    """A copy that no gradient trains sees two views in a step."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = _net()
            self.key = copy.deepcopy(self.query).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                keys = self.key(x) + self.key(x.flip(0)).flip(0)
            return (self.query(x) - keys).square().mean()

    model = Both()
    optimizer = torch.optim.SGD(model.query.parameters(), 0.01)
    with watch(model):
        for step in range(STEPS):
            _learn(model, optimizer, model(_batch(step)[0]))
            with torch.no_grad():
                for mine, its in zip(model.key.parameters(), model.query.parameters(), strict=True):
                    mine.lerp_(its, 0.05)


def _evaluating_between(watch: Watch) -> None:
    model = _net()
    optimizer = _sgd(model)
    with watch(model):
        for step in range(STEPS):
            model.eval()
            model(_batch(1_000)[0])
            model.train()
            x, y = _batch(step)
            _learn(model, optimizer, F.cross_entropy(model(x), y))


def _logging_where_it_is_sampled(watch: Watch) -> None:
    """Every fifth step alone."""
    model = _net()
    optimizer = _sgd(model)
    with watch(model):
        for step in range(STEPS):
            x, y = _batch(step)
            if step % 5 == 0:
                with torch.no_grad():
                    model(x)
            _learn(model, optimizer, F.cross_entropy(model(x), y))


@pytest.mark.parametrize(
    "loop",
    [
        _accumulating,
        _siamese,
        _adversarial,
        _in_closures,
        _averaging_all,
        _with_a_momentum_encoder,
        _evaluating_between,
        _logging_where_it_is_sampled,
    ],
)
def test_several_updates_of_a_step_that_are_as_they_should_be_are_no_finding(loop: Callable[[Watch], None]) -> None:
    torch.manual_seed(0)
    found: list[str] = []
    samples: list[int] = []

    def log(event: dict[str, Any]) -> None:
        if event["event"] == "sample":
            samples.append(event["step"])

    loop(lambda model: bnprobe.Monitor(model, 5, log=log, on_finding=lambda monitor, each: found.append(each.rule)))
    assert len(samples) >= 10
    assert "BN301" not in found


def test_frozen_layers_of_the_monitor_update_nothing() -> None:
    model = _net()
    found: list[MonitorFinding] = []
    responses: dict[str, Any] = {"BN201": "freeze", "BN301": lambda monitor, each: found.append(each)}
    optimizer = _sgd(model)
    with warnings.catch_warnings(), bnprobe.Monitor(model, 5, on_finding=responses) as monitor:
        warnings.filterwarnings("ignore", message="bnprobe, step")
        for step in range(STEPS):
            x, y = _batch(step, 2)
            if monitor.changes:
                with torch.no_grad():
                    model(x)
            _learn(model, optimizer, F.cross_entropy(model(x), y))
    assert isinstance(model, Net)
    assert monitor.changes
    assert found == []
