"""Time of whole commands, each in a fresh process: help, and the first report of a small network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.setting import Setting
from benchmarks.tables import Row
from benchmarks.timing import interleave

HELP_SECONDS = 0.15
"""Goal for the help; Python itself is in it."""

REPORT_SECONDS = 0.5
"""Goal for the first report, beyond ``import torch``."""

_PYTHON, _TORCH = "python -c pass", "python -c 'import torch'"
_SAMPLE = Path(__file__).parents[1] / "sample_configs" / "digits" / "spec.yaml"

_COMMANDS = {
    _PYTHON: ("-c", "pass"),
    "bnprobe --version": ("-m", "bnprobe", "--version"),
    "bnprobe --help": ("-m", "bnprobe", "--help"),
    "bnprobe scan --help": ("-m", "bnprobe", "scan", "--help"),
    _TORCH: ("-c", "import torch"),
    "bnprobe lint, digits sample": ("-m", "bnprobe", "lint", str(_SAMPLE), "--exit-zero"),
    "bnprobe scan, digits sample": ("-m", "bnprobe", "scan", str(_SAMPLE), "--exit-zero"),
}


def rows(setting: Setting) -> list[Row]:
    """Median of at least ten interleaved runs of each, also with --quick, since they are short."""
    contenders = {name: _command(arguments) for name, arguments in _COMMANDS.items()}
    rounds = interleave(contenders, max(10, setting.rounds), torch.device("cpu"))
    found = []
    for name in _COMMANDS:
        seconds, beyond = rounds.median(name), rounds.difference(name, _TORCH)
        figure = f"{seconds:.3f} s"
        if name in ("bnprobe --help", "bnprobe --version"):
            found.append(Row(name, figure, f"at most {HELP_SECONDS:g} s", seconds <= HELP_SECONDS))
        elif "digits" in name:
            goal = f"at most import torch + {REPORT_SECONDS:g} s"
            found.append(Row(name, f"{figure} (import torch {beyond:+.3f} s)", goal, beyond <= REPORT_SECONDS))
        else:
            found.append(Row(name, figure))
    return found


def _command(arguments: tuple[str, ...]) -> Callable[[], object]:
    """Run Python with these arguments, with its modules compiled, as they are once pip has installed them."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return lambda: subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=variables
    )
