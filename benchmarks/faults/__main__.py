"""``python -m benchmarks.faults``: plant faults, scan, and score the diagnosis, as Markdown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the workers

import torch

from benchmarks import tables
from benchmarks.faults import score
from benchmarks.faults.calibration import FULL, ORDINARY, QUICK, REPEATS, SCAN_BATCHES, Truth
from benchmarks.faults.faults import FAULTS
from benchmarks.faults.networks import NETWORKS
from benchmarks.faults.trials import LOOKED_AT, UNSEEN, Outcome, Trial, control_trials, pair_trials, single_trials
from benchmarks.faults.work import Result, Task, run_all, tasks_of
from benchmarks.setting import machine
from bnprobe import __version__

QUICK_NETWORKS = ("mlp", "audio")
QUICK_SEEDS = LOOKED_AT[:1]


def main() -> int:
    """Print the report, and write it where asked; 0 whatever the figures are."""
    arguments = _arguments()
    started = time.perf_counter()
    truth = QUICK if arguments.quick else FULL
    tasks = _tasks(arguments, truth)
    result = run_all(tasks, arguments.processes, lambda done, task: _tell(done, len(tasks), task))
    report = render(result, time.perf_counter() - started, truth)
    print(report)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "RESULTS.md").write_text(report + "\n")
        (arguments.out / "results.json").write_text(json.dumps(asdict(result), indent=1))
    return 0


def render(result: Result, seconds: float, truth: Truth = FULL) -> str:
    """The whole report."""
    parts = [
        "# Planted faults",
        _circumstances(result, seconds, truth),
        "## Goals",
        tables.render(score.goals(result.outcomes, result.checks)),
        *_case_tables(result.outcomes),
        "## Calibration on healthy models",
        score.markdown(score.coverage(result.checks)),
        score.markdown(score.p_values(result.p_values)),
    ]
    return "\n\n".join(parts)


def _case_tables(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Tables of the scored cases; where none was run, of those on which rules may be mended, under that name."""
    shown = [one for one in outcomes if one.trial.is_scored]
    if not shown:
        shown = list(outcomes)
        yield "Scored cases: not run. The tables below are of cases on which thresholds may be set."
    for title, table in (
        ("By fault", score.by_fault),
        ("By remedy", score.by_remedy),
        ("Controls", score.by_control),
        ("What was named first", score.confusion),
        ("Misses", score.misses),
    ):
        yield f"## {title}"
        yield score.markdown(table(shown))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two networks, one seed, short calibration")
    parser.add_argument("--only", action="append", choices=FAULTS, metavar="FAULT", help="one fault; may be repeated")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="one network; may be repeated")
    parser.add_argument("--looked-at", action="store_true", help="only the seeds on which rules may be mended")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write RESULTS.md and results.json there")
    parser.add_argument("--processes", type=int, default=2, help="worker processes, of one thread each (default: 2)")
    return parser.parse_args()


def _tasks(arguments: argparse.Namespace, truth: Truth) -> list[Task]:
    networks = arguments.network or (QUICK_NETWORKS if arguments.quick else tuple(NETWORKS))
    seeds = QUICK_SEEDS if arguments.quick else LOOKED_AT if arguments.looked_at else (*LOOKED_AT, *UNSEEN)
    trials: list[Trial] = list(single_trials(tuple(arguments.only or ())))
    if not arguments.only:
        trials += [*pair_trials(), *control_trials()]
    chosen = [one for one in trials if one.network in networks and one.seed in seeds]
    alone = arguments.only or arguments.looked_at
    calibrated = {} if alone else {(network, seed): REPEATS for network in ORDINARY for seed in UNSEEN}
    if arguments.quick:
        calibrated = {(network, seed): 1 for network in networks for seed in seeds}
    return tasks_of(chosen, {key: repeats for key, repeats in calibrated.items() if key[0] in networks}, truth)


def _tell(done: int, of: int, task: Task) -> None:
    print(f"{done}/{of}: {task.network}, seed {task.seed}", file=sys.stderr, flush=True)


def _circumstances(result: Result, seconds: float, truth: Truth) -> str:
    planted, pairs, controls = (
        sum(bool(one.trial.control) == (faults == 0) and len(one.trial.planted) == faults for one in result.outcomes)
        for faults in (1, 2, 0)
    )
    tuned = ", ".join(map(str, LOOKED_AT))
    took = ", ".join(f"{part} {taken:.0f} s" for part, taken in result.seconds.items())
    lines = [
        f"{date.today().isoformat()}, bnprobe {__version__}, {machine(torch.device('cpu'))}, {platform.system()}.",
        f"`python {' '.join(['-m benchmarks.faults', *sys.argv[1:]])}` took {seconds:.0f} s"
        f" (summed over processes: {took}).",
        "",
        f"{planted} planted faults, {pairs} pairs, {controls} controls. Thresholds and rules may be mended on seeds"
        f" {tuned}; all figures but those beside them are of the others.",
        f"Calibration: {SCAN_BATCHES} micro-batches a scan, against a truth from {truth.batches} other batches.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
