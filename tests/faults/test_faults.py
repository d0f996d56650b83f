"""Whatever a model holds and whatever happens, bnprobe gives it back unchanged, or refuses it before anything runs.

A sample of the runs; ``python -m tests.faults`` makes all of them (README.md).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnprobe
from bnprobe.errors import ModelError

from .injection import PLACES, Interrupt, PlantedError, positions, timed_interrupt
from .kinds import KINDS, Net, images
from .operations import OPERATIONS
from .run import instructions, run, run_interrupted, run_planted
from .snapshot import differences, snapshot

MANY = int(os.environ.get("BNPROBE_FAULTS", "1"))
"""How many times as many exceptions and interrupts."""

OTHERS = [name for name in OPERATIONS if name != "scan"]
QUICK = [name for name in OTHERS if name not in ("scan, everything", "sweep, momentum")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model(kind: str) -> None:
    """It is scanned, or refused by name, and is the same afterwards; so it is after one more operation."""
    outcome, refused = run(kind, "scan"), KINDS[kind]().refused
    assert outcome.broken() is None
    if refused is None:
        assert outcome.error is None
    else:
        assert isinstance(outcome.error, ModelError)
        assert refused in str(outcome.error)
    number = list(KINDS).index(kind)
    for position in range(MANY if MANY > 1 else number % 2):
        others = QUICK if MANY == 1 else OTHERS
        other = others[(number // 2 + position) % len(others)]
        assert run(kind, other).broken() is None, other


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [PlantedError, KeyboardInterrupt, MemoryError, SystemExit, StopIteration])
def test_an_exception(place: str, error: type[BaseException]) -> None:
    names, start = list(KINDS), len(place) * len(error.__name__)
    for position in range(MANY):
        kind = names[(start + 17 * position) % len(names)]
        operation, at = list(OPERATIONS)[(start + position) % 8], (2, 5, 1, 9, 14)[position % 5]
        outcome, _ = run_planted(kind, operation, place, at, error)
        assert outcome.broken(error) is None, (kind, operation, at)


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        ("plain_buffer", "scan"),
        ("generator_of_the_loader", "recalibrate"),
        ("shared_layer", "convert in place"),
    ],
)
def test_interrupts(kind: str, operation: str) -> None:
    """Ctrl-C at instructions drawn at random."""
    counted = instructions(kind, operation)
    for at in positions(counted, 5 * MANY, seed=MANY):
        outcome, where = run_interrupted(kind, operation, at)
        assert outcome.broken() is None, (at, where)


def test_the_interrupt_comes_where_it_should() -> None:
    """Not in the tracer, and from Python's own handling of signals."""
    seen: list[Any] = []

    def handler(number: int, frame: Any) -> None:
        seen.append(frame.f_code.co_filename)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        for at in (1000, 2000, 3000):
            run("plain_buffer", "lint", fault=Interrupt(at).tracing())
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) == 3
    assert not any("injection" in name for name in seen)


def test_interrupts_by_the_clock() -> None:
    for tick in range(2 * MANY):
        outcome = run("helper", "scan", fault=timed_interrupt(0.01 + 0.05 * tick / MANY))
        assert outcome.broken() is None, tick


@pytest.mark.parametrize("how", ["contiguous", "channels_last", "spectral norm", "double"])
def test_a_graph_from_before_still_has_its_backward(how: str) -> None:
    def made(scanned: bool) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = Net()
        if how == "spectral norm":
            torch.nn.utils.parametrizations.spectral_norm(model.conv)
        model.to(memory_format=torch.channels_last if how == "channels_last" else torch.contiguous_format)
        model.to(torch.float64 if how == "double" else torch.float32)
        data = [batch.to(model.head.weight.dtype) for batch in images()]
        loss = model(data[0]).square().mean()
        if scanned:
            bnprobe.scan(model, data, 2, num_batches=6)
        return model, loss

    gradients = []
    for scanned in (False, True):
        model, loss = made(scanned)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


CHANGES: dict[str, Callable[[Any], object]] = {
    "a buffer": lambda model: model.bn1.running_mean.add_(1e-7),
    "a flag": lambda model: model.bn1.eval(),
    "a gradient": lambda model: setattr(model.head.weight, "grad", torch.zeros(3, 4)),
    "a hook": lambda model: model.register_forward_hook(lambda *args: None),
    "a nested value": lambda model: model.meter.inner.values.append(1),
    "a slot": lambda model: model.slotted.update(),
    "an array": lambda model: model.array.fill(1),
    "a generator": lambda model: model.chance.random(),
    "the grad mode": lambda model: torch.set_grad_enabled(False),
    "the random state": lambda model: torch.rand(1),
    "a mode": lambda model: torch.overrides._push_mode(torch.overrides.BaseTorchFunctionMode()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_snapshot_sees_what_it_should(change: str) -> None:
    """Else the tests above could not fail."""
    import random

    import numpy as np

    from .kinds import Meter, Slotted

    model = Net()
    model.meter, model.slotted = Meter(), Slotted()
    model.array, model.chance = np.zeros(3), random.Random(1)
    before, depth = snapshot(model), len(torch.overrides._get_current_function_mode_stack())
    assert differences(before, snapshot(model)) == []
    try:
        CHANGES[change](model)
        assert differences(before, snapshot(model)) != []
    finally:
        torch.set_grad_enabled(True)
        while len(torch.overrides._get_current_function_mode_stack()) > depth:
            torch.overrides._pop_mode()
