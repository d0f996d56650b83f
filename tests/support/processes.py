"""Processes forked from one that has imported torch already, which takes two seconds each time otherwise."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

FORKING = multiprocessing.get_context("forkserver")
"""Starts such processes; the one that they are forked from starts with the first."""
FORKING.set_forkserver_preload(["bnprobe.commands.convert", "bnprobe.commands.sweep", "bnprobe.commands.verify"])


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rank_environments(size: int) -> list[dict[str, str]]:
    """What torchrun tells each of so many processes."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [{**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run_together(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call a function of a module in so many processes of one launch, until all have ended well."""
    ranks = rank_environments(size)
    processes = [FORKING.Process(target=_as_rank, args=(rank, work, arguments)) for rank in ranks]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()
            process.join()


def _as_rank(environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    work(*arguments)
