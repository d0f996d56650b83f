"""Loss and metric of the model on one path, also with other statistics than its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnprobe.errors import DeviceError
from bnprobe.probing.batches import CannotEmulateError, join, to_device
from bnprobe.probing.emulation import Emulation
from bnprobe.probing.intercept import Pass
from bnprobe.probing.memory import is_out_of_memory
from bnprobe.probing.output import Contributions, OutputSums, user_values
from bnprobe.probing.runner import PathName, Runner
from bnprobe.records import Score

Result = TypeVar("Result")

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
        DeviceError, UserCodeError, DataError: See ``in_chunks`` and ``Runner``.
    """

    def run(chunk: list[Any]) -> Contributions:
        pass_ = pass_of(len(chunk), batch_size, emulation, path, by_batch=by_batch, statistics=statistics or {})
        _, outputs = runner.forward(path, to_device(join(chunk), runner.device), pass_)
        apart = [to_device(batch, runner.device) for batch in chunk]
        return user_values(runner, path, apart, outputs, batch_size)

    found = in_chunks(runner, micro_batches, at_once if emulation.trusted else 1, batch_size, run)
    return score_of(found, path)


def pass_of(micro_batches: int, batch_size: int, emulation: Emulation, path: PathName, **options: Any) -> Pass:
    """A pass over so many micro-batches; ``options`` are fields of ``Pass``."""
    return Pass(micro_batches * batch_size, batch_size, layouts=emulation.layouts_of(path), **options)


def score_of(found: Iterable[Contributions], path: PathName) -> Score:
    """Means of what ``user_values`` gave."""
    sums = OutputSums()
    for contributions in found:
        sums.add(contributions)
    return sums.score(path)


def in_chunks(
    runner: Runner, micro_batches: Sequence[Any], at_once: int, batch_size: int, run: Callable[[list[Any]], Result]
) -> list[Result]:
    """Call ``run`` on so many consecutive micro-batches at a time, on fewer where these cannot run at once.

    Args:
        run: Changes nothing when it raises.

    Raises:
        DeviceError: Not even one micro-batch fits into memory.
    """
    results: list[Result] = []
    done = 0
    while done < len(micro_batches):
        chunk = list(micro_batches[done : done + at_once])
        try:
            results.append(run(chunk))
            done += len(chunk)
        except CannotEmulateError:
            if len(chunk) == 1:
                raise
            at_once = 1
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _require_several(chunk, batch_size, runner.device)
            at_once = len(chunk) // 2
    return results


def _require_several(chunk: list[Any], batch_size: int, device: torch.device) -> None:
    if len(chunk) == 1:
        raise DeviceError(
            f"Not even one batch of {batch_size} images fits into the memory of {device}. Use a smaller --batch-size,"
            " --autocast, or another --device."
        )
