"""``python -m benchmarks.repairs``: repair, fine-tune, and hold every arm against its control, as Markdown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: layers this small gain nothing from more

import torch

from benchmarks.faults.score import markdown
from benchmarks.repairs import digits, finetuned, scratch, task
from benchmarks.repairs.arms import Table, rows
from benchmarks.setting import machine
from bnprobe import __version__

QUICK_STEPS = 20

_WITHOUT_TRAINING = """All BN layers are converted, from recalibrated statistics. On half of the held-out images nothing
was chosen, and these score: the weight of example weighing is the best on the others. In brackets: 95% intervals over
these images, paired."""


def main() -> int:
    """Print the report, and write it where asked; 0 whatever the figures are."""
    arguments = _arguments()
    torch.set_num_threads(1)
    if arguments.untrained:
        print(_without_training())
        return 0
    started = time.perf_counter()
    chapters = {title: [_told(table, started) for table in tables] for title, tables in _chapters(arguments.quick)}
    report = render(_without_training(), chapters, time.perf_counter() - started)
    print(report)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "RESULTS.md").write_text(report + "\n")
        found = {title: [asdict(table) for table in tables] for title, tables in chapters.items()}
        (arguments.out / "results.json").write_text(json.dumps(found, indent=1))
    return 0


def render(without_training: str, chapters: dict[str, list[Table]], seconds: float) -> str:
    """The whole report."""
    parts = ["# What repairs give", _circumstances(seconds), without_training]
    for title, tables in chapters.items():
        parts.append(f"## {title}")
        for table in tables:
            parts += [f"### {table.title}", table.words, markdown(rows(table))]
    return "\n\n".join(parts)


def _without_training() -> str:
    """The chapter of the conversions alone."""
    tables = [f"### {title}\n\n{markdown(found)}" for title, found in digits.untrained_rows().items()]
    return "\n\n".join(["## The sample digits, without training", _WITHOUT_TRAINING, *tables])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repairs", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, one rate, few steps: does it run at all?")
    parser.add_argument("--untrained", action="store_true", help="print what conversions give without training, alone")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write RESULTS.md and results.json there")
    return parser.parse_args()


def _chapters(quick: bool) -> Iterator[tuple[str, Iterator[Table]]]:
    short = {"steps": QUICK_STEPS} if quick else {}
    yield "The sample digits, fine-tuned", digits.tables(**short, quick=quick)
    yield "A harder task, from scratch", scratch.tables(**short, quick=quick)
    begun = {"from_scratch": QUICK_STEPS} if quick else {}
    rate = scratch.common_rate(**short, quick=quick).rate
    yield "The harder task, fine-tuned", finetuned.tables(rate, **short, **begun, quick=quick)


def _told(table: Table, started: float) -> Table:
    print(f"{time.perf_counter() - started:4.0f} s: {table.title}", file=sys.stderr, flush=True)
    return table


def _circumstances(seconds: float) -> str:
    parts = task.parts()
    lines = [
        f"{date.today().isoformat()}, bnprobe {__version__}, {machine(torch.device('cpu'))}, {platform.system()}.",
        f"`python {' '.join(['-m benchmarks.repairs', *sys.argv[1:]])}` took {seconds:.0f} s.",
        "",
        "In brackets: 95% intervals by Student's t over runs; the difference is taken run by run. Better, worse: its",
        f"interval leaves out 0; same: it does not. The harder task has {len(parts.training)} images to train on,",
        f"{len(parts.choosing)} for choosing and {len(parts.proving)} held out for the proof.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
