"""``python -m benchmarks.peers``: ask the layers what other people's tests ask, as Markdown."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch

from benchmarks.peers import tables
from benchmarks.peers.checks import CHECKS
from benchmarks.peers.layers import SUBJECTS
from benchmarks.peers.registry import Outcome
from benchmarks.peers.work import run_all
from benchmarks.setting import machine
from bnprobe import __version__


def main() -> int:
    """Print the report, and write it where asked; 0 whatever came out."""
    arguments = _arguments()
    started = time.perf_counter()
    only, sources = arguments.only or [], arguments.source or []
    chosen = [
        check.name for check in CHECKS if (not only or check.name in only) and (not sources or check.source in sources)
    ]
    outcomes = run_all(chosen, arguments.layer or [], arguments.processes)
    report = render(outcomes, time.perf_counter() - started)
    print(report)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "RESULTS.md").write_text(report + "\n")
    return 0


def render(outcomes: Sequence[Outcome], seconds: float) -> str:
    """The whole report."""
    circumstances = (
        f"{date.today().isoformat()}, bnprobe {__version__}, {machine(torch.device('cpu'))}, {platform.system()}.\n"
        f"`python {' '.join(['-m benchmarks.peers', *sys.argv[1:]])}` took {seconds:.0f} s."
    )
    parts = ["# Other people's suites", circumstances, tables.summary(outcomes)]
    for title, table in (
        ("By layer", tables.by_layer),
        ("By suite", tables.by_source),
        ("What failed", tables.failures),
        ("What does not apply", tables.not_applicable),
        ("What was asked", tables.checks),
    ):
        parts += [f"## {title}", table(outcomes)]
    return "\n\n".join(parts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--only", action="append", choices=[each.name for each in CHECKS], metavar="CHECK")
    parser.add_argument("--layer", action="append", choices=[each.name for each in SUBJECTS], metavar="LAYER")
    parser.add_argument("--source", action="append", choices=sorted({each.source for each in CHECKS}), metavar="SUITE")
    parser.add_argument("--processes", type=int, default=2, help="worker processes, of one thread each (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write RESULTS.md there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
