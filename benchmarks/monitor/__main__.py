"""``python -m benchmarks.monitor``: train healthy and faulty runs under a monitor, and time it, as Markdown."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the workers

import torch

from benchmarks import tables
from benchmarks.faults.score import markdown
from benchmarks.monitor import cost, score
from benchmarks.monitor.runs import BASE, EVERY, Outcome
from benchmarks.monitor.work import run_all, tasks
from benchmarks.setting import load, machine
from bnprobe import __version__

_COST = "## Cost"


def main() -> int:
    """Print the report, and write it where asked; 0 whatever the figures are."""
    arguments = _arguments()
    torch.set_num_threads(1)
    started = time.perf_counter()
    if arguments.only_cost:
        costs = _costs(arguments.quick)
        print(_cost_section(costs))
        if arguments.out is not None:
            path = arguments.out / "RESULTS.md"
            before, _, after = path.read_text().partition(_COST)
            _, end, problems = after.partition("\n\n## ")
            path.write_text(f"{before}{_cost_section(costs)}{end}{problems}" + ("" if end else "\n"))
        return 0
    wanted = tasks(arguments.quick)
    outcomes = []
    for outcome in run_all(wanted, arguments.processes, arguments.minutes):
        outcomes.append(outcome)
        print(f"{len(outcomes)}/{len(wanted)}: {outcome.network}, {outcome.what}", file=sys.stderr, flush=True)
    missing = len(wanted) - len(outcomes)
    report = render(outcomes, missing, _costs(arguments.quick), time.perf_counter() - started)
    print(report)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "RESULTS.md").write_text(report + "\n")
        (arguments.out / "results.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
    return 0


def render(outcomes: list[Outcome], missing: int, costs: list[tables.Row], seconds: float) -> str:
    """The whole report."""
    healthy = [one for one in outcomes if one.begin is None]
    faulty = [one for one in outcomes if one.begin is not None]
    twins = [one for one in healthy if one.what == BASE]
    alarmed = sum(bool(one.alarms) for one in healthy)
    problems = [f"* {one.network}, {one.what}, seed {one.seed}: {one.problem}" for one in outcomes if one.problem]
    parts = [
        "# A monitor, while networks train",
        _circumstances(outcomes, missing, seconds),
        "## False alarms",
        f"Stated: at most {score.RATE:.0%} of runs. Found: {score.share(alarmed, len(healthy))} of {len(healthy)}.",
        markdown(score.false_alarms(healthy)),
        "Runs with an alarm; what the running statistics cost is the accuracy with those of held-out batches in their"
        " place, less that in eval mode, at the end.",
        markdown(score.alarmed(healthy)),
        "## Delay of detection",
        markdown(score.detections(faulty, twins)),
        "## Missed",
        "\n".join(score.missed(faulty, twins)) or "None.",
        "Why they pass: [README](README.md#what-it-means).",
        _cost_section(costs),
    ]
    if problems:
        parts += ["## Monitors that stopped", "\n".join(problems)]
    return "\n\n".join(parts)


def _costs(quick: bool) -> list[tables.Row]:
    return cost.rows(("resnet18",), 1) if quick else cost.rows(("resnet18", "resnet50"), 3)


def _cost_section(costs: list[tables.Row]) -> str:
    return "\n\n".join([_COST, f"{date.today().isoformat()}, load {load()}.", tables.render(costs)])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one network, one seed, few steps: does it run at all?")
    parser.add_argument("--only-cost", action="store_true", help="time it, and write that section of RESULTS.md anew")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write RESULTS.md and results.json there")
    parser.add_argument("--processes", type=int, default=2, help="worker processes, of one thread each (default: 2)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no run later than this (default: no end)"
    )
    return parser.parse_args()


def _circumstances(outcomes: list[Outcome], missing: int, seconds: float) -> str:
    lines = [
        f"{date.today().isoformat()}, bnprobe {__version__}, {machine(torch.device('cpu'))}, {platform.system()}, load",
        f"{load()}. `python {' '.join(['-m benchmarks.monitor', *sys.argv[1:]])}` took {seconds:.0f} s.",
        "",
        f"{len(outcomes)} runs of {outcomes[0].steps} steps, a sample every {EVERY}. How each is made, and what the",
        "figures mean: [README](README.md).",
    ]
    if missing:
        lines += ["", f"{missing} of the {missing + len(outcomes)} runs are missing: the time was over before them."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
