"""Real training steps on a copy: how often, and how far, they move the running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.errors import DataError, UsageError
from bnprobe.measure.hooks import Intercepted
from bnprobe.measure.layers import ProbedLayer
from bnprobe.measure.norms import NormCall, NormInfo
from bnprobe.measure.session import Session, model_code
from bnprobe.measure.training_copy import TrainingCopy, call_moments, training
from bnprobe.records import Updates
from bnprobe.stats.moments import statistics_distance
from bnprobe.wording import option

MakeOptimizer = Callable[[list[nn.Parameter]], Any]
"""Makes an optimizer for the parameters to train."""

SAME_BATCH = 1e-4
"""Distance of two calls' batch statistics, in standard deviations, below which they are of the same values: rounding
is far below it, the chance between batches of even 10^6 values above."""

_ROUNDINGS = 64.0
"""The batch mean must differ from the running mean by more than this many rounding errors to estimate a rate."""


@dataclass(frozen=True)
class TrainSteps:
    """What training steps showed, by index of the layer.

    Attributes:
        updates: Of the layers that keep running statistics and were called.
        repeated: Those of ``Updates.per_step`` with batch statistics that the same step had used before: of a
            forward pass that ran again, not of other data.
    """

    updates: Mapping[int, Updates]
    repeated: Mapping[int, float]


def train_steps(
    session: Session, micro_batches: Iterable[Any], make_optimizer: MakeOptimizer, steps: int
) -> TrainSteps:
    """Train a copy of the model and watch its running statistics. Model and random state come back bit-identical.

    Gradients are scaled where the session's autocast is float16.

    Args:
        session: The model, its layers and the user's loss.
        micro_batches: The user's, on the host; begun again when they end, if they can be.
        make_optimizer: Of the copy's trainable parameters; its errors pass unchanged.
        steps: Optimizer steps.

    Raises:
        UsageError: No loss, or a loss, model or optimizer that cannot be trained with.
        ModelError: The model cannot be copied.
        UserCodeError: The user's code raised.
        NonFiniteError: The loss became NaN or Inf; names the step and the layer.
        DataError: There is no micro-batch.
        DeviceError: Out of memory.
    """
    with training():
        trained = TrainingCopy(session, "--train-steps")
        if not trained.parameters:
            raise UsageError(
                f"{option('--train-steps')} needs parameters to train, but every parameter has requires_grad=False."
            )
        optimizer = make_optimizer(trained.parameters)
        tracks = {layer.index: _Track(layer) for layer in trained.layers}
        scaler = torch.amp.GradScaler(session.device.type, enabled=session.autocast is torch.float16)
        done = 0
        for batch in _drawn(micro_batches, steps):
            _step(trained, tracks, optimizer, scaler, batch, done + 1)
            done += 1
    if not done:
        raise DataError("The data is empty, so {option('--train-steps')} has nothing to train on.")
    watched = {index: track for index, track in tracks.items() if track.has_result}
    return TrainSteps(
        updates={index: track.result() for index, track in watched.items()},
        repeated={index: track.repeated / track.steps for index, track in watched.items()},
    )


def _drawn(micro_batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """``steps`` micro-batches, starting again from the beginning if the data ends."""
    drawn = 0
    while drawn < steps:
        before = drawn
        for batch in micro_batches:
            yield batch
            drawn += 1
            if drawn == steps:
                return
        if drawn == before:
            return


def _step(
    trained: TrainingCopy,
    tracks: Mapping[int, _Track],
    optimizer: Any,
    scaler: torch.amp.GradScaler,
    batch: Any,
    number: int,
) -> None:
    def note(found: Intercepted) -> Tensor:
        tracks[found.layer.index].note(found.call)
        return found.run()

    for track in tracks.values():
        track.begin()
    value = trained.loss(batch, note)
    trained.require_finite(value, batch, f"in training step {number} (the first is 1)", _remedy(number))
    trained.backward(scaler.scale(value), note)
    with model_code(f"calling step() of {type(optimizer).__name__}"):
        scaler.step(optimizer)
    scaler.update()
    for track in tracks.values():
        track.end()


def _remedy(number: int) -> str:
    if number == 1:
        return "This is before the first step, so check the model, its weights and the loss."
    return "Choose a smaller learning rate (lr in train.optimizer.args of the spec), or the optimizer of your training."


@dataclass
class _Track:
    """The running statistics of one layer, from step to step.

    All sums are over channels and steps, in units of running standard deviations before the step.

    Attributes:
        seen: Mean and variance of each updating call of the current step.
        along: Of (m' - m) * (mu - m).
        apart: Of (mu - m)^2, over the steps in which mu is known.
        rounding: What ``apart`` would be if rounding were all there is.
        moved: Of (m' - m)^2.
    """

    layer: ProbedLayer
    called: bool = False
    updates: int = 0
    repeated: int = 0
    steps: int = 0
    along: float = 0.0
    apart: float = 0.0
    rounding: float = 0.0
    moved: float = 0.0
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    before: tuple[NormInfo, Tensor, Tensor] | None = None

    def begin(self) -> None:
        """Keep the statistics as they are before a step."""
        self.seen.clear()
        info = self._info()
        if info.running_mean is not None and info.running_variance is not None:
            deviation = (info.running_variance.double() + info.eps).sqrt()
            self.before = info, info.running_mean.double().clone(), deviation

    def note(self, call: NormCall) -> None:
        """See one call of the layer."""
        self.called = True
        if call.training and call.running_mean is not None:
            self.seen.append(call_moments(call))

    def end(self) -> None:
        """Add what a step did."""
        if self.before is None:
            return
        info, mean, deviation = self.before
        after = self._info()
        assert after.running_mean is not None  # as it was before the step
        # Some layers do not count, and some update by another kernel than the one that is watched. The version counters
        # of the buffers say nothing: the kernel does not raise them.
        self.updates += max((after.batches_tracked or 0) - (info.batches_tracked or 0), len(self.seen))
        self.repeated += _repeats(self.seen, info.eps)
        self.steps += 1
        moved = (after.running_mean.double() - mean) / deviation
        self.moved += float(moved.square().sum())
        if self.seen:
            batch = torch.stack([each for each, _ in self.seen]).mean(0)
            apart = (batch - mean) / deviation
            self.along += float((moved * apart).sum())
            self.apart += float(apart.square().sum())
            ulp = _ROUNDINGS * torch.finfo(after.running_mean.dtype).eps
            self.rounding += float((ulp * torch.maximum(mean.abs(), batch.abs()) / deviation).square().sum())

    def result(self) -> Updates:
        """The layer's record."""
        return Updates(
            per_step=self.updates / self.steps,
            rate=self.along / self.apart if self.apart > self.rounding else None,
            configured=self.layer.info.momentum,
            drift=(self.moved / (self.steps * self.layer.info.channels)) ** 0.5,
        )

    @property
    def has_result(self) -> bool:
        """Whether the layer keeps running statistics, and a step called it."""
        return self.before is not None and (self.called or self.updates > 0)

    def _info(self) -> NormInfo:
        return self.layer.family.describe(self.layer.module)


def _repeats(seen: Sequence[tuple[Tensor, Tensor]], eps: float) -> int:
    """Calls whose batch statistics are those of an earlier call."""
    rows = [(mean[None], variance[None]) for mean, variance in seen]
    return sum(
        any(statistics_distance(*rows[number], *earlier, eps) < SAME_BATCH for earlier in rows[:number])
        for number in range(len(rows))
    )
