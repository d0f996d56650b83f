"""``python -m benchmarks.drift``: false alarms, shifts found and delays, and the cost of watching, as Markdown."""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from math import ceil
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: layers this small gain nothing from more

import numpy as np
import torch
from torch import Tensor, nn

import bnprobe
from benchmarks.drift.detectors import MONITOR, STEP, Figures, first_above, without_evidently
from benchmarks.drift.task import SHIFTS, _network
from benchmarks.drift.work import AFTER, BEFORE, Loud, streams
from benchmarks.faults.score import markdown
from benchmarks.networks import resnet18, resnet50
from benchmarks.setting import machine
from benchmarks.timing import interleave
from bnprobe import __version__

RATE = 0.05
"""False alarms in a stream, for which all thresholds are set on one half of the healthy streams."""


def main() -> int:
    """Print the report, and write it where asked; 0 whatever the figures are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two networks, few streams: does it run at all?")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write RESULTS.md there")
    parser.add_argument("--processes", type=int, default=1, help="worker processes, of one thread each (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    networks, *numbers = (2, 4, 1, 4) if arguments.quick else (8, 14, 2, 60)
    accuracies, quiet, loud, alone = [], defaultdict(list), defaultdict(list), []
    with multiprocessing.get_context("spawn").Pool(arguments.processes, torch.set_num_threads, (1,)) as pool:
        for found in pool.imap(streams, [(seed, *numbers) for seed in range(networks)]):
            accuracies.append(found[0])
            for joined, more in zip((quiet, loud), found[1:3], strict=True):
                for key, figures in more.items():
                    joined[key] += figures
            alone += found[3]
            print(
                f"{time.perf_counter() - started:4.0f} s: {len(accuracies)} of {networks}", file=sys.stderr, flush=True
            )
    report = "\n\n".join(
        [
            "# How soon a shift is found",
            _circumstances(accuracies, len(quiet[MONITOR]), len(next(iter(loud.values())))),
            *_found(quiet, loud, alone),
            *_cost(2 if arguments.quick else 7),
        ]
    )
    report += (
        f"\n\n`python {' '.join(['-m benchmarks.drift', *sys.argv[1:]])}` took {time.perf_counter() - started:.0f} s."
    )
    print(report)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "RESULTS.md").write_text(report + "\n")
    return 0


def _circumstances(accuracies: list[float], healthy: int, shifted: int) -> str:
    return "\n".join(
        [
            f"{date.today().isoformat()}, bnprobe {__version__}, {machine(torch.device('cpu'))}, {platform.system()}.",
            "",
            f"{len(accuracies)} networks on digits 0 to 8, each with its own split: 450 images to train on, 650 healthy"
            f" ones for the profile and as the reference of the others, the rest in service; accuracy there"
            f" {statistics.mean(accuracies):.3f}. {healthy} healthy streams of {BEFORE + AFTER} images, and"
            f" {shifted} of every shift, which begins after {BEFORE} of them. {_others()}",
        ]
    )


def _others() -> str:
    missing = without_evidently()
    if missing:
        return f"evidently is not here, and nothing of it below: {missing}."
    return f"The others are those of evidently {importlib.metadata.version('evidently')}."


def _found(quiet: dict[str, list[Figures]], loud: Loud, alone: list[float]) -> list[str]:
    highest = {name: np.array([figures.max() for figures in found]) for name, found in quiet.items()}
    # Every other stream sets the threshold, and the others count the false alarms.
    thresholds = {name: float(np.quantile(values[::2], 1 - RATE)) for name, values in highest.items()}
    alarms = [
        [name, f"{thresholds[name]:.3g}", f"{int((values[1::2] >= thresholds[name]).sum())} of {len(values[1::2])}"]
        for name, values in highest.items()
    ]
    own = [
        [f"{alpha:g}", f"{sum(value >= 1 / alpha for value in alone)} of {len(alone)}"] for alpha in (0.01, 0.05, 0.2)
    ]
    names = [f"{MONITOR}, alpha 0.01", *highest]
    levels = [100.0, *thresholds.values()]
    rows = []
    for shift in SHIFTS:
        for strength, word in enumerate(("mild", "strong")):
            cells = [
                _cell(loud[name, shift, strength], level)
                for name, level in zip([MONITOR, *highest], levels, strict=True)
            ]
            rows.append([f"{shift.partition(' (')[0]}, {word}", *cells])
    return [
        "## Its own alarm on healthy streams",
        "The rate that is promised, and the streams in which the e-value reached 1 / alpha.",
        markdown([["alpha", "false alarms"], *own]),
        "## All thresholds set to the same rate of false alarms",
        f"So that {RATE:.0%} of one half of the healthy streams have an alarm; counted on the other half.",
        markdown([["detector", "threshold", "false alarms"], *alarms]),
        "## Shifts found",
        "Share of the streams in which the shift was found within 320 images, and the median delay in images where it"
        f" was. Mild and strong: {'; '.join(SHIFTS)}. Streams with an alarm before the shift are left out.",
        markdown([["shift", *names], *rows]),
    ]


def _cell(found: list[Figures], threshold: float) -> str:
    """Share and median delay, e.g. "1.00 / 24"."""
    kept = [figures for figures in found if first_above(figures[: BEFORE // STEP], threshold) is None]
    delays = [first_above(figures, threshold, BEFORE) for figures in kept]
    known = [delay for delay in delays if delay is not None]
    return f"{len(known) / len(kept):.2f} / {statistics.median(known):.0f}" if known else "0.00"


def _cost(rounds: int) -> list[str]:
    idle, rows = _seconds_between_looks(10 * rounds), []
    for name, make, shape, sizes in (
        ("ResNet-18", resnet18, (3, 128, 128), (1, 8, 32)),
        ("ResNet-50", resnet50, (3, 128, 128), (1, 8, 32)),
        ("the network above", _network, (1, 8, 8), (1, 32)),
    ):
        model, profile = _profiled(make, shape)
        rows += [_cost_of(name, model, profile, torch.randn(size, *shape), rounds, idle) for size in sizes]
    head = ["network", "images in a batch", "forward pass", "a batch looked at", "batches apart", "on average"]
    return [
        "## What it costs",
        "Processor time beyond that of the model's forward pass of the batch in eval mode, in parts of that. Of a"
        " batch, 8 images are looked at. How far looks are apart, the monitor sets. A batch that is not looked at takes"
        f" {1e6 * idle:.0f} microseconds more, whatever the network is, and that is part of the average.",
        markdown([head, *rows]),
    ]


def _profiled(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, bnprobe.Profile]:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        model(torch.randn(4, *shape))
    return model, bnprobe.profile(model.eval(), [torch.randn(8, *shape) for _ in range(25)])


def _serving(model: nn.Module, x: Tensor, times: int, watch: AbstractContextManager[object]) -> Callable[[], None]:
    def serve() -> None:
        with watch, torch.no_grad():
            for _ in range(times):
                model(x)

    return serve


def _seconds_between_looks(rounds: int) -> float:
    """What hooks take where nothing is looked at."""
    (model, profile), x, times = _profiled(_network, (1, 8, 8)), torch.randn(1, 1, 8, 8), 500
    never = bnprobe.ShiftMonitor(model, profile, every=10**9)
    contenders = {"plain": _serving(model, x, times, nullcontext()), "never": _serving(model, x, times, never)}
    return interleave(contenders, rounds, torch.device("cpu"), processor=True).difference("never", "plain") / times


def _cost_of(name: str, model: nn.Module, profile: bnprobe.Profile, x: Tensor, rounds: int, idle: float) -> list[str]:
    spaced, looks = (bnprobe.ShiftMonitor(model, profile, every=each, on_alarm=lambda _: None) for each in (None, 1))
    started = time.perf_counter()
    _serving(model, x, 3, nullcontext())()
    times = ceil(0.3 / (time.perf_counter() - started))
    contenders = {"plain": _serving(model, x, times, nullcontext()), "looked at": _serving(model, x, times, looks)}
    found = interleave(contenders, rounds, torch.device("cpu"), processor=True)
    part, forward = found.ratio("looked at", "plain") - 1, found.median("plain") / times
    spaced._costs = looks._costs
    apart = spaced._distance()
    return [
        name,
        str(len(x)),
        f"{1000 * forward:.3g} ms",
        f"{part:.0%}",
        str(apart),
        f"{part / apart + idle / forward:.1%}",
    ]


if __name__ == "__main__":
    sys.exit(main())
