"""Split the work by network and seed, so that each network is trained once, and run it in several processes."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from benchmarks.faults.calibration import FULL, Check, PValue, Truth, calibrate
from benchmarks.faults.faults import FAULTS
from benchmarks.faults.networks import healthy
from benchmarks.faults.trials import Outcome, Trial, run


@dataclass(frozen=True)
class Task:
    """All that is to be done with one healthy network.

    Attributes:
        repeats: Scans for the calibration; 0: none.
        truth: What they are held against.
    """

    network: str
    seed: int
    trials: tuple[Trial, ...]
    repeats: int = 0
    truth: Truth = FULL


@dataclass
class Result:
    """What came out of one task, or of all."""

    outcomes: list[Outcome] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    p_values: list[PValue] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, other: Result) -> None:
        """Put the results of another task behind these."""
        self.outcomes += other.outcomes
        self.checks += other.checks
        self.p_values += other.p_values
        for part, seconds in other.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds


def tasks_of(trials: Iterable[Trial], repeats: dict[tuple[str, int], int], truth: Truth = FULL) -> list[Task]:
    """The trials by network and seed, longest task first, so that no process waits for another at the end."""
    groups: dict[tuple[str, int], list[Trial]] = defaultdict(list)
    for key in repeats:
        groups[key] = []
    for trial in trials:
        groups[trial.network, trial.seed].append(trial)
    tasks = [Task(*key, tuple(found), repeats.get(key, 0), truth) for key, found in groups.items()]
    return sorted(tasks, key=lambda task: len(task.trials) + task.repeats, reverse=True)


def run_all(tasks: list[Task], processes: int, progress: Callable[[int, Task], None]) -> Result:
    """Run every task; ``progress`` is told how many are done, and the last of them."""
    total = Result()
    with multiprocessing.get_context("spawn").Pool(processes, _prepare) as pool:
        for done, (task, result) in enumerate(pool.imap_unordered(_run_task, tasks), 1):
            total.add(result)
            progress(done, task)
    total.outcomes.sort(key=lambda outcome: _place(outcome.trial))
    return total


def _place(trial: Trial) -> tuple[object, ...]:
    """Faults before pairs before controls, in the order in which they are listed."""
    order = list(FAULTS)
    planted = [order.index(name) for name in trial.planted]
    return not trial.planted, len(planted), planted, trial.control, trial.strength, trial.network, trial.seed


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _run_task(task: Task) -> tuple[Task, Result]:
    result = Result()
    started = time.perf_counter()
    healthy(task.network, task.seed)
    trained = time.perf_counter()
    result.outcomes = [run(trial) for trial in task.trials]
    scanned = time.perf_counter()
    if task.repeats:
        result.checks, result.p_values = calibrate(task.network, task.seed, task.repeats, task.truth)
    result.seconds["training of healthy networks"] = trained - started
    result.seconds["faults, planted and scanned"] = scanned - trained
    result.seconds["calibration"] = time.perf_counter() - scanned
    return task, result
