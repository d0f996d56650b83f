"""Time of ``bnprobe --help`` and ``--version``, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.setting import Setting
from benchmarks.tables import Row
from benchmarks.timing import interleave

GOAL_SECONDS = 0.3

_COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "bnprobe --help": ("-m", "bnprobe", "--help"),
    "bnprobe --version": ("-m", "bnprobe", "--version"),
}


def rows(setting: Setting) -> list[Row]:
    """Median of at least ten interleaved runs of each, also with --quick, since they are short."""
    contenders = {name: _command(arguments) for name, arguments in _COMMANDS.items()}
    rounds = interleave(contenders, max(10, setting.rounds), torch.device("cpu"))
    found = [Row("python -c pass", f"{rounds.median('python -c pass'):.3f} s")]
    for name in list(_COMMANDS)[1:]:
        seconds = rounds.median(name)
        figure = f"{seconds:.3f} s ({rounds.ratio(name, 'python -c pass'):.1f} x python -c pass)"
        found.append(Row(name, figure, f"under {GOAL_SECONDS:g} s", seconds < GOAL_SECONDS))
    return found


def _command(arguments: tuple[str, ...]) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
