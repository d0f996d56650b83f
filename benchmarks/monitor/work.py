"""The runs of the benchmark, in several processes."""

from __future__ import annotations

import multiprocessing
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
    """Healthy runs first: those of the first condition are what faulty ones are held against."""
    found = []
    for number, whats in enumerate((HEALTHY, FAULTS)):
        for net, seeds in list(NETS.items())[: 1 if quick else None]:
            for seed in range(1, 2 if quick else seeds[number] + 1):
                found += [Task(net, seed, what, QUICK_STEPS if quick else STEPS) for what in whats]
    return found


def run_all(wanted: list[Task], processes: int) -> Iterator[Outcome]:
    """In the order of the tasks."""
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap(_run, wanted)


def _run(task: Task) -> Outcome:
    recipe, fault = HEALTHY.get(task.what, HEALTHY[BASE]), FAULTS.get(task.what)
    return run(task.network, task.seed, task.what, recipe, fault, task.steps)
