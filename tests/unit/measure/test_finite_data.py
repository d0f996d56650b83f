"""When a scan may take its data for all there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, TensorDataset, WeightedRandomSampler

from bnprobe.commands.scan import scan
from bnprobe.loading.data import as_batch_source
from bnprobe.loading.order import spread
from bnprobe.measure.finite_data import data_set_size

DATA = TensorDataset(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return DATA[index][0] + 0.1 * torch.randn(3)


class Own(Sampler[int]):
    """A sampler of the user's, whose order bnprobe draws anew."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Any:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (DataLoader(DATA, 8, shuffle=True), 64),
        (DataLoader(DATA, 8), 64),
        (DataLoader(DATA, 8, sampler=Own(list(range(40)))), 40),
        (DataLoader(DATA, 8, sampler=Own([1, 2] * 20)), None),
        (DataLoader(DATA, 8, sampler=RandomSampler(DATA, replacement=True)), None),
        (DataLoader(DATA, 8, sampler=WeightedRandomSampler([1.0] * 64, 64)), None),
        (DataLoader(Augmented(), 8, shuffle=True), None),
        (DataLoader(DATA, 8, collate_fn=lambda rows: torch.stack([row[0] for row in rows]) + torch.rand(())), None),
        (list(DataLoader(DATA, 8)), None),
    ],
    ids=["shuffled", "in order", "own", "own, repeating", "replacement", "weighted", "augmented", "mixed", "list"],
)
def test_a_data_set_is_finite_where_each_sample_is_read_once_and_always_the_same(data: Any, size: int | None) -> None:
    source = spread(as_batch_source(data, 8), seed=0)
    read = list(source.batches)
    state = torch.get_rng_state()
    assert data_set_size(source, 8 * len(read)) == size
    assert torch.equal(torch.get_rng_state(), state)


def test_a_small_part_is_as_good_as_endless_data() -> None:
    source = as_batch_source(DataLoader(DATA, 1, shuffle=True))
    assert data_set_size(source, 3) is None
    assert data_set_size(source, 4) == 64


def test_a_data_set_that_cannot_be_read_here_counts_as_endless() -> None:
    class InWorkers(Dataset[Any]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> torch.Tensor:
            raise OSError("opened by the workers only")

    assert data_set_size(as_batch_source(DataLoader(InWorkers(), 8)), 64) is None


def test_lag_of_data_that_was_read_out_is_that_of_the_data_set() -> None:
    """The noise of 7 batches neither looks like lag nor hides it, as it would if the data went on."""
    x = torch.randn(224, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = nn.BatchNorm1d(6).double()
    layer.running_mean.copy_(x.mean(0) + 0.05)
    layer.running_var.copy_(x.var(0))
    found, covered = [], 0
    for seed in range(12):
        torch.manual_seed(seed)
        data = DataLoader(TensorDataset(x), 32, shuffle=True)
        layer_found = scan(layer, data, forward=lambda model, batch: model(batch[0]), num_batches=7).layers[0]
        low, high = layer_found.share_intervals.lag
        covered += low <= 0.05**2 <= high
        found.append(layer_found.shares.lag)
    assert sum(found) / 12 == pytest.approx(0.05**2, rel=0.1)
    assert covered >= 11
