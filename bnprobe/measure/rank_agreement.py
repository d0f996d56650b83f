"""Check that all processes of a launch measure the same model, and give all of them that of process 0."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnprobe.distributed import World
from bnprobe.errors import ModelError
from bnprobe.measure.layers import ProbedLayer
from bnprobe.stats.moments import corrections

RankStatistics = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Agreement:
    """What comparing the processes' models gave.

    Attributes:
        mismatch: D between the running statistics of the two processes that differ most, by name of the layer; in
            process 0 only, and empty in one process.
        note: What the reader should know; None where all loaded the same.
    """

    mismatch: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None


def agree(model: nn.Module, layers: Sequence[ProbedLayer], world: World) -> Agreement:
    """Compare the models that the processes loaded, then give process 0's parameters and buffers to all.

    What is merged must be of one model: sums are kept in units of the running statistics. The caller restores the
    model.

    Args:
        model: On its device; its tensors are overwritten where the processes differ.
        layers: Those that are compared.
        world: Every process must call this.

    Raises:
        ModelError: The models have other parameters or buffers, or such of another shape.
    """
    if world.size == 1:
        return Agreement()
    named = (*model.named_parameters(), *model.named_buffers())  # each tensor once
    tensors = {name: tensor for name, tensor in named if not is_lazy(tensor)}
    own = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
    marks = world.gather((own, digest_of(tensors)))
    _require_same([structure for structure, _ in marks])
    if len({digest for _, digest in marks}) == 1:
        return Agreement(dict.fromkeys(_statistics(layers), 0.0))
    mismatch = _largest(list(world.to_main(_statistics(layers))), {layer.name: layer.info.eps for layer in layers})
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(world.share(tensor.detach().cpu()))
    return Agreement(mismatch, "The processes loaded different models; all of them measured the model of process 0.")


def digest_of(state: Mapping[str, Any]) -> str:
    """SHA-256 of the names and the bits of tensors, e.g. of a state dict; of what is no tensor, of the name alone."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _require_same(structures: Sequence[Mapping[str, tuple[tuple[int, ...], str]]]) -> None:
    first = structures[0]
    for rank, other in enumerate(structures):
        odd = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if odd:
            raise ModelError(
                f"Process {rank} loaded another model than process 0: {odd[0]} is {_described(other.get(odd[0]))} there"
                f" and {_described(first.get(odd[0]))} here. All processes of a launch must probe the same model: it"
                " must not depend on RANK."
            )


def _described(entry: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if entry is None else f"a {entry[1].removeprefix('torch.')} tensor of shape {entry[0]}"


def _statistics(layers: Sequence[ProbedLayer]) -> RankStatistics:
    """Running statistics on the host, float64, of the layers that keep some."""
    found: RankStatistics = {}
    for layer in layers:
        mean, variance = layer.info.running_mean, layer.info.running_variance
        if mean is not None and variance is not None:
            found[layer.name] = mean.detach().cpu().double(), variance.detach().cpu().double()
    return found


def _largest(statistics: Sequence[RankStatistics], eps: Mapping[str, float]) -> dict[str, float]:
    """The largest D between the running statistics of two processes, by layer."""
    if not statistics:
        return {}
    pairs = [(one, other) for one in statistics for other in statistics if one is not other]
    return {name: max(_mismatch(one[name], other[name], eps[name]) for one, other in pairs) for name in statistics[0]}


def _mismatch(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], eps: float) -> float:
    """D of ``one`` as batch statistics against ``other`` as running statistics, mean over channels."""
    wide = torch.full_like(other[0], eps)
    return float(corrections(one[0][None], one[1][None], *other, wide).mismatch.mean())
