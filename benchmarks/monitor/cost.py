"""What a monitor costs: a step that is sampled, and one that is not, beside the same step without a monitor."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnprobe
from benchmarks.memory import _peak_mebibytes
from benchmarks.networks import CLASSES, NETWORKS
from benchmarks.tables import Row
from benchmarks.timing import interleave

IMAGE_SIZE, BATCH_SIZE, EVERY = 64, 16, 100

GOAL = 0.02
"""Of a step, on average over 100."""

NEVER = 10**9


class Step:
    """A step of SGD; a network of its own for each, so that a monitor sees nobody else's."""

    def __init__(self, name: str, every: int | None) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = NETWORKS[name]().train()
        self.images = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
        self.targets = torch.randint(CLASSES, (BATCH_SIZE,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, 0.9)
        self.monitor = None if every is None else bnprobe.Monitor(self.model, every)
        if self.monitor is not None:
            self.monitor.start()

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        loss: Tensor = F.cross_entropy(self.model(self.images), self.targets)
        loss.backward()
        self.optimizer.step()

    def close(self) -> None:
        """Stop the monitor, which had nothing to report."""
        if self.monitor is not None:
            self.monitor.stop()
            assert self.monitor.report is None


def rows(names: tuple[str, ...], rounds: int) -> list[Row]:
    """Time and memory for each network."""
    return [row for name in names for row in (*_times(name, rounds), _memory(name))]


def _times(name: str, rounds: int) -> list[Row]:
    steps = {"plain": Step(name, None), "watched": Step(name, NEVER), "sampled": Step(name, 1)}
    steps["sampled"]()  # the first step is not sampled
    found = interleave(steps, rounds, torch.device("cpu"), processor=True)
    for step in steps.values():
        step.close()
    sample = found.ratio("sampled", "plain") - 1
    average = sample / EVERY
    milliseconds = " / ".join(f"{1e3 * found.median(each):.0f} ms" for each in ("sampled", "plain"))
    return [
        Row(f"{name}: a sample, in steps", f"{sample:.2f} ({milliseconds})"),
        Row(f"{name}: a step that is not sampled / of a loop without", f"{found.ratio('watched', 'plain'):.3f} x"),
        Row(
            f"{name}: on average at every={EVERY}, of a step",
            f"{average:.2%}",
            f"at most {GOAL:.0%}",
            average <= GOAL,
        ),
    ]


def _memory(name: str) -> Row:
    ours, theirs = (_in_fresh_process(name, every) for every in (1, 0))
    return Row(f"{name}: peak memory / of a loop without", f"{ours / theirs:.2f} x ({ours:.0f} / {theirs:.0f} MiB)")


def _in_fresh_process(name: str, every: int) -> float:
    command = [sys.executable, "-m", "benchmarks.monitor.cost", name, str(every)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(output))


def peak(name: str, every: int, steps: int = 4) -> float:
    """Peak memory of this process in MiB after some steps, all of them but the first sampled; 0: no monitor."""
    step = Step(name, every or None)
    for _ in range(steps):
        step()
    return _peak_mebibytes(torch.device("cpu"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(peak(sys.argv[1], int(sys.argv[2]))))
