"""The runs of the benchmark, in several processes."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.monitor.faults import FAULTS
from benchmarks.monitor.runs import BASE, HEALTHY, NETS, STEPS, Outcome, run

QUICK_STEPS = 90


class Task(NamedTuple):
    """A run: ``what`` is a condition of `HEALTHY`, or a fault of `FAULTS`."""

    network: str
    seed: int
    what: str
    steps: int


def tasks(quick: bool) -> list[Task]:
    """The first seed of every network, then the next, so that a run that is ended has seen some of everything.

    Healthy runs of the first condition are what faulty ones are held against.
    """
    nets = list(NETS.items())[: 1 if quick else None]
    steps = QUICK_STEPS if quick else STEPS
    return [
        Task(net, seed, what, steps)
        for seed in range(1, 2 if quick else 1 + max(max(seeds) for _, seeds in nets))
        for number, whats in enumerate((HEALTHY, FAULTS))
        for net, seeds in nets
        if seed <= seeds[number]
        for what in whats
    ]


def run_all(wanted: list[Task], processes: int, minutes: float) -> Iterator[Outcome]:
    """In the order of the tasks; none begins after so many minutes."""
    end = time.monotonic() + 60 * minutes
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        yield from filter(None, pool.imap(functools.partial(_run, end), wanted))


def _run(end: float, task: Task) -> Outcome | None:
    if time.monotonic() > end:
        return None
    recipe, fault = HEALTHY.get(task.what, HEALTHY[BASE]), FAULTS.get(task.what)
    return run(task.network, task.seed, task.what, recipe, fault, task.steps)
