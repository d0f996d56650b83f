"""``python -m tests.faults``: every kind with every operation, exceptions at every place, interrupts at random.

Prints each run that broke its promise, and the counts for README.md.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import Counter

import torch

from .injection import PLACES, PlantedError, positions, timed_interrupt
from .kinds import KINDS
from .operations import OPERATIONS
from .run import Outcome, instructions, run, run_interrupted, run_planted

ERRORS: tuple[type[BaseException], ...] = (PlantedError, KeyboardInterrupt, MemoryError, SystemExit, StopIteration)


class Tally:
    """Counts runs, and prints those that broke."""

    def __init__(self) -> None:
        self.ends: dict[str, Counter[str]] = {}
        self.broken = 0

    def add(self, what: str, run: str, outcome: Outcome, expected: type[BaseException] | None = None) -> None:
        ends = self.ends.setdefault(what, Counter())
        ends[outcome.end] += 1
        wrong = outcome.broken(expected)
        if wrong is not None:
            ends["BROKEN"] += 1
            self.broken += 1
            print(f"  {run}: {wrong}", flush=True)

    def table(self) -> str:
        lines = []
        for what, ends in self.ends.items():
            total = sum(ends.values()) - ends["BROKEN"]
            listed = ", ".join(f"{count} {end}" for end, count in ends.most_common() if end != "BROKEN")
            lines.append(f"{what}: {total} runs, {ends['BROKEN']} broken ({listed})")
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--interrupts", type=int, default=500)
    parser.add_argument("--exceptions", type=int, default=300)
    parser.add_argument("--clock", type=int, default=100, help="interrupts by the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no run after so long; says what was made")
    parser.add_argument("--no-kinds", action="store_true", help="leave out the runs without a fault")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance, tally, started = random.Random(options.seed), Tally(), time.perf_counter()

    def late() -> bool:
        return time.perf_counter() - started > 60 * options.minutes

    pairs = list(itertools.product(KINDS, OPERATIONS))
    chance.shuffle(pairs)
    for kind, operation in [] if options.no_kinds else pairs:
        if late():
            break
        tally.add("no fault", f"{kind}, {operation}", run(kind, operation))
    for _ in range(options.exceptions):
        if late():
            break
        kind, operation, place = (chance.choice(list(each)) for each in (KINDS, OPERATIONS, PLACES))
        error, at = chance.choice(ERRORS), chance.randint(1, 20)
        outcome, _ = run_planted(kind, operation, place, at, error)
        tally.add("exception", f"{kind}, {operation}, {error.__name__} in the {place}, {at}", outcome, error)
    left = options.interrupts
    while left > 0 and not late():
        kind, operation = chance.choice(list(KINDS)), chance.choice(list(OPERATIONS))
        counted = instructions(kind, operation)
        for at in positions(counted, min(left, 12), chance.randrange(2**32)) if counted.borders else []:
            outcome, where = run_interrupted(kind, operation, at)
            tally.add("interrupt", f"{kind}, {operation}, Ctrl-C at {at}, {where}", outcome)
            left -= 1
    for _ in range(options.clock):
        if late():
            break
        kind, operation, seconds = chance.choice(list(KINDS)), chance.choice(list(OPERATIONS)), chance.random()
        outcome = run(kind, operation, fault=timed_interrupt(seconds))
        tally.add("interrupt by the clock", f"{kind}, {operation}, Ctrl-C after {seconds:.3f} s", outcome)
    print(f"{tally.table()}\n{len(KINDS)} kinds, {len(OPERATIONS)} operations, {time.perf_counter() - started:.0f} s")
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main())
