"""Monitors in two processes that train one model: what the first one decides is done in both, after the same step."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnprobe
from bnprobe.errors import UsageError
from support.processes import run_together
from unit.monitor.test_monitor import Net, _batch, _net, _train

Told = dict[str, Any]


@contextmanager
def _launched(folder: Path) -> Iterator[tuple[int, Told]]:
    """One of the processes; what it tells is written for the test to read."""
    torch.distributed.init_process_group("gloo")
    rank, told = torch.distributed.get_rank(), Told()
    try:
        yield rank, told
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(told))


def _together(work: Callable[..., None], folder: Path, *arguments: Any) -> list[Told]:
    run_together(2, work, folder, *arguments)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _changes_layers(folder: Path, action: str) -> None:
    warnings.simplefilter("ignore")
    with _launched(folder) as (rank, told):
        model = _net()
        model.drop.p = 0.0
        wrapped = nn.parallel.DistributedDataParallel(model)
        parameters, optimizer = list(model.parameters()), torch.optim.SGD(model.parameters(), 0.02, momentum=0.5)
        told["kinds"] = []
        with bnprobe.Monitor(wrapped, every=5, on_finding=action, log=folder / "log") as monitor:
            for step in range(450):
                x, y = _batch(2 * step + rank, size=2 if 100 <= step < 200 else 32)
                optimizer.zero_grad()
                F.cross_entropy(wrapped(x), y).backward()
                optimizer.step()
                told["kinds"].append([type(model.first[1]).__name__, type(model.second[1]).__name__])
        told["sampled"] = monitor.sample is not None
        told["same"] = all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
        told["weights"] = [parameter.tolist() for parameter in model.parameters()]


@pytest.mark.parametrize(("action", "kind"), [("freeze", "FrozenBatchNorm1d"), ("renorm", "BatchRenorm1d")])
def test_layers_are_changed_in_all_processes_after_the_same_step(tmp_path: Path, action: str, kind: str) -> None:
    first, second = _together(_changes_layers, tmp_path, action)
    assert first["kinds"] == second["kinds"]
    assert first["weights"] == second["weights"]
    assert first["same"]
    assert second["same"]
    assert (first["sampled"], second["sampled"]) == (True, False)
    kinds = [kinds for kinds, before in zip(first["kinds"], [None, *first["kinds"]], strict=False) if kinds != before]
    assert kinds[0] == kinds[-1] == ["BatchNorm1d", "BatchNorm1d"]
    assert [kind, kind] in kinds
    events = [json.loads(line) for line in (tmp_path / "log" / "monitor.jsonl").read_text().splitlines()]
    changes = [event for event in events if event["event"] == "change"]
    assert {change["action"] for change in changes} == {action, "undo"}
    for change in changes:  # after the step that was due
        assert change["step"] % 5 == 0
        assert first["kinds"][change["step"]] != first["kinds"][change["step"] - 1]
    assert sum(event["event"] == "start" for event in events) == 1


def _recalibrates(folder: Path) -> None:
    warnings.simplefilter("ignore")
    with _launched(folder) as (rank, told):
        model = _net()
        model.drop.p = 0.0
        _train(model, range(60))
        for module in (model.first[1], model.second[1]):
            module.momentum = 0.001
            module.num_batches_tracked.fill_(10_000)
            module.running_mean += 2.0
        wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.002)
        buffers = []
        with bnprobe.Monitor(wrapped, every=5, on_finding={"BN203": "recalibrate"}) as monitor:
            for step in range(100):
                x, y = _batch(1000 + 2 * step + rank)
                optimizer.zero_grad()
                F.cross_entropy(wrapped(x), y).backward()
                optimizer.step()
                buffers.append([buffer.tolist() for buffer in model.buffers()])
        told |= {"buffers": buffers, "findings": len(monitor.findings)}


def test_statistics_are_those_of_the_first_process(tmp_path: Path) -> None:
    first, second = _together(_recalibrates, tmp_path)
    assert first["findings"] > second["findings"] == 0
    alike = [step for step in range(1, 100) if first["buffers"][step] == second["buffers"][step]]
    assert len(alike) == 1  # each goes on from there with its own batches
    assert alike[0] % 5 == 0
    assert abs(first["buffers"][alike[0]][0][0] - first["buffers"][alike[0] - 1][0][0]) > 1


def _fails_in_the_first(folder: Path) -> None:
    def full(event: dict[str, Any]) -> None:
        if event["event"] == "sample" and event["step"] == 10:
            raise OSError("no space")

    with _launched(folder) as (_, told), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = nn.parallel.DistributedDataParallel(_net())
        with bnprobe.Monitor(wrapped, every=5, on_finding="freeze", log=full) as monitor:
            _train(wrapped, range(40))
        told |= {"step": monitor.step, "said": [str(each.message) for each in caught]}


def test_a_monitor_that_ends_in_the_first_process_ends_in_all_and_training_goes_on(tmp_path: Path) -> None:
    first, second = _together(_fails_in_the_first, tmp_path)
    assert any("stopped at step 10, and training goes on: OSError: no space" in text for text in first["said"])
    assert second["said"] == []
    assert (first["step"], second["step"]) == (10, 10)


def _is_refused(folder: Path) -> None:
    with _launched(folder) as (rank, told):
        told["said"] = []
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
        for model, every, action in ((Net(), 5 + rank, "freeze"), (synced, 5, "freeze"), (synced, 5, "warn")):
            try:
                with bnprobe.Monitor(model, every=every, on_finding=action):
                    pass
            except UsageError as error:
                told["said"].append(str(error))


def test_what_cannot_be_watched_in_several_is_refused_in_all(tmp_path: Path) -> None:
    first, second = _together(_is_refused, tmp_path)
    assert first["said"] == second["said"]
    differ, synced, also = first["said"]
    assert differ.startswith("The monitors of the processes differ in every, their steps or their layers")
    assert synced == also
    assert synced.startswith("first.1, second.1: with SyncBatchNorm, layers take the statistics of all processes")
