"""Find and connect the processes of a torchrun launch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from bnprobe.distributed.board import Board
from bnprobe.distributed.world import ALONE, World, first_sentence
from bnprobe.errors import ProcessError

JOINING = timedelta(minutes=5)
"""How long the processes wait for each other at start-up."""

PATIENCE = timedelta(days=1)
"""Timeout of collectives. It is long because process 0 may work alone for hours. A process that fails posts this on
the board, and the connections of one that dies are closed, so only a process that hangs is waited for.
"""

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_connections: list[World] = []
"""The worlds that this module has connected; the last one is current."""


def launched() -> World:
    """The world described by torchrun's environment variables, whether or not its processes are connected yet.

    WORLD_SIZE without a master address is not a launch: some batch systems set it for single processes.
    """
    if not all(name in os.environ for name in _VARIABLES):
        return ALONE
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


@contextmanager
def connected() -> Iterator[World]:
    """Connect the processes of a torchrun launch while the block runs.

    The backend is gloo, and nccl for CUDA tensors if every process of the machine has its own GPU; the current CUDA
    device becomes that of LOCAL_RANK. Without torchrun, inside another such block, or if the caller has connected the
    processes already, nothing is set up or torn down.

    Raises:
        ProcessError: The processes could not be connected.
    """
    if _connections:
        yield _connections[-1]
    elif distributed.is_available() and distributed.is_initialized():
        yield World(distributed.get_rank(), distributed.get_world_size())
    elif launched().size == 1:
        yield ALONE
    else:
        world = _connect(launched())
        _connections.append(world)
        try:
            yield world
        finally:
            _connections.remove(world)
            if world.board is not None:
                world.board.close()
            distributed.destroy_process_group()


def _connect(world: World) -> World:
    if not distributed.is_available():
        raise ProcessError("This build of PyTorch does not include torch.distributed: run bnprobe without torchrun.")
    from torch.distributed.distributed_c10d import PrefixStore  # not available in every build
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=JOINING))
        store = PrefixStore("bnprobe", store)
        distributed.init_process_group(_bind_device(), store=store, rank=rank, world_size=size, timeout=PATIENCE)
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return World(rank, size, Board(PrefixStore("board", store), size, hosts))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ProcessError(
            f"Process {world.rank} of {world.size} could not connect to the others at {where}: {first_sentence(error)}"
            " Check that every process of the launch is running and can reach this address."
        ) from error


def _bind_device() -> str:
    """Select this process's GPU, if there is one, and return the backends to use."""
    if not torch.cuda.is_available():
        return "gloo"
    local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    torch.cuda.set_device(local % devices)
    # nccl refuses two processes on one GPU; gloo accepts CUDA tensors too.
    own = int(os.environ.get("LOCAL_WORLD_SIZE", str(local + 1))) <= devices
    return "cpu:gloo,cuda:nccl" if own and distributed.is_nccl_available() else "gloo"
