"""Batches stay as they are when the next one is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnprobe.commands.scan import scan
from bnprobe.config.spec import Spec
from bnprobe.loading.data import as_batch_source
from bnprobe.measure.reader import lasting
from bnprobe.repairs.held_out import _read
from bnprobe.training.data import Feed
from support.networks import Residual, images, unsettled

COUNT = 20


class Graph:
    """A batch object of another library."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def clone(self) -> Graph:
        return Graph(self.x.clone())


def refilled(buffers: int, make: Callable[[], Any], fill: Callable[[Any, int], object]) -> Iterator[Any]:
    ring = [make() for _ in range(buffers)]
    for position in range(COUNT):
        batch = ring[position % buffers]
        fill(batch, position)
        yield batch


def value_of(batch: Any) -> float:
    if isinstance(batch, Graph):
        return float(batch.x[0])
    if isinstance(batch, dict):
        batch = batch["x"]
    return float(batch[0])


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any, int], object]]] = {
    "tensor": (lambda: torch.zeros(3), lambda batch, position: batch.fill_(position)),
    "array": (lambda: np.zeros(3), lambda batch, position: batch.fill(position)),
    "array in a dictionary": (lambda: {"x": np.zeros(3)}, lambda batch, position: batch["x"].fill(position)),
    "the same dictionary": (dict, lambda batch, position: batch.update(x=torch.full((3,), float(position)))),
    "object": (lambda: Graph(torch.zeros(3)), lambda batch, position: batch.x.fill_(position)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("buffers", [1, 2, 5, 7])
def test_a_loader_that_reuses_its_memory(kind: str, buffers: int) -> None:
    kept = list(lasting(refilled(buffers, *KINDS[kind])))
    assert [value_of(batch) for batch in kept] == list(map(float, range(COUNT)))


def test_data_in_its_own_memory_is_not_copied() -> None:
    data = [torch.full((3,), float(position)) for position in range(COUNT)]
    kept = list(lasting(data))
    assert all(one is other for one, other in zip(kept[8:], data[8:], strict=True))


def test_memory_that_is_freed_and_given_out_again_is_no_reuse() -> None:
    given: list[int] = []

    def fresh() -> Iterator[Tensor]:
        for position in range(COUNT):
            batch = torch.full((1000,), float(position))
            given.append(id(batch))
            yield batch
            del batch

    same = [id(batch) == given[-1] for batch in lasting(fresh())]
    assert same == [False] * 8 + [True] * (COUNT - 8)


@pytest.mark.parametrize("emulate", [True, False])
def test_arrays_that_are_filled_again_are_measured_as_they_were(emulate: bool) -> None:
    data = [batch.numpy() for batch in images(6, 2, 3, 5, 5)]
    buffer = np.empty_like(data[0])

    def again() -> Iterator[dict[str, Any]]:
        for batch in data:
            buffer[:] = batch
            yield {"x": buffer}

    def forward(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return model(torch.from_numpy(batch["x"]))

    options: dict[str, Any] = {"num_batches": 6, "forward": forward, "batch_size_of": lambda batch: len(batch["x"])}
    model = unsettled(Residual())
    expected = scan(model, [{"x": batch} for batch in data], 2, emulate=emulate, **options)
    assert scan(model, again(), 2, emulate=emulate, **options).layers == expected.layers


class Refilled:
    """One buffer, filled again for every batch, as often as it is read."""

    def __iter__(self) -> Iterator[Tensor]:
        return refilled(1, lambda: torch.zeros(2, 3), lambda batch, position: batch.fill_(position))


def test_batches_of_one_optimizer_step() -> None:
    feed = Feed(as_batch_source(Refilled(), 2), seed=0, accumulate=4)
    assert [value_of(batch[0]) for batch in feed.next_group()] == [0, 1, 2, 3]
    feed.close()


def test_held_out_batches() -> None:
    spec = Spec.model_validate({"model": {"target": "model.py"}, "eval_data": {"batch_size": 2}})
    batches, _ = _read(spec, as_batch_source(Refilled(), 2), 1)
    assert [value_of(batch[0]) for batch in batches] == list(map(float, range(COUNT)))
