"""Checks in worker processes, which do not disturb each other."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.peers.checks import CHECKS
from benchmarks.peers.layers import SUBJECTS
from benchmarks.peers.registry import Outcome, is_asked, run
from benchmarks.peers.several import DISTRIBUTED


def run_all(chosen: Sequence[str], layers: Sequence[str], processes: int) -> list[Outcome]:
    """Ask the layers in worker processes.

    Args:
        chosen: Names of checks.
        layers: Names of layers; empty: all.
        processes: How many at a time.
    """
    groups: dict[str, list[str]] = {}
    for check in CHECKS:
        if check.name in chosen:  # checks that look at what the same processes found stay together
            groups.setdefault(check.source if check.source == DISTRIBUTED else check.name, []).append(check.name)
    found = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        runs = pool.map(_asked, groups.values(), [layers] * len(groups))
        for number, (group, outcomes) in enumerate(zip(groups, runs, strict=True), start=1):
            print(f"{number}/{len(groups)}: {group}", file=sys.stderr, flush=True)
            found += outcomes
    return found


def _asked(names: Sequence[str], layers: Sequence[str]) -> list[Outcome]:
    """What some checks found, run in a process of its own."""
    torch.set_num_threads(1)
    return [
        run(check, subject)
        for check in CHECKS
        if check.name in names
        for subject in SUBJECTS
        if is_asked(check, subject) and (not layers or subject.name in layers)
    ]
