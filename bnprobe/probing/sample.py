"""A few micro-batches on the eval path, and how far outputs differ there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnprobe.probing.batches import join, tensors_of
from bnprobe.probing.chunks import Chunks
from bnprobe.probing.emulation import Emulation
from bnprobe.probing.intercept import Pass, Recorded
from bnprobe.probing.layers import ProbedLayer
from bnprobe.probing.replay import Outputs
from bnprobe.probing.runner import Runner
from bnprobe.probing.score import pass_of
from bnprobe.stats.mismatch import Corrections, corrections
from bnprobe.stats.moments import pool_moments

Result = TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """What is run.

    Attributes:
        runner: Installed.
        micro_batches: Of ``batch_size`` images, on the device.
        emulation: Whether they may run together.
        at_once: How many do.
    """

    runner: Runner
    micro_batches: Sequence[Any]
    batch_size: int
    emulation: Emulation
    at_once: int

    def in_chunks(self, run: Callable[[Any, list[Any]], Result]) -> list[Result]:
        """Call ``run`` on physical batches, each with the micro-batches in it."""

        def joined(chunk: list[Any]) -> Result:
            return run(join(chunk), chunk)

        return Chunks(self.runner.device, self.batch_size, self.at_once).run(self.micro_batches, joined)

    def forward(self, joined: Any, micro_batches: int, **options: Any) -> tuple[Any, Outputs, Pass]:
        """One pass on the eval path; ``options`` are fields of ``Pass``."""
        pass_ = pass_of(micro_batches, self.batch_size, self.emulation, "eval", **options)
        output, recorded = self.runner.forward("eval", joined, pass_)
        return output, recorded, pass_

    def corrections(self, record: Recorded, layer: ProbedLayer) -> Corrections:
        """r, d and D of each micro-batch of a call that used its running statistics."""
        running = layer.info.running_mean, layer.info.running_variance
        assert running[0] is not None  # it used them
        assert running[1] is not None
        mean, variance = pool_moments(record.mean, record.variance, self.batch_size // record.unit)
        info = layer.info
        eps, r_max, d_max = (mean.new_full((info.channels,), value) for value in (info.eps, info.r_max, info.d_max))
        gate = None if info.gate is None else info.gate.to(mean)
        return corrections(mean, variance, running[0].to(mean), running[1].to(mean), eps, r_max, d_max, gate)


def floating(output: Any) -> list[Tensor]:
    """The tensors that are compared."""
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]


def square_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all values, float64."""
    return total(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).square() for tensor in tensors)


def total(values: Iterable[Tensor]) -> Tensor:
    """Sum of scalars on one device; 0 on the CPU if there is none."""
    parts = list(values)
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def to_host(values: Sequence[Tensor]) -> list[float]:
    """Scalars in one transfer."""
    found: list[float] = torch.stack([value.to(values[0].device) for value in values]).tolist() if values else []
    return found


def relative(square: float, norm: float) -> float | None:
    """Root of a ratio; None if it is no finite number."""
    value = math.sqrt(square / norm) if norm > 0 and square >= 0 else math.nan
    return value if math.isfinite(value) else None
