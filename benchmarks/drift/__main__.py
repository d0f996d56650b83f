"""``python -m benchmarks.drift``: false alarms, shifts found and delays, and the cost of watching, as Markdown."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from datetime import date
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: layers this small gain nothing from more

import numpy as np
import torch
from torch import Tensor, nn

import bnprobe
from benchmarks.drift.detectors import MONITOR, Figures, detectors, first_above
from benchmarks.drift.task import SHIFTS, Shift, Task, _network, make_task
from benchmarks.faults.score import markdown
from benchmarks.networks import resnet18, resnet50
from benchmarks.setting import machine
from benchmarks.timing import interleave
from bnprobe import __version__

BEFORE, AFTER = 160, 320
"""Healthy samples of a stream before a shift, and samples with it."""

RATE = 0.05
"""False alarms in a stream, for which all thresholds are set on one half of the healthy streams."""


def main() -> int:
    """Print the report, and write it where asked; 0 whatever the figures are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two networks, few streams: does it run at all?")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write RESULTS.md there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    networks, healthy, shifted = (2, 4, 1) if arguments.quick else (10, 24, 5)
    accuracies, quiet, loud = [], defaultdict(list), defaultdict(list)
    for seed in range(networks):
        task = make_task(seed)
        accuracies.append(task.accuracy)
        for name, run in detectors(task).items():
            quiet[name] += [run(_stream(task, None, 1_000 * seed + n), n) for n in range(healthy)]
            for shift, strengths in SHIFTS.items():
                for strength, change in enumerate(strengths):
                    numbers = [1_000 * seed + 500 + n for n in range(shifted)]
                    loud[name, shift, strength] += [run(_stream(task, change, n), n) for n in numbers]
        print(f"{time.perf_counter() - started:4.0f} s: network {seed + 1} of {networks}", file=sys.stderr, flush=True)
    report = "\n\n".join(
        [
            "# How soon a shift is found",
            _circumstances(accuracies, len(quiet[MONITOR]), len(next(iter(loud.values())))),
            *_found(quiet, loud),
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


def _stream(task: Task, change: Shift | None, seed: int) -> Tensor:
    """Images in service in random order, none of them twice; those after the first 160 shifted."""
    generator = torch.Generator().manual_seed(seed)
    images = task.service[torch.randperm(len(task.service), generator=generator)[: BEFORE + AFTER]]
    if change is None:
        return images
    return torch.cat([images[:BEFORE], change(images[BEFORE:], task.new, generator)])


def _circumstances(accuracies: list[float], healthy: int, shifted: int) -> str:
    return "\n".join(
        [
            f"{date.today().isoformat()}, bnprobe {__version__}, {machine(torch.device('cpu'))}, {platform.system()}.",
            "",
            f"{len(accuracies)} networks on digits 0 to 8, each with its own split: 450 images to train on, 650 healthy"
            f" ones for the profile and as the reference of the others, the rest in service; accuracy there"
            f" {statistics.mean(accuracies):.3f}. {healthy} healthy streams of {BEFORE + AFTER} images, and"
            f" {shifted} of every shift, which begins after {BEFORE} of them.",
        ]
    )


def _found(quiet: dict[str, list[Figures]], loud: dict[tuple[str, str, int], list[Figures]]) -> list[str]:
    highest = {name: np.array([figures.max() for figures in found]) for name, found in quiet.items()}
    # Every other stream sets the threshold, and the others count the false alarms.
    thresholds = {name: float(np.quantile(values[::2], 1 - RATE)) for name, values in highest.items()}
    alarms = [
        [name, f"{thresholds[name]:.3g}", f"{int((values[1::2] >= thresholds[name]).sum())} of {len(values[1::2])}"]
        for name, values in highest.items()
    ]
    own = [
        [f"{alpha:g}", f"{int((highest[MONITOR] >= 1 / alpha).sum())} of {len(highest[MONITOR])}"]
        for alpha in (0.01, 0.05, 0.2)
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
    kept = [figures for figures in found if first_above(figures[: BEFORE // 8], threshold) is None]
    delays = [first_above(figures, threshold, BEFORE) for figures in kept]
    known = [delay for delay in delays if delay is not None]
    return f"{len(known) / len(kept):.2f} / {statistics.median(known):.0f}" if known else "0.00"


def _cost(rounds: int) -> list[str]:
    rows = []
    for name, make, shape, sizes in (
        ("ResNet-18", resnet18, (3, 128, 128), (1, 8, 32)),
        ("ResNet-50", resnet50, (3, 128, 128), (1, 8, 32)),
        ("the network above", _network, (1, 8, 8), (1, 32)),
    ):
        torch.manual_seed(0)
        model: nn.Module = make()
        with torch.no_grad():
            model(torch.randn(4, *shape))
        profile = bnprobe.profile(model.eval(), [torch.randn(8, *shape) for _ in range(25)])
        rows += [_cost_of(name, model, profile, torch.randn(size, *shape), rounds) for size in sizes]
    head = ["network", "images in a batch", "forward pass", "a batch looked at", "on average, every=8"]
    return [
        "## What it costs",
        "Processor time beyond that of the model's forward pass of the batch in eval mode, in parts of that. Of a"
        " batch, 8 images are looked at.",
        markdown([head, *rows]),
    ]


def _cost_of(name: str, model: nn.Module, profile: bnprobe.Profile, x: Tensor, rounds: int) -> list[str]:
    monitor = bnprobe.ShiftMonitor(model, profile, every=1, on_alarm=lambda monitor: None)

    def plain() -> None:
        with torch.no_grad():
            model(x)

    def looked_at() -> None:
        with monitor:
            plain()

    found = interleave({"plain": plain, "looked at": looked_at}, rounds, torch.device("cpu"), processor=True)
    part = found.ratio("looked at", "plain") - 1
    milliseconds = f"{1000 * found.median('plain'):.3g} ms"
    return [name, str(len(x)), milliseconds, f"{part:.0%}", f"{part / 8:.1%}"]


if __name__ == "__main__":
    sys.exit(main())
