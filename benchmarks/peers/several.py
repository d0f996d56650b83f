"""What PyTorch's tests of ``DistributedDataParallel`` ask of modules with BN, over two processes on gloo.

Both processes run all layers once; the checks look at what they saved.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from benchmarks.peers.layers import SUBJECTS, Subject
from benchmarks.peers.registry import NotApplicableError, asks, in_one_line
from bnprobe.nn import BatchRenorm2d, SyncBatchRenorm

DISTRIBUTED = "torch distributed"
_PROCESSES, _STEPS, _PATIENCE = 2, 3, 300
_SPLITS = {"even": (4, 4), "uneven": (6, 2), "one is empty": (8, 0)}
_OPTIONS: dict[str, dict[str, Any]] = {
    "the paper's limits": {},
    "r_min": {"r_min": 0.2},
    "renorm_momentum": {"renorm_momentum": 0.3},
    "deviations": {"running": "std"},
    "cumulative average": {"momentum": None},
    "all": {"r_min": 0.5, "renorm_momentum": 0.3, "running": "std", "momentum": None},
}
"""Settings of ``SyncBatchRenorm`` that are held against one process with the whole batch."""


def _trained(subject: Subject, rank: int) -> dict[str, Any]:
    """Steps of DDP with batches of this process's own."""
    net = DistributedDataParallel(subject.net())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(_STEPS):
        optimizer.zero_grad()
        net(subject.batch(seed=_PROCESSES * step + rank)).square().mean().backward()
        optimizer.step()
    distributed.broadcast(net.module[1].running_mean, 0)  # DDP does it before the next step
    return {name: value.detach().clone() for name, value in net.module.named_parameters()}


def _averaged(subject: Subject, rank: int) -> tuple[Tensor, Tensor]:
    """A gradient under DDP, and the local one."""
    nets = [subject.net(), subject.net()]
    wrapped = [DistributedDataParallel(nets[0], gradient_as_bucket_view=True, static_graph=True), nets[1]]
    for call in wrapped if subject.kind is not SyncBatchRenorm else wrapped[:1]:
        call(subject.batch(seed=rank)).square().mean().backward()
    local = nets[1][0].weight.grad
    return nets[0][0].weight.grad.clone(), nets[0][0].weight.grad * 0 if local is None else local.clone()


def _sharded(subject: Subject, rank: int) -> Tensor:
    """The output of a fully sharded module after a step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = subject.net()
    fully_shard(net, mesh=init_device_mesh("cpu", (_PROCESSES,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(subject.batch(seed=rank)).square().mean().backward()
    optimizer.step()
    return net.eval()(subject.batch()).detach()


def _synchronized(settings: dict[str, Any], split: tuple[int, int], rank: int) -> list[Tensor]:
    """Outputs, gradients and buffers of ``SyncBatchRenorm`` on this process's part."""
    layer = _sync_layer(SyncBatchRenorm, settings)
    found = []
    for batch in _whole_batches():
        leaf = batch.split(split)[rank].clone().requires_grad_()
        y = layer(leaf)
        y.backward(batch.cos().split(split)[rank])
        found += [y.detach(), leaf.grad]
    return [*found, *(p.grad for p in layer.parameters()), *(buffer.clone() for buffer in layer.buffers())]


def _sync_layer(kind: Callable[..., nn.Module], settings: dict[str, Any]) -> nn.Module:
    return Subject("", kind, 2, "renorm", {"momentum": 0.3, "r_max": 1.5, "d_max": 0.8, **settings}).layer().double()


def _whole_batches() -> list[Tensor]:
    subject = SUBJECTS[1]
    scale = torch.linspace(0.5, 3, 8, dtype=torch.float64).view(8, 1, 1, 1)
    return [subject.batch(8, seed=step, dtype=torch.float64) * scale + scale for step in range(_STEPS)]


def _work(rank: int, port: int, folder: str) -> None:
    """All that one process runs; errors are results, too."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(_PROCESSES), RANK=str(rank))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found: dict[tuple[str, ...], Any] = {}

    def keep(key: tuple[str, ...], function: Callable[..., Any], *arguments: Any) -> None:
        try:
            found[key] = function(*arguments, rank)
        except Exception as error:
            found[key] = in_one_line(error)

    for subject in SUBJECTS:
        for function in (_trained, _averaged, _sharded):
            keep((function.__name__, subject.name), function, subject)
    for option, settings in _OPTIONS.items():
        for name, split in _SPLITS.items():
            keep((option, name), _synchronized, settings, split)
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@cache
def _found() -> tuple[dict[tuple[str, ...], Any], ...]:
    """What the processes found, by rank."""
    if not distributed.is_available():
        raise NotApplicableError("PyTorch is built without torch.distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_work, args=(rank, port, folder)) for rank in range(_PROCESSES)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_PATIENCE)
            if process.exitcode != 0:
                process.kill()
        return tuple(torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(_PROCESSES))


def _of(*key: str) -> list[Any]:
    results = [found[key] for found in _found()]
    for result in results:
        if isinstance(result, str):
            raise AssertionError(result)
    return results


@asks(DISTRIBUTED)
def ddp_trains(subject: Subject) -> None:
    """After three steps of DDP both processes hold the same finite parameters."""
    one, other = _of("_trained", subject.name)
    assert_close(one, other, rtol=0, atol=0)
    assert all(torch.isfinite(value).all() for value in one.values())


@asks(DISTRIBUTED)
def ddp_averages_gradients(subject: Subject) -> None:
    """The gradient under DDP, static graph and bucket views included, is the mean of the local ones."""
    (one, mine), (other, theirs) = _of("_averaged", subject.name)
    assert_close(one, other, rtol=0, atol=0)
    if subject.name == "SyncBatchRenorm":
        raise NotApplicableError("its local gradients depend on the other process: see synchronized_statistics")
    assert_close(one, (mine + theirs) / 2, rtol=1e-4, atol=1e-6)


@asks(DISTRIBUTED)
def fully_sharded(subject: Subject) -> None:
    """A module under ``fully_shard`` trains a step."""
    for output in _of("_sharded", subject.name):
        assert torch.isfinite(output).all()


@asks(DISTRIBUTED, "renorm")
def synchronized_statistics(subject: Subject) -> None:
    """Two processes give the outputs, gradients and statistics of one with the whole batch, with every option."""
    if subject.kind is not SyncBatchRenorm:
        raise NotApplicableError("the layer does not synchronize")
    for option, settings in _OPTIONS.items():
        expected = _single(settings)
        for name in _SPLITS:
            one, other = _of(option, name)
            parts = 2 * _STEPS
            together = [torch.cat(pair) for pair in zip(one[:parts], other[:parts], strict=True)]
            assert_close(together, expected[:parts], msg=lambda text, at=(option, name): f"{at}: {text}")
            added = [a + b for a, b in zip(one[parts : parts + 2], other[parts : parts + 2], strict=True)]
            assert_close(added, expected[parts : parts + 2])
            for found in (one, other):
                assert_close(found[parts + 2 :], expected[parts + 2 :])


def _single(settings: dict[str, Any]) -> list[Tensor]:
    layer = _sync_layer(BatchRenorm2d, copy.deepcopy(settings))
    found = []
    for batch in _whole_batches():
        leaf = batch.clone().requires_grad_()
        y = layer(leaf)
        y.backward(batch.cos())
        found += [y.detach(), leaf.grad]
    return [*found, *(p.grad for p in layer.parameters()), *layer.buffers()]
