"""Training jobs for tests, also in processes that are killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bnprobe.files
from bnprobe.config.spec import RenormSpec, TrainSpec
from bnprobe.loading.data import BatchSource, as_batch_source
from bnprobe.nn.batch_renorm import BatchRenorm1d
from bnprobe.records import Score, TrainingStep
from bnprobe.training import Job, StepLog, TrainingOutcome, evaluate, train
from bnprobe.training.log import COLUMNS
from support.processes import FORKING

CPU = torch.device("cpu")
FEATURES, CLASSES = 6, 3


class Noisy(Dataset[tuple[Tensor, int]]):
    """Images with noise of every generator there is."""

    def __init__(self, images: int = 40, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(images, FEATURES, generator=generator)
        self.labels = (self.images @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
        self.noise = noise
        self.own = np.random.default_rng(3)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = random.gauss(0, 1) + float(np.random.randn()) + float(self.own.normal())
        noise = torch.randn(FEATURES) + drawn
        return self.images[index] + self.noise * noise, int(self.labels[index])


def source(batch_size: int = 4, images: int = 40, noise: float = 0.1, **options: Any) -> BatchSource:
    """Shuffled micro-batches with noise."""
    return as_batch_source(DataLoader(Noisy(images, noise), batch_size=batch_size, shuffle=True, **options))


def network(norm: Callable[[int], nn.Module] = nn.BatchNorm1d, dropout: float = 0.2, seed: int = 0) -> nn.Sequential:
    """A small classifier in train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, 8),
            norm(8),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(8, 8),
            norm(8),
            nn.Tanh(),
            nn.Linear(8, CLASSES),
        )


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The loss."""
    return F.cross_entropy(model(batch[0]), torch.as_tensor(batch[1]))


def held_out_score(model: nn.Module) -> Score:
    """Loss on all images without noise, at inference, by a loss that is as rude as a user's: it draws."""
    data = Noisy()
    return evaluate(model, [(data.images, data.labels)], _drawing, None, CPU, None)


def _drawing(model: nn.Module, batch: Any) -> Tensor:
    torch.rand(3)
    return cross_entropy(model, batch)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def job(model: nn.Module | None = None, **changes: Any) -> Job:
    """A job; ``changes`` are fields of ``Job``, or of ``TrainSpec``."""
    fields: dict[str, Any] = {
        "model": network() if model is None else model,
        "loss": cross_entropy,
        "source": source(),
        "seed": 0,
        "device": CPU,
        "autocast": None,
        "make_optimizer": sgd,
        "make_schedule": None,
        "score": None,
        "measure": "loss",
        "goal": "max",
        "renorm": None,
        "arm": "BN fine-tuned",
    }
    spec = {name: changes.pop(name) for name in list(changes) if name in TrainSpec.model_fields}
    return Job(**{**fields, "spec": TrainSpec(**{"steps": 12, **spec}), **changes})


@dataclass
class Steps:
    """Collects what ``on_step`` is given."""

    steps: list[TrainingStep]

    def __call__(self, step: TrainingStep) -> None:
        self.steps.append(step)


def trained(job: Job, state: Path | None = None) -> tuple[TrainingOutcome, list[TrainingStep]]:
    """What training gives, and its steps."""
    steps = Steps([])
    return train(job, state=state, on_step=steps), steps.steps


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets of weights are identical."""
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def eventful_job(optimizer: str) -> Job:
    """Everything at once that a resumed run must bring back."""
    torch.manual_seed(11)  # resumed or not, what was drawn before must not matter
    return job(
        network(BatchRenorm1d),
        source=source(generator=torch.Generator().manual_seed(9)),
        steps=40,
        accumulate=2,
        clip_norm=1.0,
        evaluate_every=3,
        patience=4,
        save_every=2,
        renorm=RenormSpec(warmup=0.1, r_ramp=0.5, d_ramp=0.4),
        score=held_out_score,
        make_optimizer=sgd if optimizer == "SGD" else lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        make_schedule=lambda made: torch.optim.lr_scheduler.CosineAnnealingLR(made, T_max=40),
        arm="batch-renorm",
    )


def _die_at(moment: str, number: int) -> Callable[[TrainingStep], None]:
    """Have this process killed by SIGKILL: in the n-th write of a file, between two steps, or never."""
    seen = 0

    def die_in_turn(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "write":
        bnprobe.files.os.fsync = die_in_turn  # the neighbour is written, and not yet in place
    return die_in_turn if moment == "step" else lambda step: None


def _train_in(folder: Path, optimizer: str, moment: str, number: int) -> None:
    """Train, or go on, in a folder; a run that ends writes its weights there."""
    log = StepLog(folder / "log.csv")
    die = _die_at(moment, number)

    def on_step(step: TrainingStep) -> None:
        log.write(step)
        die(step)

    outcome = train(eventful_job(optimizer), state=folder / "state", on_step=on_step)
    curve = dataclasses.astuple(outcome.curve) if outcome.curve else ()
    summary = (outcome.steps, outcome.best_step, outcome.ending, outcome.clipped_r, outcome.clipped_d, *curve)
    torch.save({"weights": outcome.weights, "summary": summary}, folder / "result")


def _kill_later(child: int, log: Path, before: int, milliseconds: int) -> None:
    """Kill a process so long after its log has grown."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if log.exists() and log.stat().st_size > before:
            time.sleep(milliseconds / 1000)
            os.kill(child, signal.SIGKILL)
            return
        time.sleep(0.001)


def _in_a_process(folder: Path, optimizer: str, moment: str, number: int) -> int:
    """One attempt in a process of its own; its exit status, or minus the signal that killed it."""
    log = folder / "log.csv"
    before = log.stat().st_size if log.exists() else len(",".join(COLUMNS)) + 1
    child = os.fork()
    if not child:
        try:
            _train_in(folder, optimizer, moment, number)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if moment == "time":
        _kill_later(child, log, before, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempts(folder: Path, optimizer: str, *moments: str) -> list[int]:
    """Train in a folder in processes that are killed at these moments; their exit statuses.

    Args:
        folder: Where the states, the log and the result are; it is made.
        optimizer: "SGD" or "AdamW".
        moments: "step:6", "write:2", "time:9" (milliseconds after the first step) or "never:0".
    """
    folder.mkdir(exist_ok=True)
    process = FORKING.Process(target=_attempt_all, args=(folder, optimizer, moments))
    process.start()
    process.join()
    assert process.exitcode == 0
    statuses: list[int] = json.loads((folder / "statuses.json").read_text())
    return statuses


def _attempt_all(folder: Path, optimizer: str, moments: tuple[str, ...]) -> None:
    """In a process without threads, from which each attempt is forked."""
    torch.set_num_threads(1)
    sgd(list(network().parameters()))  # loads what torch loads late
    statuses = [_in_a_process(folder, optimizer, *_moment(moment)) for moment in moments]
    (folder / "statuses.json").write_text(json.dumps(statuses))


def _moment(text: str) -> tuple[str, int]:
    moment, _, number = text.partition(":")
    return moment, int(number)
