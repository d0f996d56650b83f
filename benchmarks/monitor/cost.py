"""What monitors cost: a step that is sampled, and one that is not, beside the same step without a monitor.

Beside bnprobe two others that also watch a network train, each with what it measures (see the README): delve, and
cockpit-for-pytorch in its cheapest configuration. One that is not installed or fails is listed with the reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnprobe
from benchmarks.memory import _peak_mebibytes
from benchmarks.networks import CLASSES, NETWORKS
from benchmarks.rivals import _quiet
from benchmarks.tables import Row
from benchmarks.timing import interleave
from bnprobe.monitor.inputs import InputShift
from bnprobe.monitor.monitor import PARTS

IMAGE_SIZE, BATCH_SIZE, EVERY = 64, 16, 100

GOAL = 0.02
"""Of a step, on average over 100."""

NEVER = 10**9


class Step:
    """A step of SGD; a network of its own for each, so that a monitor sees nobody else's."""

    def __init__(self, name: str, every: int = NEVER) -> None:
        torch.manual_seed(0)
        self.every = every
        self.model: nn.Module = NETWORKS[name]().train()
        self.images = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
        self.targets = torch.randint(CLASSES, (BATCH_SIZE,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, 0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        loss: Tensor = F.cross_entropy(self.model(self.images), self.targets)
        loss.backward()
        self.optimizer.step()

    def close(self) -> None:
        """End what watches."""


class Watched(Step):
    """By `bnprobe.Monitor`."""

    def __init__(self, name: str, every: int) -> None:
        super().__init__(name, every)
        self.monitor = bnprobe.Monitor(self.model, every)
        self.monitor.start()

    def close(self) -> None:
        """Stop the monitor, which had nothing to report."""
        self.monitor.stop()
        assert self.monitor.report is None


class Inputs(Step):
    """The scores of a batch's inputs alone, which a monitor takes ten times from sample to sample."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.shift = InputShift()

    def __call__(self) -> None:
        self.shift.take(0, ((self.images,), {}))


class Delve(Step):
    """The covariance of the outputs of every convolution and linear layer, and how many directions hold 99% of it."""

    def __init__(self, name: str, every: int) -> None:
        super().__init__(name, every)
        import delve

        self.folder = tempfile.TemporaryDirectory()
        self.tracker = delve.SaturationTracker(
            self.folder.name, "csv", self.model, stats=["lsat"], log_interval=every, device="cpu"
        )

    def __call__(self) -> None:
        super().__call__()
        if self.every != NEVER:
            self.tracker.add_saturations()

    def close(self) -> None:
        """End its files."""
        self.tracker.close()
        self.folder.cleanup()


class Cockpit(Step):
    """Gradients of single samples, by BackPACK, and what follows from them for the size of steps and batches."""

    def __init__(self, name: str, every: int) -> None:
        super().__init__(name, every)
        import backpack
        import cockpit
        from cockpit.utils import schedules
        from cockpit.utils.configuration import configuration

        self.step, self.loss = 0, backpack.extend(nn.CrossEntropyLoss())
        backpack.extend(self.model)
        quantities = configuration("economy", track_schedule=schedules.linear(every, every - 1))
        self.cockpit = cockpit.Cockpit(self.model.parameters(), quantities)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        scores = self.model(self.images)
        loss = self.loss(scores, self.targets)
        single = F.cross_entropy(scores, self.targets, reduction="none")
        told = {"batch_size": BATCH_SIZE, "individual_losses": single, "loss": loss, "optimizer": self.optimizer}
        with self.cockpit(self.step, info=told):
            loss.backward()
        self.optimizer.step()
        self.step += 1


TOOLS: dict[str, type[Step]] = {"bnprobe": Watched, "delve": Delve, "cockpit-for-pytorch": Cockpit}


def rows(names: tuple[str, ...], rounds: int) -> list[Row]:
    """Time and memory for each network."""
    with _quiet():
        return [row for name in names for row in _network(name, rounds)]


def _network(name: str, rounds: int) -> list[Row]:
    steps, found = {"plain": Step(name), "inputs": Inputs(name)}, []
    for tool, kind in TOOLS.items():
        try:
            both = {f"{tool}, {words}": kind(name, every) for words, every in (("not", NEVER), ("sampled", 1))}
            for step in both.values():
                step()  # the first step of a monitor is not sampled
                step()
        except Exception as error:  # another tool may fail in any way, and the others still run
            reason = (str(error).splitlines() or [""])[0]
            found.append(Row(f"{name}, {tool}", f"does not run here: {type(error).__name__}: {reason}"[:110]))
        else:
            steps.update(both)
    times = interleave(steps, rounds, torch.device("cpu"), processor=True)
    for step in steps.values():
        step.close()
    here = [tool for tool in TOOLS if f"{tool}, sampled" in steps]
    memory = {tool: _peak_in_fresh_process(name, tool) for tool in ("plain", *here)}
    for tool in here:
        sample = times.ratio(f"{tool}, sampled", "plain") - 1
        inputs = PARTS * times.ratio("inputs", "plain") if tool == "bnprobe" else 0.0
        average = (sample + inputs) / EVERY
        goal = (f"at most {GOAL:.0%}", average <= GOAL) if tool == "bnprobe" else ("", None)
        version = "" if tool == "bnprobe" else f" {importlib.metadata.version(tool)}"
        milliseconds = " / ".join(f"{1e3 * times.median(each):.0f} ms" for each in (f"{tool}, sampled", "plain"))
        mebibytes = f"{memory[tool]:.0f} / {memory['plain']:.0f} MiB"
        what = f"{name}, {tool}{version}"
        found += [
            Row(f"{what}: a sample, in steps", f"{sample:.2f} ({milliseconds})"),
            Row(
                f"{what}: a step that is not sampled / of a loop without",
                f"{times.ratio(f'{tool}, not', 'plain'):.3f} x",
            ),
            *([Row(f"{what}: the inputs, from sample to sample, in steps", f"{inputs:.3f}")] if inputs else []),
            Row(f"{what}: at every={EVERY} on average, of a step", f"{average:.2%}", *goal),
            Row(f"{what}: peak memory / of a loop without", f"{memory[tool] / memory['plain']:.2f} x ({mebibytes})"),
        ]
    return found


def _peak_in_fresh_process(name: str, tool: str) -> float:
    command = [sys.executable, "-m", "benchmarks.monitor.cost", name, tool]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def peak(name: str, tool: str, steps: int = 4) -> float:
    """Peak memory of this process in MiB after some steps, all of them but the first sampled."""
    with _quiet():
        step = TOOLS[tool](name, 1) if tool in TOOLS else Step(name)
        for _ in range(steps):
            step()
        return _peak_mebibytes(torch.device("cpu"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(peak(*sys.argv[1:])))
