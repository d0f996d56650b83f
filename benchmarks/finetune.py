"""A step of ``convert --finetune`` beside one of the loop that a user would write with the same model.

Both train a network whose layers were converted to Batch Renorm, each a copy of its own, with the same optimizer, loss
and data. A step of one follows a step of the other in one process, so that both find the same caches and the same heap.
The loop has no log, measures no clipping, and would take a step with a gradient of NaN.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnprobe
from benchmarks.contenders import loss
from benchmarks.networks import CLASSES, NETWORKS
from benchmarks.setting import Setting
from benchmarks.tables import Row, at_most
from benchmarks.timing import clock
from bnprobe.config.spec import RenormSpec, TrainSpec
from bnprobe.loading.data import as_batch_source
from bnprobe.nn.limits import RenormSchedule
from bnprobe.records import TrainingStep
from bnprobe.training import Job, StepLog, train

GOAL = 1.05
IMAGE_SIZE, IMAGES, BATCH_SIZES = 64, 512, (2, 32)
"""The data; a round is an epoch."""


def small() -> nn.Module:
    """Two convolutions with BN on 64x64 images: a step takes a few milliseconds."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)),
    )


def rows(setting: Setting) -> list[Row]:
    """One for each network and batch size."""
    networks: dict[str, Callable[[], nn.Module]] = {"small network": small}
    networks |= {name: NETWORKS[name] for name in setting.networks}
    return [_row(setting, name, make, size) for name, make in networks.items() for size in BATCH_SIZES]


def _row(setting: Setting, name: str, make: Callable[[], nn.Module], batch_size: int) -> Row:
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE)
    loader = DataLoader(TensorDataset(images, torch.randint(CLASSES, (IMAGES,))), batch_size, shuffle=True)
    model = bnprobe.convert(make().to(setting.device), layers=["*"], to="batch-renorm")
    steps = IMAGES // batch_size
    ours, theirs = (
        [sum(seconds[start : start + steps]) / steps for start in range(steps, len(seconds), steps)]  # not the first
        for seconds in _seconds(model, loader, steps * (1 + setting.rounds), setting.device)
    )
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    detail = " / ".join(f"{1e3 * statistics.median(each):.2f} ms" for each in (ours, theirs))
    return at_most(f"{name}, batch size {batch_size}, step of convert --finetune / of a loop", ratio, GOAL, detail)


def _seconds(
    model: nn.Module, loader: DataLoader[Any], steps: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of each step in ``train`` with its log, and of each step of the loop."""
    by_hand = _loop(copy.deepcopy(model), loader, steps, device)
    ours: list[float] = []
    theirs: list[float] = []
    began = 0.0

    def on_step(step: TrainingStep) -> None:
        nonlocal began
        log.write(step)
        ours.append(clock(device) - began)
        began = clock(device)
        next(by_hand)
        theirs.append(clock(device) - began)
        began = clock(device)

    job = Job(
        model=model.train(),
        loss=loss,
        source=as_batch_source(loader),
        spec=TrainSpec(steps=steps, evaluate_every=steps),
        seed=0,
        device=device,
        autocast=None,
        make_optimizer=_optimizer,
        make_schedule=None,
        score=None,
        measure="loss",
        goal="min",
        renorm=RenormSpec(),
        arm="batch-renorm",
    )
    with tempfile.TemporaryDirectory() as folder:
        log = StepLog(Path(folder) / "log.csv")
        train(job, state=None, on_step=on_step)
        log.close()
    return ours, theirs


def _loop(model: nn.Module, loader: DataLoader[Any], steps: int, device: torch.device) -> Iterator[None]:
    """What a user would write; a step for each item."""
    optimizer = _optimizer(list(model.train().parameters()))
    schedule = RenormSchedule(steps, **RenormSpec().model_dump(exclude={"momentum"}))
    schedule.attach(model)
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            loss(model, (images.to(device), labels.to(device))).backward()
            optimizer.step()
            schedule.advance()
            yield


def _optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
