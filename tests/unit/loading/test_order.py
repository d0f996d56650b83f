"""Data in a fixed order is read from all over it, in batches as the loader composes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bnprobe.loading.data import as_batch_source
from bnprobe.loading.order import spread

SET = TensorDataset(torch.arange(42.0)[:, None])


def read(batches: Any, size: int = 4, **options: Any) -> list[list[int]]:
    source = spread(as_batch_source(batches, size), seed=1, **options)
    return [batch[0].flatten().int().tolist() for batch in source.batches]


def test_batches_stay_together_and_come_in_random_order() -> None:
    found = read(DataLoader(SET, batch_size=4))
    own = [list(range(start, min(start + 4, 42))) for start in range(0, 42, 4)]
    assert sorted(found) == own
    assert found != own
    assert found[-1] == [40, 41]  # a partial batch is the last one
    assert found == read(DataLoader(SET, batch_size=4))


def test_runs_for_larger_batches_stay_together() -> None:
    found = read(DataLoader(SET, batch_size=4), 2, batch_sizes=(4, 8))
    runs = [[image for batch in found[start : start + 4] for image in batch] for start in range(0, 20, 4)]
    assert sorted(runs) == [list(range(start, start + 8)) for start in range(0, 40, 8)]


def test_evaluation_images_are_drawn_one_by_one() -> None:
    found = read(DataLoader(SET, batch_size=4), mixed=True)
    assert sorted(image for batch in found for image in batch) == list(range(42))
    assert all(max(batch) - min(batch) > 3 for batch in found[:-1])


def test_evaluation_batches_of_a_list_are_drawn_at_random() -> None:
    batches = [(batch,) for batch in torch.arange(40.0)[:, None].split(4)]
    assert sorted(read(batches, mixed=True)) == [list(range(start, start + 4)) for start in range(0, 40, 4)]
    assert read(batches, mixed=True) != read(batches) == [list(range(start, start + 4)) for start in range(0, 40, 4)]


@pytest.mark.parametrize("mixed", [True, False])
def test_what_is_random_or_cannot_be_composed_anew_stays_as_it_is(mixed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shuffled = as_batch_source(DataLoader(SET, batch_size=4, shuffle=True, generator=generator), 4)
    assert spread(shuffled, 1, mixed=mixed) is shuffled
    stream = as_batch_source(iter([torch.zeros(4, 1)]), 4)
    assert spread(stream, 1, mixed=mixed) is stream
