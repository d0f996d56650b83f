"""``freeze``: parts against bnprobe's ghost layer, frozen statistics, real processes, and what fails there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from bnprobe.errors import ProcessError
from bnprobe.lab import workers
from bnprobe.lab.data import load
from bnprobe.lab.experiment import Budget
from bnprobe.lab.freeze import (
    EARLY,
    FREEZE,
    LATE,
    NEVER,
    PROCESSES,
    ROUNDING,
    SIMULATED,
    Freeze,
    _change,
    _largest_deviation,
    _network,
    _train,
)
from bnprobe.lab.layers import BatchNorm, PerWorkerBatchNorm
from bnprobe.nn import GhostBatchNorm2d


def test_parts_are_normalized_as_by_the_ghost_layer_and_the_first_one_is_averaged() -> None:
    x = 2 + 3 * torch.randn(16, 3, 4, 4)
    layer, first = PerWorkerBatchNorm(3, workers=4), BatchNorm(3)
    torch.testing.assert_close(layer(x), GhostBatchNorm2d(3, virtual_batch_size=4)(x), rtol=1e-4, atol=1e-5)
    first(x[:4])
    torch.testing.assert_close(layer.state_dict(), first.state_dict())
    torch.testing.assert_close(PerWorkerBatchNorm(3, workers=1)(x), BatchNorm(3)(x))
    layer.frozen = True
    kept = layer.running_mean.clone()
    torch.testing.assert_close(layer(x), layer.eval()(x), rtol=0, atol=0)
    assert torch.equal(layer.running_mean, kept)


def test_once_frozen_training_is_inference() -> None:
    images, kept = load(), {}
    for name in (EARLY, LATE, NEVER):
        torch.manual_seed(0)
        model = _network(images, 4)
        _train(model, images, 8, FREEZE[name], 0)
        norm = model[1]
        assert isinstance(norm, BatchNorm)
        assert norm.frozen == (name != NEVER)
        kept[name] = norm.running_mean.clone()
        assert (_change(model, images.train[:256]) == 0) == (name != NEVER)
    assert not torch.equal(kept[EARLY], kept[LATE])  # what was averaged until then


def test_smaller_parts_are_further_from_inference() -> None:
    found = [
        Freeze().trial({"run": SIMULATED, "workers": count, "frozen after": NEVER}, 0, Budget(0.1)) for count in (1, 16)
    ]
    whole, small = (each["change of outputs at inference"] for each in found)
    assert isinstance(whole, float)
    assert isinstance(small, float)
    assert small > whole > 0


def test_two_processes_are_one() -> None:
    found = Freeze().trial({"run": PROCESSES, "workers": 2, "frozen after": NEVER}, 0, Budget(0.1))
    assert all(isinstance(value, float) and value < ROUNDING for value in found.values()), found


def test_deviations_are_seen() -> None:
    state = {"a": torch.tensor([10.0, 0.0]), "b": torch.tensor([1.0])}
    changed = {"a": torch.tensor([10.0, 1.0]), "b": torch.tensor([1.05])}
    assert _largest_deviation(changed, state) == pytest.approx(0.1)


def test_synchronized_statistics_are_another_training_than_own_ones() -> None:
    images, gradients = load(), []
    for count in (1, 2):
        torch.manual_seed(0)
        model = _network(images, count).double()
        model(images.train[:128].double()).square().sum().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert _largest_deviation(*gradients) > 1000 * ROUNDING


# --- Where processes fail ---------------------------------------------------------------------------------------------


def _work() -> list[workers.Work]:
    images = load()
    batch = (images.train[:8].double(), images.train_labels[:8])
    return [workers.Work({}, [batch], images.classes, 0.1, synchronized=True)]


def test_without_gloo_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_gloo_available", lambda: False)
    with pytest.raises(ProcessError, match="build of PyTorch has no"):
        workers.train_together(_work())


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("", r"failed here: .*\. It needs to start processes that reach each other"),
        ("echo '[rank0]: RuntimeError: connect refused'; exit 1", "failed here: RuntimeError: connect refused. It"),
        ("exit 3", "torchrun ended with exit code 3"),
    ],
)
def test_a_launch_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str) -> None:
    python = tmp_path / "python"
    if program:
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ProcessError, match=said):
        workers.train_together(_work())


def test_a_launch_that_hangs_is_ended_with_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, child = tmp_path / "python", tmp_path / "child"
    python.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {child}.new\nmv {child}.new {child}\nwait\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    communicate = subprocess.Popen.communicate

    def until_started(process: Any, timeout: float) -> Any:
        while not child.exists():
            time.sleep(0.01)
        return communicate(process, timeout=0.01)

    monkeypatch.setattr(subprocess.Popen, "communicate", until_started)
    with pytest.raises(ProcessError, match="did not end within 300 seconds"):
        workers.train_together(_work())
    assert _ends(int(child.read_text()))


def _ends(process: int) -> bool:
    """Whether a process ends soon: one that is nobody's child may stay as a zombie."""
    for _ in range(500):
        try:
            os.kill(process, signal.SIG_DFL)
        except ProcessLookupError:
            return True
        if "\nState:\tZ" in Path(f"/proc/{process}/status").read_text():
            return True
        time.sleep(0.01)
    return False
