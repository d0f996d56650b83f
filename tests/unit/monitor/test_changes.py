"""What a monitor changes about layers, and that it takes it back."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import bnprobe
from unit.monitor.test_monitor import Net, _batch, _net, _step, _train

pytestmark = pytest.mark.filterwarnings("ignore:bnprobe, step:UserWarning")

Events = list[dict[str, Any]]


def _changes(events: Events) -> Events:
    return [event for event in events if event["event"] == "change"]


@pytest.mark.parametrize(("action", "kind"), [("freeze", "FrozenBatchNorm1d"), ("renorm", "BatchRenorm1d")])
def test_layers_are_changed_and_become_batch_norm_again(action: str, kind: str) -> None:
    kinds: list[str] = []

    def seen(event: dict[str, Any]) -> None:
        if event["event"] == "change":
            kinds.append(type(model.first[1]).__name__)

    model, events = _net(), Events()
    model.drop.p = 0.0
    parameters, buffers = list(model.parameters()), list(model.buffers())
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.5)
    with bnprobe.Monitor(model, every=5, on_finding=action, log=[events.append, seen]) as monitor:
        for step in range(600):
            _step(model, optimizer, step, size=2 if 100 <= step < 200 else 32)
    changes = _changes(events)
    assert [change["action"] for change in changes] == [action, "undo"]
    assert set(changes[0]["layers"]) == set(changes[1]["layers"]) == {"first.1", "second.1"}
    assert 100 < changes[0]["step"] < 200 < changes[1]["step"] < 500
    assert kinds == [kind, "BatchNorm1d"]
    assert model.first[1].training
    assert monitor.changes == []
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert all(one is other for one, other in zip(buffers, model.buffers(), strict=True))
    model.eval()
    x, y = _batch(1_000, 512)
    assert float((model(x).argmax(1) == y).double().mean()) > 0.9


def test_the_limits_of_batch_renorm_open_from_those_of_batch_norm_on() -> None:
    limits = []

    def seen(event: dict[str, Any]) -> None:
        if event["event"] == "sample" and isinstance(model.first[1], bnprobe.nn.BatchRenorm1d):
            limits.append((model.first[1].r_max, model.first[1].d_max))

    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    with bnprobe.Monitor(model, every=5, on_finding="renorm", log=seen):
        for step in range(300):
            _step(model, optimizer, step, size=2 if step >= 100 else 32)
    assert limits[0] < (1.5, 1.0)
    assert limits == sorted(limits)
    assert limits[-1] == (3.0, 5.0)


def test_statistics_that_were_poisoned_are_taken_anew() -> None:
    model, events = _net(), Events()
    model.drop.p = 0.0
    _train(model, range(60))
    for module in (model.first[1], model.second[1]):
        module.momentum = 0.001  # so that they do not recover by themselves
        module.num_batches_tracked.fill_(10_000)
        module.running_mean += 2.0
    with bnprobe.Monitor(model, every=5, on_finding={"BN203": "recalibrate"}, log=events.append) as monitor:
        optimizer = torch.optim.SGD(model.parameters(), 0.002)
        for step in range(60, 160):
            _step(model, optimizer, step)
    change = _changes(events)[0]
    assert change["action"] == "recalibrate"
    later = [event for event in events if event["event"] == "sample" and event["step"] >= change["step"]]
    assert max(layer["mismatch"] for layer in later[0]["layers"].values()) < 0.2
    assert monitor.changes == []


@pytest.mark.parametrize("action", ["freeze", "renorm"])
def test_changes_survive_saving_and_resuming(action: str) -> None:
    def run(resumed: bool) -> Net:
        model = _net()
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.5)
        monitor = bnprobe.Monitor(model, every=5, on_finding=action)
        with monitor:
            for step in range(200):
                _step(model, optimizer, step, size=2 if step >= 100 else 32)
        assert {name for made in monitor.changes for name in made.layers} == {"first.1", "second.1"}
        assert monitor._alarm is None  # batches that are kept for a scan are not saved
        if resumed:
            kinds = [type(module) for module in model.modules()]
            saved = json.loads(json.dumps(monitor.state_dict()))
            weights, state, drawn = model.state_dict(), optimizer.state_dict(), torch.get_rng_state()
            model = Net()
            monitor = bnprobe.Monitor(model, every=5, on_finding=action)
            monitor.load_state_dict(saved)
            assert [type(module) for module in model.modules()] == kinds
            model.load_state_dict(weights)
            optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.5)
            optimizer.load_state_dict(state)
            torch.set_rng_state(drawn)
        with monitor:
            for step in range(200, 500):
                _step(model, optimizer, step)
        assert monitor.changes == []
        return model

    one, other = run(resumed=False), run(resumed=True)
    if action == "freeze":  # it becomes BN again a few samples later
        return
    for (key, mine), (_, its) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(mine, its), key


def test_a_changed_model_deploys_as_plain_batch_norm() -> None:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    with bnprobe.Monitor(model, every=5, on_finding="renorm") as monitor:
        for step in range(200):
            _step(model, optimizer, step, size=2 if step >= 100 else 32)
    assert monitor.changes
    plain = _net()
    plain.load_state_dict(bnprobe.deployable_state(model, plain))
    x = _batch(1_000)[0]
    assert torch.allclose(plain.eval()(x), model.eval()(x), atol=1e-5)


def test_a_layer_that_cannot_be_changed_is_warned_of_and_stays() -> None:
    class Doubled(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = _net()
    model.first[1] = Doubled(24)
    with (
        warnings.catch_warnings(record=True) as caught,
        bnprobe.Monitor(model, every=5, on_finding="freeze"),
    ):
        warnings.simplefilter("always")
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        for step in range(200):
            _step(model, optimizer, step, size=2)
    assert any("no layer was changed: " in str(each.message) and "first.1" in str(each.message) for each in caught)
    assert isinstance(model.first[1], Doubled)
