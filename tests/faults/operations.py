"""What is done with a model, and what of it may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

import bnprobe
from bnprobe.analysis.momentum import MomentumPlan

from .kinds import COUNT, Subject, images


@dataclass(frozen=True)
class Operation:
    """A call of bnprobe.

    Attributes:
        run: Does it.
        changes: What it may change, if it ends well.
    """

    run: Callable[[Subject], Any]
    changes: Literal["nothing", "statistics", "all"] = "nothing"


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return _forward(model, batch).square().mean()


def _metric(model: nn.Module, batch: Any) -> torch.Tensor:
    return _forward(model, batch).mean()


def _forward(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def _scan(**options: Any) -> Callable[[Subject], Any]:
    return lambda subject: bnprobe.scan(subject.model, subject.batches(), 2, num_batches=COUNT, **options)


def _everything(subject: Subject) -> Any:
    return bnprobe.scan(
        subject.model,
        subject.batches(),
        2,
        num_batches=COUNT,
        evaluation=images(),
        forward=_forward,
        loss=_loss,
        metric=_metric,
        train_steps=3,
        gradients=True,
        what_if=True,
    )


def _sweep(subject: Subject) -> Any:
    return bnprobe.sweep(subject.model, subject.batches(), 2, batch_sizes=(4,), num_batches=COUNT)


def _momentum(subject: Subject) -> Any:
    return bnprobe.sweep(subject.model, images(16), 2, batch_sizes=(), momentum=MomentumPlan((0.1, 0.5)))


def _recalibrate(path: Literal["train", "eval"]) -> Callable[[Subject], Any]:
    return lambda subject: bnprobe.recalibrate(subject.model, subject.batches(), path=path)


def _convert_in_place(subject: Subject) -> None:
    bnprobe.convert(subject.model, to="frozen", inplace=True)


OPERATIONS: dict[str, Operation] = {
    "scan": Operation(_scan()),
    "scan, one by one": Operation(_scan(emulate=False)),
    "scan, autocast": Operation(_scan(autocast="bfloat16")),
    "scan, everything": Operation(_everything),
    "sweep": Operation(_sweep),
    "sweep, momentum": Operation(_momentum),
    "lint": Operation(lambda subject: bnprobe.lint(subject.model)),
    "recalibrate": Operation(_recalibrate("train"), changes="statistics"),
    "recalibrate, eval": Operation(_recalibrate("eval"), changes="statistics"),
    "convert in place": Operation(_convert_in_place, changes="all"),
    "convert": Operation(lambda subject: bnprobe.convert(subject.model, to="batch-renorm")),
    "deployable_state": Operation(
        lambda subject: bnprobe.deployable_state(bnprobe.convert(subject.model, to="frozen"), subject.model)
    ),
}
