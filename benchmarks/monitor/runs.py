"""A training run that a monitor watches, from the seed to what the monitor said and what the network is worth."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnprobe
from benchmarks.faults.architectures import ARCHITECTURES
from benchmarks.faults.networks import NETWORKS, Network
from benchmarks.faults.samples import Batch, Sampling, batches

EVERY = 10
"""Optimizer steps from sample to sample."""

STEPS = 450
"""Of a run."""

SCORED = 2000
"""Held-out samples that score at most."""

NETS = {"mlp": (8, 2), "points": (6, 1), "plain": (2, 1), "residual": (1, 1)}
"""Of `benchmarks.faults`: a table with BatchNorm1d, clouds that a generator makes, and two for digits; and the seeds of
healthy and of faulty runs, fewer where a step takes longer."""

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        optimizer: "sgd", with momentum 0.9, or "adam".
        rate: The highest learning rate.
        schedule: "constant"; "drops": a tenth after half and again after three quarters; "cosine": after a warm-up.
        batch_size: Samples.
        momentum: Of the running averages.
        weight_decay: As the optimizer has it.
        augment: What is done to each batch of inputs; None: nothing.
    """

    optimizer: str = "sgd"
    rate: float = 0.02
    schedule: str = "constant"
    batch_size: int = 32
    momentum: float = 0.1
    weight_decay: float = 0.0
    augment: Change | None = None

    def rate_at(self, part: float) -> float:
        """The learning rate after this part of the run."""
        if self.schedule == "drops":
            return self.rate * 0.1 ** ((part >= 0.5) + (part >= 0.75))
        if self.schedule == "cosine":
            return self.rate * min(10 * part, 0.5 + 0.5 * math.cos(math.pi * part))
        return self.rate


@dataclass
class Loop:
    """A training loop, between two steps of which a fault may change it.

    Attributes:
        network: What is trained, with its data.
        model: The network's, in train mode.
        seed: Of all that is drawn.
        batch_size: Samples.
        drawn: The batches to come.
        prepare: What is done to the inputs of a batch.
        extra: Called with the model and each batch, before its step; None: nothing is.
    """

    network: Network
    model: nn.Module
    seed: int
    batch_size: int
    drawn: Iterator[Batch]
    prepare: list[Change] = field(default_factory=list)
    extra: Callable[[nn.Module, Batch], object] | None = None

    def batches(self, **sampling: Any) -> Iterator[Batch]:
        """Training batches; ``sampling`` says what differs from the present ones."""
        given = {"batch_size": self.batch_size, "seed": self.seed, **sampling}
        return batches(self.network.data().training, Sampling(**given))

    def batch(self) -> Batch:
        """The next one."""
        inputs, targets = next(self.drawn)
        for change in self.prepare:
            inputs = change(inputs)
        return inputs, targets

    def norms(self) -> list[nn.Module]:
        """The BN layers."""
        return [each for each in self.model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


Fault = Callable[[Loop], object]
"""Changes the loop; what it returns, if that can be called, takes the change back after two thirds of the run."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        network, seed, what, steps: Of the run; ``what`` is the condition, or the fault with its strength.
        begin: Steps before the fault; None: there is none.
        alarms: Steps before each alarm, and the series that raised it.
        findings: Step of the alarm, and the rule.
        accuracy: On held-out samples, in eval mode.
        gap: Accuracy with the statistics of held-out batches less that.
        problem: Why the monitor stopped, if it did.
        seconds: That the run took.
    """

    network: str
    seed: int
    what: str
    steps: int
    begin: int | None
    alarms: list[tuple[int, list[str]]]
    findings: list[tuple[int, str]]
    accuracy: float
    gap: float
    problem: str | None
    seconds: float


def run(network: str, seed: int, what: str, recipe: Recipe, fault: Fault | None = None, steps: int = STEPS) -> Outcome:
    """Train under a monitor; a fault begins after a third of the steps."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    loop = loop_of(network, seed, recipe)
    optimizer = _optimizer(loop.model, recipe)
    begin, end = steps // 3, 2 * steps // 3
    back: object = None
    events: list[dict[str, Any]] = []
    with (
        warnings.catch_warnings(record=True) as said,
        bnprobe.Monitor(loop.model, EVERY, log=events.append, on_finding=lambda *_: None) as monitor,
    ):
        warnings.simplefilter("always")
        for step in range(steps):
            if fault is not None and step == begin:
                back = fault(loop)
            if callable(back) and step == end:
                back()
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step / steps)
            batch = loop.batch()
            if loop.extra is not None:
                loop.extra(loop.model, batch)
            optimizer.zero_grad()
            loop.network.loss(loop.model, batch).backward()
            optimizer.step()
    accuracy = score(loop, training=False)
    return Outcome(
        network,
        seed,
        what,
        steps,
        begin if fault else None,
        [(each["step"], each["series"]) for each in events if each["event"] == "alarm"],
        [(each.alarm, each.rule) for each in monitor.findings],
        accuracy,
        score(loop, training=True) - accuracy,
        next((str(each.message) for each in said if "Monitor stopped" in str(each.message)), None),
        time.perf_counter() - started,
    )


def loop_of(network: str, seed: int, recipe: Recipe) -> Loop:
    """As it begins."""
    model = ARCHITECTURES[network]()
    if network == "residual":  # behind all BN layers, where it does them no harm
        model.head = nn.Sequential(nn.Dropout(0.2), model.head)
    loop = Loop(NETWORKS[network], model, seed, recipe.batch_size, iter(()))
    for norm in loop.norms():
        norm.momentum = recipe.momentum
    loop.drawn = loop.batches()
    loop.prepare = [recipe.augment] if recipe.augment else []
    return loop


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), recipe.rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(model.parameters(), recipe.rate, 0.9, weight_decay=recipe.weight_decay)


@torch.no_grad()
def score(loop: Loop, training: bool) -> float:
    """Accuracy on held-out samples in eval mode, or with the statistics of all of them in place of the running ones."""
    held_out = loop.network.data().held_out
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(held_out), generator=generator)[:SCORED]
    loop.model.eval()
    for norm in loop.norms():
        norm.train(training)
    found: Tensor = loop.network.metric(loop.model, (held_out.inputs[rows], held_out.targets[rows]))
    return float(found)


def shifted(inputs: Tensor) -> Tensor:
    """Images (N, C, H, W), each moved by up to a pixel; anything else is scaled by up to a tenth."""
    if inputs.dim() < 4:
        return inputs * (0.9 + 0.2 * torch.rand(len(inputs), *[1] * (inputs.dim() - 1)))
    padded, (height, width) = F.pad(inputs, (1, 1, 1, 1)), inputs.shape[2:]
    moves = torch.randint(3, (len(inputs), 2)).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, moves, strict=True)])


def noisy(amount: float) -> Change:
    """Noise, drawn anew for every batch, in standard deviations of the inputs."""
    return lambda inputs: inputs + amount * inputs.std() * torch.randn_like(inputs)


BASE = "SGD 0.02"

HEALTHY = {
    BASE: Recipe(),
    "SGD 0.1": Recipe(rate=0.1),
    "rate drops": Recipe(schedule="drops"),
    "warm-up and cosine": Recipe(schedule="cosine"),
    "Adam 0.001": Recipe(optimizer="adam", rate=0.001),
    "Adam 0.001, cosine": Recipe(optimizer="adam", rate=0.001, schedule="cosine"),
    "inputs moved": Recipe(augment=shifted),
    "inputs noisy": Recipe(augment=noisy(0.3)),
    "batches of 16": Recipe(batch_size=16),
    "batches of 64": Recipe(batch_size=64),
    "momentum 0.01": Recipe(momentum=0.01),
    "weight decay 0.005": Recipe(weight_decay=0.005),
}
"""Conditions without a fault: all of them are the first one, with one thing changed, in which faults begin, too."""
