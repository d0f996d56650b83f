"""Loss and metric of the model on one path, also with other statistics than its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bnprobe.probing.batches import join, to_device
from bnprobe.probing.chunks import Chunks
from bnprobe.probing.emulation import Emulation
from bnprobe.probing.intercept import Pass
from bnprobe.probing.output import Contributions, OutputSums, user_values
from bnprobe.probing.runner import PathName, Runner
from bnprobe.records import Score

Statistics = Mapping[int, tuple[Tensor, Tensor]]
"""By index of the layer: mean and variance, as in ``Pass.statistics``."""


def evaluate(
    runner: Runner,
    path: PathName,
    micro_batches: Sequence[Any],
    batch_size: int,
    emulation: Emulation,
    at_once: int,
    *,
    by_batch: frozenset[int] = frozenset(),
    statistics: Statistics | None = None,
) -> Score:
    """Means of loss and metric over micro-batches, each of which the functions see by itself.

    Args:
        runner: Installed.
        micro_batches: Of ``batch_size`` images, on any device.
        emulation: Whether they may run together.
        at_once: How many do.
        by_batch, statistics: As in ``Pass``.

    Returns:
        None for a function that is not there, and for a mean that is not finite.

    Raises:
        DeviceError, UserCodeError, DataError: See ``Chunks`` and ``Runner``.
    """

    def run(chunk: list[Any]) -> Contributions:
        pass_ = pass_of(len(chunk), batch_size, emulation, path, by_batch=by_batch, statistics=statistics or {})
        _, outputs = runner.forward(path, to_device(join(chunk), runner.device), pass_)
        apart = [to_device(batch, runner.device) for batch in chunk]
        return user_values(runner, path, apart, outputs, batch_size)

    chunks = Chunks(runner.device, batch_size, at_once if emulation.trusted else 1)
    return score_of(chunks.run(micro_batches, run), path)


def pass_of(micro_batches: int, batch_size: int, emulation: Emulation, path: PathName, **options: Any) -> Pass:
    """A pass over so many micro-batches; ``options`` are fields of ``Pass``."""
    return Pass(micro_batches * batch_size, batch_size, layouts=emulation.layouts_of(path), **options)


def score_of(found: Iterable[Contributions], path: PathName) -> Score:
    """Means of what ``user_values`` gave."""
    sums = OutputSums()
    for contributions in found:
        sums.add(contributions)
    return sums.score(path)
