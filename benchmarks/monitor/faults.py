"""Faults that begin in a run which was healthy until then, by name and strength."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.faults.samples import Batch
from benchmarks.faults.shifts import brightness, contrast
from benchmarks.monitor.runs import Change, Fault, Loop, noisy


def shrink(loop: Loop, size: int) -> None:
    """Batches of so few samples."""
    loop.drawn = loop.batches(batch_size=size)


def sort(loop: Loop, part: float) -> None:
    """This part of every batch is of one class."""
    grouped = round(part * loop.batch_size)
    alike = loop.batches(batch_size=grouped, order="grouped")
    loop.drawn = alike if part == 1 else _joined(alike, loop.batches(batch_size=loop.batch_size - grouped))


def _joined(one: Iterator[Batch], other: Iterator[Batch]) -> Iterator[Batch]:
    for left, right in zip(one, other, strict=False):
        yield torch.cat([left[0], right[0]]), torch.cat([left[1], right[1]])


def shift(loop: Loop, change: Change, returns: bool = False) -> object:
    """Inputs of another domain."""
    loop.prepare.append(change)
    return loop.prepare.pop if returns else None


def slow(loop: Loop, momentum: float) -> None:
    """Running averages that take up little of a batch."""
    for norm in loop.norms():
        norm.momentum = momentum


@torch.no_grad()
def poison(loop: Loop, factor: float) -> None:
    """One batch of huge values, whose step was skipped as a GradScaler does."""
    inputs, _ = loop.batch()
    loop.model(inputs * factor)


def freeze(loop: Loop, part: float) -> None:
    """The first layers stay in eval mode from now on, and the weights in front of them train."""
    norms = loop.norms()
    for norm in norms[: round(part * len(norms))]:
        norm.eval()


def forward_twice(loop: Loop, change: Change | None = None) -> None:
    """A second forward in train mode, of the same batch or of a changed one, as for a log or a second view."""

    def extra(model: nn.Module, batch: Batch) -> None:
        with torch.no_grad():
            model(batch[0] if change is None else change(batch[0]))

    loop.extra = extra


def recompute(loop: Loop) -> None:
    """Activations are computed again in the backward pass, which updates the statistics a second time."""
    inner: nn.Module = getattr(loop.model, "units", None) or loop.model.blocks
    inner.forward = partial(checkpoint, inner.forward, use_reentrant=True)
    loop.prepare.append(_with_gradient)


def _with_gradient(inputs: Tensor) -> Tensor:
    return inputs.requires_grad_()


FAULTS: dict[str, Fault] = {
    **{f"batches shrink to {size}": partial(shrink, size=size) for size in (8, 4, 2)},
    **{
        f"{words} of every batch of one class": partial(sort, part=part)
        for words, part in {"a quarter": 0.25, "half": 0.5, "all": 1.0}.items()
    },
    **{
        f"domain shifts, {words}{back}": partial(shift, change=change, returns=bool(back))
        for words, change, ways in (
            ("brightness by 0.5", brightness(0.5), ("",)),
            ("brightness by 1", brightness(1.0), ("", ", and back")),
            ("contrast to 0.5", contrast(0.5), ("",)),
            ("noise of 1", noisy(1.0), ("", ", and back")),
        )
        for back in ways
    },
    **{f"momentum becomes {momentum:g}": partial(slow, momentum=momentum) for momentum in (0.01, 0.001)},
    **{f"one batch times {factor:g}": partial(poison, factor=factor) for factor in (10.0, 1e4, float("inf"))},
    **{
        f"{words} in eval mode": partial(freeze, part=part)
        for words, part in {"first half of the layers": 0.5, "all layers": 1.0}.items()
    },
    "second forward of the batch": forward_twice,
    "second forward, noise of 1": partial(forward_twice, change=noisy(1.0)),
    "recomputed in the backward pass": recompute,
}
"""By name, with the strength."""
