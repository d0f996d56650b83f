"""Side-by-side timing: every round runs every contender once, and ratios are taken within a round.

A temporary slowdown of the machine then affects both sides of a ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Contender = Callable[[], object]


@dataclass(frozen=True)
class Rounds:
    """Seconds of each contender, one value per round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of one contender."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str, times: float = 1.0) -> float:
        """Median over the rounds of the time of ``name`` over ``times`` the time of ``to``."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(one / (times * other) for one, other in pairs)

    def difference(self, name: str, to: str) -> float:
        """Median over the rounds of the seconds of ``name`` beyond those of ``to``."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(one - other for one, other in pairs)


def interleave(
    contenders: Mapping[str, Contender], rounds: int, device: torch.device, processor: bool = False
) -> Rounds:
    """Run all contenders once untimed, then ``rounds`` times in turn; every second round in reverse order.

    Args:
        contenders: By name; each does the same work at every call.
        rounds: Timed runs of each.
        device: If it is a CUDA device, it is synchronized before and after every run.
        processor: Take processor time on the CPU, which does not depend on what else runs.
    """
    now = clock if processor else _wall
    for contender in contenders.values():
        contender()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in reversed(names) if number % 2 else names:
            seconds[name].append(_time(contenders[name], device, now))
    return Rounds(seconds)


def clock(device: torch.device) -> float:
    """Seconds of processor time; on CUDA of the clock on the wall, once all work is done."""
    return _wall(device) if device.type == "cuda" else time.process_time()


def _wall(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _time(contender: Contender, device: torch.device, now: Callable[[torch.device], float]) -> float:
    started = now(device)
    contender()
    return now(device) - started
