"""An engine of ignite with a monitor trains as one without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from bnprobe.monitor import IgniteMonitor
from support.frameworks import framework
from unit.monitor.loops import Blobs, Net, assert_nothing_is_left, assert_same, loss_of, only_warnings_of_bnprobe

engines = framework("ignite.engine")
handlers = framework("ignite.handlers")
Events = engines.Events

Loop = Callable[[nn.Module, torch.optim.Optimizer], Any]


def _net() -> Net:
    torch.manual_seed(3)
    return Net()


def _update(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    def step(engine: Any, batch: Any) -> float:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return engines.Engine(step)


def _supervised(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> Any:
    return engines.create_supervised_trainer(model, optimizer, nn.functional.cross_entropy, **settings)


def _accumulating(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return _supervised(model, optimizer, gradient_accumulation_steps=3)


def _in_autocast(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    def step(engine: Any, batch: Any) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()

    return engines.Engine(step)


def _evaluated_between(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    trainer = _supervised(model, optimizer)
    evaluator = engines.create_supervised_evaluator(model)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), lambda: evaluator.run(DataLoader(Blobs(32), 8)))
    return trainer


def _run(
    loop: Loop, epochs: int, monitored: dict[str, Any] | None, in_order: bool = False
) -> tuple[Net, IgniteMonitor | None, Any]:
    """Epochs of eight batches."""
    model = _net()
    engine = loop(model, torch.optim.SGD(model.parameters(), 0.02, momentum=0.5))
    monitor = None if monitored is None else IgniteMonitor(model, every=4, **monitored).attach(engine)
    with only_warnings_of_bnprobe():
        engine.run(DataLoader(Blobs(256, in_order), 32, shuffle=not in_order), max_epochs=epochs)
    return model, monitor, engine


@pytest.mark.parametrize("loop", [_update, _supervised, _accumulating, _in_autocast, _evaluated_between])
def test_a_run_that_is_watched_is_bit_identical(loop: Loop) -> None:
    alone, _, _ = _run(loop, 3, None)
    drawn = torch.get_rng_state()
    seen, monitor, engine = _run(loop, 3, {})
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same(alone.state_dict(), seen.state_dict())
    assert monitor is not None
    assert monitor.sample is not None
    assert monitor.step == (8 if loop is _accumulating else 24)
    assert monitor.sample.loss is not None
    assert engine.state.metrics["bnprobe/loss/eval"] == monitor.sample.loss.eval
    assert_nothing_is_left(seen)


def test_a_checkpoint_has_the_state_and_findings_are_metrics(tmp_path: Path) -> None:
    loader = DataLoader(Blobs(256, in_order=True), 32)

    def begun() -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(3)
        model = Net()
        model.body[3] = nn.Identity()  # a random layer would differ, since nobody restores the random state
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        engine = _supervised(model, optimizer)
        monitor = IgniteMonitor(model, every=4, on_finding=lambda *_: None).attach(engine)
        return engine, {"model": model, "optimizer": optimizer, "monitor": monitor, "engine": engine}

    engine, parts = begun()
    saver = handlers.DiskSaver(tmp_path, require_empty=False)
    checkpoint = handlers.Checkpoint(parts, saver)
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=4), checkpoint)
    engine.run(loader, max_epochs=20)
    whole = parts["monitor"].findings
    assert {f"bnprobe/finding/{finding.rule}" for finding in whole} <= engine.state.metrics.keys()

    engine, parts = begun()
    handlers.Checkpoint.load_objects(parts, tmp_path / checkpoint.last_checkpoint)
    engine.run(loader, max_epochs=20)
    assert parts["monitor"].findings == whole != []


@pytest.mark.parametrize("handled", [False, True])
def test_nothing_is_left_after_an_exception_which_is_raised_as_without(handled: bool) -> None:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    calls: list[int] = []
    seen: list[BaseException] = []

    def step(engine: Any, batch: Any) -> None:
        loss = loss_of(model, batch)
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of luck")
        loss.backward()
        optimizer.step()

    engine = engines.Engine(step)
    if handled:
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: seen.append(error))
    monitor = IgniteMonitor(model, every=4).attach(engine)
    if handled:
        engine.run(DataLoader(Blobs(256), 32))
        assert [str(error) for error in seen] == ["out of luck"]
    else:
        with pytest.raises(RuntimeError, match="out of luck"):
            engine.run(DataLoader(Blobs(256), 32))
    assert monitor.step == 4
    assert_nothing_is_left(model)


@pytest.mark.parametrize("skip", [False, True])
def test_a_run_that_is_terminated_is_watched_no_more(skip: bool) -> None:
    model = _net()
    engine = _supervised(model, torch.optim.SGD(model.parameters(), 0.02))
    monitor = IgniteMonitor(model, every=4).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda: engine.terminate(skip_completed=skip))
    engine.run(DataLoader(Blobs(256), 32))
    assert monitor.step == 4
    assert_nothing_is_left(model)
