"""``python -m benchmarks.reversion``: train on streams that go wrong, with a monitor that acts and without one."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: layers this small gain nothing from more

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bnprobe
from benchmarks.faults.score import markdown
from benchmarks.setting import machine
from bnprobe.monitor.changes import ACTIONS, change, take_back
from bnprobe.stats.intervals import t_quantile

BATCH, EVERY, RATE = 32, 10, 0.01
"""Samples in a healthy batch, steps from sample to sample of the monitor, and the learning rate (SGD, momentum 0.9)."""


@dataclass(frozen=True)
class Stream:
    """What is wrong with the batches for a while.

    Attributes:
        small, sort, shift: The batches hold 2 images; they hold neighbours in an order by class; the images are
            inverted, and paler.
        back: From two thirds of the run on nothing is wrong.
    """

    small: bool = False
    sort: bool = False
    shift: bool = False
    back: bool = True

    def is_wrong(self, step: int, steps: int) -> bool:
        """From one third of the run on."""
        return self != Stream() and step >= steps // 3 and not (self.back and step >= 2 * steps // 3)


STREAMS = {
    "healthy": Stream(),
    "batches of 2": Stream(small=True, back=False),
    "batches of 2, and back": Stream(small=True),
    "sorted by class": Stream(sort=True, back=False),
    "sorted by class, and back": Stream(sort=True),
    "shifted": Stream(shift=True, back=False),
    "shifted, and back": Stream(shift=True),
}

ALONE = "batch norm"
ARMS = (ALONE, "freeze", "renorm", "recalibrate", "freeze at once", "renorm at once", "frozen from the start")
"""Batch norm left alone; what a monitor does about its findings; the same by one who knows when something is wrong; and
statistics that are never moved from 0 and 1."""


def main() -> int:
    """Print the report, and write it where asked; 0 whatever the figures are."""
    arguments = _arguments()
    torch.set_num_threads(1)
    seeds, steps = (range(1), 60) if arguments.quick else (range(5), 600)
    started = time.perf_counter()
    found: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for name, stream in STREAMS.items():
        for arm in ARMS:
            found[name, arm] = [run(stream, arm, seed, steps) for seed in seeds]
        print(f"{time.perf_counter() - started:4.0f} s: {name}", file=sys.stderr, flush=True)
    report = render(found, steps, time.perf_counter() - started)
    print(report)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "RESULTS.md").write_text(report + "\n")
    return 0


def run(stream: Stream, arm: str, seed: int, steps: int) -> tuple[float, int]:
    """Train; the accuracy on held-out images in eval mode, and how often layers were changed."""
    torch.manual_seed(seed)
    model = network()
    train, held_out = _parts()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    changes: list[str] = []

    def noted(event: dict[str, object]) -> None:
        if event["event"] == "change" and event["action"] != "undo":
            changes.append(str(event["action"]))

    def all_steps(watch: Callable[[int], None] = lambda step: None) -> None:
        for step, (x, y) in enumerate(_batches(stream, train, seed, steps)):
            watch(step)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if arm == ALONE:
        all_steps()
    elif arm == "frozen from the start":
        change(model, "freeze", _layers(model), 1)
        all_steps()
    elif arm.endswith(" at once"):
        all_steps(_knowing(model, arm.removesuffix(" at once"), stream, steps))
    else:
        with warnings.catch_warnings(), bnprobe.Monitor(model, every=EVERY, on_finding=arm, log=noted):
            warnings.simplefilter("ignore", UserWarning)
            all_steps()
    x, y = held_out
    if stream.shift and not stream.back:
        x = shifted(x)
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean()), len(changes)


def network() -> nn.Module:
    """Two convolutions and a hidden layer, each with BN."""
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(384, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10)),
    )


def shifted(x: Tensor) -> Tensor:
    """Images of another domain."""
    return 0.9 - 0.6 * x


def _knowing(model: nn.Module, action: str, stream: Stream, steps: int) -> Callable[[int], None]:
    """Acts when something begins to be wrong, and takes it back when it ends."""
    made = []

    def watch(step: int) -> None:
        wrong = stream.is_wrong(step, steps)
        if wrong and not made:
            made.append(change(model, action, _layers(model), 10 * EVERY))
        if made and made[0].schedule is not None:
            made[0].schedule.advance()
        if made and not wrong and step:
            take_back(model, made.pop())

    return watch


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]


def _parts() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images to train on, and held out ones."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = torch.tensor(digits.images[order], dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target[order])
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def _batches(stream: Stream, data: tuple[Tensor, Tensor], seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = data
    by_class = y.argsort(stable=True)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        wrong = stream.is_wrong(step, steps)
        size = 2 if wrong and stream.small else BATCH
        if wrong and stream.sort:
            first = int(torch.randint(0, len(y) - size, (), generator=generator))
            chosen = by_class[first : first + size]
        else:
            chosen = torch.randint(0, len(y), (size,), generator=generator)
        yield shifted(x[chosen]) if wrong and stream.shift else x[chosen], y[chosen]


def render(found: dict[tuple[str, str], list[tuple[float, int]]], steps: int, seconds: float) -> str:
    """The whole report."""
    parts = [
        "# What it is worth that a monitor acts by itself",
        f"{date.today().isoformat()}, bnprobe {bnprobe.__version__}, {machine(torch.device('cpu'))}, "
        f"{platform.system()}.\n`python {' '.join(['-m benchmarks.reversion', *sys.argv[1:]])}` took {seconds:.0f} s.",
        f"scikit-learn's digits: 1,200 images to train on, in {steps} batches of {BATCH}, and 597 held out, on which\n"
        "the accuracy is taken in eval mode. From one third of the run on something is wrong. The monitor samples\n"
        f"every {EVERY} steps. In brackets: 95% intervals by Student's t over runs; the difference from batch norm\n"
        "left alone is taken run by run. Better, worse: its interval leaves out 0; same: it does not.",
    ]
    for name in STREAMS:
        alone = [accuracy for accuracy, _ in found[name, ALONE]]
        table = [["arm", "held-out accuracy", "minus batch norm", "", "changes in each run"]]
        for arm in ARMS:
            scores = [accuracy for accuracy, _ in found[name, arm]]
            gain = [one - other for one, other in zip(scores, alone, strict=True)]
            compared = ["", ""] if arm == ALONE else [_interval(gain, "+.3f"), _verdict(gain)]
            changes = [str(number) for _, number in found[name, arm]] if arm in ACTIONS else []
            table.append([arm, _interval(scores, ".3f"), *compared, ", ".join(changes)])
        parts += [f"## {name[0].upper()}{name[1:]}", markdown(table)]
    return "\n\n".join(parts)


def _interval(values: list[float], form: str) -> str:
    mean, half = _mean_and_half(values)
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]" if len(values) > 1 else f"{mean:{form}}"


def _verdict(values: list[float]) -> str:
    mean, half = _mean_and_half(values)
    return "" if len(values) < 2 else "better" if mean - half > 0 else "worse" if mean + half < 0 else "same"


def _mean_and_half(values: list[float]) -> tuple[float, float]:
    number = len(values)
    if number < 2:
        return values[0], 0.0
    return float(np.mean(values)), t_quantile(number - 1, 0.95) * float(np.std(values, ddof=1)) / number**0.5


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reversion", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: does it run at all?")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write RESULTS.md there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
