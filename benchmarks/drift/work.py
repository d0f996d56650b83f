"""The streams of one network, and what every detector says of them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from benchmarks.drift.detectors import MONITOR, Figures, detectors
from benchmarks.drift.task import SHIFTS, Shift, Task, make_task

BEFORE, AFTER = 160, 320
"""Healthy samples of a stream before a shift, and samples with it."""

Loud = dict[tuple[str, str, int], list[Figures]]
"""By detector, shift and strength."""


def streams(numbers: tuple[int, int, int, int]) -> tuple[float, dict[str, list[Figures]], Loud, list[float]]:
    """Accuracy of a network, figures of healthy and shifted streams, the monitor's highest on more healthy ones."""
    seed, healthy, shifted, more = numbers
    warnings.simplefilter("ignore")  # of other libraries
    task = make_task(seed)
    here, quiet, loud = detectors(task), {}, {}
    for name, run in here.items():
        quiet[name] = [run(_stream(task, None, 1_000 * seed + n), n) for n in range(healthy)]
        for shift, strengths in SHIFTS.items():
            for strength, change in enumerate(strengths):
                seeds = [1_000 * seed + 500 + n for n in range(shifted)]
                loud[name, shift, strength] = [run(_stream(task, change, n), n) for n in seeds]
    alone = [float(here[MONITOR](_stream(task, None, 1_000 * seed + n), n).max()) for n in range(more)]
    return task.accuracy, quiet, loud, alone


def _stream(task: Task, change: Shift | None, seed: int) -> Tensor:
    """Images in service in random order, none of them twice; those after the first 160 shifted."""
    generator = torch.Generator().manual_seed(seed)
    images = task.service[torch.randperm(len(task.service), generator=generator)[: BEFORE + AFTER]]
    if change is None:
        return images
    return torch.cat([images[:BEFORE], change(images[BEFORE:], task.new, generator)])
