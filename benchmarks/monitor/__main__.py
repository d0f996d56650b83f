"""``python -m benchmarks.monitor``: train healthy and faulty runs under a monitor, and time it, as Markdown."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the workers

import torch

from benchmarks import tables
from benchmarks.faults.score import markdown
from benchmarks.monitor import cost, runs, score
from benchmarks.monitor.faults import FAULTS
from benchmarks.monitor.runs import BASE, HEALTHY, NETS, STEPS, Outcome
from benchmarks.setting import load, machine
from bnprobe import __version__

QUICK_STEPS = 90


class Task(NamedTuple):
    """A run: ``what`` is a condition of `HEALTHY`, or a fault of `FAULTS`."""

    network: str
    seed: int
    what: str
    steps: int


def main() -> int:
    """Print the report, and write it where asked; 0 whatever the figures are."""
    arguments = _arguments()
    torch.set_num_threads(1)
    started = time.perf_counter()
    costs = cost.rows(("resnet18",) if arguments.quick else ("resnet18", "resnet50"), 1 if arguments.quick else 5)
    tasks = list(_tasks(arguments.quick))
    outcomes = []
    with multiprocessing.get_context("spawn").Pool(arguments.processes, torch.set_num_threads, (1,)) as pool:
        for outcome in pool.imap(_run, tasks):
            outcomes.append(outcome)
            print(f"{len(outcomes)}/{len(tasks)}: {outcome.network}, {outcome.what}", file=sys.stderr, flush=True)
    report = render(outcomes, costs, time.perf_counter() - started)
    print(report)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "RESULTS.md").write_text(report + "\n")
        (arguments.out / "results.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
    return 0


def render(outcomes: list[Outcome], costs: list[tables.Row], seconds: float) -> str:
    """The whole report."""
    healthy = [one for one in outcomes if one.begin is None]
    faulty = [one for one in outcomes if one.begin is not None]
    twins = [one for one in healthy if one.what == BASE]
    alarmed = sum(bool(one.alarms) for one in healthy)
    problems = [f"* {one.network}, {one.what}, seed {one.seed}: {one.problem}" for one in outcomes if one.problem]
    parts = [
        "# A monitor, while networks train",
        _circumstances(outcomes, seconds),
        "## False alarms",
        f"Stated: at most {score.RATE:.0%} of runs. Found: {score.share(alarmed, len(healthy))} of {len(healthy)}.",
        markdown(score.false_alarms(healthy)),
        "## Delay of detection",
        markdown(score.detections(faulty, twins)),
        "## Missed",
        "\n".join(score.missed(faulty, twins)) or "None.",
        "## Cost",
        tables.render(costs),
    ]
    if problems:
        parts += ["## Monitors that stopped", "\n".join(problems)]
    return "\n\n".join(parts)


def _run(task: Task) -> Outcome:
    recipe, fault = HEALTHY.get(task.what, HEALTHY[BASE]), FAULTS.get(task.what)
    return runs.run(task.network, task.seed, task.what, recipe, fault, task.steps)


def _tasks(quick: bool) -> Iterator[Task]:
    """Healthy runs first: those of the first condition are what faulty ones are held against."""
    for number, whats in enumerate((HEALTHY, FAULTS)):
        for net, seeds in list(NETS.items())[: 1 if quick else None]:
            for seed in range(1, 2 if quick else seeds[number] + 1):
                yield from (Task(net, seed, what, QUICK_STEPS if quick else STEPS) for what in whats)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one network, one seed, few steps: does it run at all?")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write RESULTS.md and results.json there")
    parser.add_argument("--processes", type=int, default=2, help="worker processes, of one thread each (default: 2)")
    return parser.parse_args()


def _circumstances(outcomes: list[Outcome], seconds: float) -> str:
    steps = QUICK_STEPS if "--quick" in sys.argv else STEPS
    lines = [
        f"{date.today().isoformat()}, bnprobe {__version__}, {machine(torch.device('cpu'))}, {platform.system()}, load",
        f"{load()}. `python {' '.join(['-m benchmarks.monitor', *sys.argv[1:]])}` took {seconds:.0f} s.",
        "",
        f"{len(outcomes)} runs of {steps} steps, a sample every {runs.EVERY}. What is measured how, and what the",
        "figures mean: [README](README.md).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
