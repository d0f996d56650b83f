"""Cases for several processes that train together, and what each of them finds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnprobe.nn
from bnprobe import convert
from bnprobe.distributed import World, connected
from bnprobe.errors import BnprobeError
from bnprobe.loading.data import as_batch_source
from bnprobe.nn.batch_renorm import BatchRenorm1d, SyncBatchRenorm
from bnprobe.nn.frozen import FrozenBatchNorm1d
from bnprobe.nn.ghost import GhostBatchNorm1d
from bnprobe.nn.moving_average import MovingAverageBatchNorm1d
from bnprobe.nn.per_domain import DomainBatchNorm1d
from bnprobe.training import Job, train
from bnprobe.training.job import weights_of
from support.finetuning import Noisy, Steps, cross_entropy, held_out_score, job, network, source
from support.processes import run_together


def launch(folder: Path, size: int = 2) -> dict[str, list[Any]]:
    """Run all cases in so many processes: by case what each process saved, or the text of its error."""
    run_together(size, _work, folder)
    saved = [torch.load(folder / str(rank), weights_only=True) for rank in range(size)]
    return {case: [found[case] for found in saved] for case in CASES}


def synced(channels: int) -> nn.Module:
    return SyncBatchRenorm(channels, momentum=0.1, r_max=1.0, d_max=0.0)


def frozen(channels: int) -> nn.Module:
    layer = FrozenBatchNorm1d(channels)
    layer.running_mean.fill_(0.1)
    layer.running_var.fill_(0.7)
    return layer


def cumulative(channels: int) -> nn.Module:
    return nn.BatchNorm1d(channels, momentum=None)


def renorm(channels: int) -> nn.Module:
    return BatchRenorm1d(channels, momentum=0.3)


def ghost(channels: int) -> nn.Module:
    return GhostBatchNorm1d(channels, momentum=0.3, virtual_batch_size=3)


def moving(channels: int) -> nn.Module:
    return MovingAverageBatchNorm1d(channels, momentum=0.3, window=5)


def domains(channels: int) -> nn.Module:
    return DomainBatchNorm1d(channels, momentum=0.3, domains=3)


def cumulative_domains(channels: int) -> nn.Module:
    return DomainBatchNorm1d(channels, momentum=None, domains=3)


def by_label(model: nn.Module, batch: Any) -> Tensor:
    """The label of an image is its domain: often one process has a domain and the other one has not."""
    with bnprobe.nn.domain(batch[1]):
        return cross_entropy(model, batch)


class PerImage(nn.InstanceNorm1d):
    """Takes (images, channels) for four positions of fewer channels."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.unflatten(1, (-1, 4))).flatten(1)


def instance(channels: int) -> nn.Module:
    return PerImage(channels // 4, track_running_stats=True)


def ordered(batch_size: int, images: int = 40) -> Any:
    """The same images in the same order, whatever the batch size."""
    return as_batch_source(torch.utils.data.DataLoader(Noisy(images, noise=0.0), batch_size))


class Tracking(nn.Module):
    """Has a buffer that every process fills with its own, and a layer that only some micro-batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.seldom, self.unused = network(dropout=0.3), nn.BatchNorm1d(6), nn.Linear(2, 2)
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.last.copy_(x[0])
        return self.body(self.seldom(x) if x[0, 0] > 0 else x)


def still(norm: Callable[[int], nn.Module], batch_size: int, images: int = 39, **changes: Any) -> Job:
    """Weights that stay as they are: what the first layer sees does not depend on how anything is normalized.

    Of 39 images the last micro-batch is smaller than the others.
    """
    model, data = network(norm, dropout=0.0), ordered(batch_size, images)
    return job(model, source=data, make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), **changes)


def without_noise(size: int, **changes: Any) -> Job:
    return job(source=ordered(size), **changes)


def _going_past(model: Any, batch: Any) -> Tensor:
    """Calls parts of the model, not the model."""
    return nn.functional.cross_entropy(model.body(batch[0]), batch[1])


def _stopping(model: nn.Module, batch: Any) -> Tensor:
    """The second process is told to stop in its third step."""
    _stopping.calls += 1
    if os.environ["RANK"] == "1" and _stopping.calls == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return cross_entropy(model, batch)


_stopping.calls = 0

NORMS = (nn.BatchNorm1d, cumulative, renorm, synced, frozen, instance)

CASES: dict[str, Callable[[], Job]] = {
    "synced": lambda: without_noise(4, model=network(synced, dropout=0.0)),
    "frozen": lambda: without_noise(4, model=network(frozen, dropout=0.0)),
    "accumulated": lambda: without_noise(2, model=network(frozen, dropout=0.0), accumulate=2, clip_norm=0.5),
    "plain": lambda: job(Tracking(), source=source(images=39), score=held_out_score, steps=15),
    "one step": lambda: without_noise(4, steps=1),
    **{f"still {norm.__name__}": partial(still, norm, 4) for norm in NORMS},
    "ghosts": lambda: without_noise(4, model=network(ghost, dropout=0.0), steps=1),
    "ghosts, uneven": lambda: job(network(ghost, dropout=0.0), source=ordered(4, images=7), steps=1),
    "cross-iteration": lambda: without_noise(4, model=convert(network(dropout=0.0), to="cross-iteration", window=3)),
    **{f"still {norm.__name__}": partial(still, norm, 2, 40, loss=by_label) for norm in (domains, cumulative_domains)},
    "still moving": lambda: still(moving, 4),
    "moving": lambda: without_noise(4, model=network(moving, dropout=0.0), steps=1),
    "still single": lambda: still(renorm, 1, images=8, steps=4),
    "still accumulated": lambda: still(nn.BatchNorm1d, 2, images=40, accumulate=3),
    "parts": lambda: job(Tracking(), loss=_going_past),
    "stopping": lambda: job(loss=_stopping),
    "resumed": lambda: job(),
    "whole": lambda: job(),
    "diverging": lambda: job(network(synced), loss=lambda model, batch: cross_entropy(model, batch) + _inf()),
}


def _inf() -> float:
    return torch.inf if os.environ["RANK"] == "1" else 0.0


def outcome_of(case: str, folder: Path, world: World) -> Any:
    """Train, and say what came of it."""
    steps, made = Steps([]), CASES[case]()
    state = folder / "state" if case in ("stopping", "resumed") else None
    try:
        outcome = train(made, state=state, on_step=steps, world=world)
    except BnprobeError as error:
        return f"{type(error).__name__}: {error}"
    return {
        "weights": outcome.weights,
        "model": weights_of(made.model),
        "summary": (outcome.steps, outcome.best_step, outcome.ending, outcome.note),
        "losses": [step.loss for step in steps.steps],
    }


def _work(folder: Path) -> None:
    """Run all cases, one after the other."""
    with connected() as world:
        found = {case: outcome_of(case, folder, world) for case in CASES}
        torch.save(found, folder / str(world.rank))
