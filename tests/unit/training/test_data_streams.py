"""The random streams of data and model."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bnprobe.loading.data import as_batch_source
from bnprobe.measure.restore import preserved_random_state, random_state, seed_everything
from bnprobe.training.data import BatchStream, Feed, KeptEpochs, data_seed, model_seed, random_snapshot, restore, rewind
from support.finetuning import Noisy, job, source, trained


def draw() -> tuple[float, float, float]:
    return random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))


def test_a_state_survives_a_file_that_is_safe_to_load() -> None:
    seed_everything(3)
    draw()  # leaves half of a pair of normal numbers behind in random and numpy
    buffer = io.BytesIO()
    torch.save(random_snapshot(), buffer)
    expected = [draw() for _ in range(3)]
    buffer.seek(0)
    restore(torch.load(buffer, weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_a_stream_flows_beside_the_one_in_force() -> None:
    with preserved_random_state():
        seed_everything(7)
        expected = [draw() for _ in range(4)]
    before, stream, found = random_state(), BatchStream(7), []
    for _ in range(4):
        with stream.flowing():
            found.append(draw())
        assert random_state() == before
    assert found == expected


def test_seeds_of_epochs_ranks_and_models_differ() -> None:
    seeds = [data_seed(seed, epoch) for seed in range(4) for epoch in range(4)]
    seeds += [model_seed(seed, rank) for seed in range(4) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_generators_that_the_data_hold_begin_anew() -> None:
    class Holder:
        def __init__(self) -> None:
            self.parts = [{"torch": torch.Generator()}, random.Random(1), np.random.RandomState(1)]
            self.numpy = np.random.default_rng(1)
            self.me = self

        def draw(self) -> list[float]:
            first, plain, old = self.parts
            torchs = float(torch.rand((), generator=first["torch"]))
            return [torchs, plain.random(), float(old.rand()), float(self.numpy.random())]

    holder, seen = Holder(), []
    for seed in (5, 6, 5):
        rewind([holder], seed)
        seen.append(holder.draw())
        holder.draw()
    assert seen[0] == seen[2]
    assert all(one != other for one, other in zip(seen[0], seen[1], strict=True))


def test_a_feed_goes_to_any_position() -> None:
    whole = Feed(source(), 4)
    batches, positions = [], []
    for _ in range(25):
        positions.append((whole.epoch, whole.used))
        batches.append(whole.next_group()[0][0])
    for number in (0, 3, 10, 17, 24):
        feed = Feed(source(), 4)
        feed.go_to(*positions[number])
        for expected in batches[number : number + 3]:
            assert torch.equal(feed.next_group()[0][0], expected)


def test_an_epoch_is_read_whole_and_only_once() -> None:
    data = Noisy(noise=0.0)
    feed = Feed(source(noise=0.0), 0)
    seen = torch.cat([feed.next_group()[0][0] for _ in range(10)])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, data.images.tolist()))
    assert feed.epoch == 0


class Counting:
    """Batches with random numbers in them; counts how often one is asked for."""

    def __init__(self) -> None:
        self.loader, self.read = source().batches, 0
        self.source = as_batch_source(self, 4)
        self.read = 0  # one was looked at

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.read += 1
            yield batch


def fed(batches: Counting, number: int, kept: KeptEpochs | None) -> list[Tensor]:
    """The first so many micro-batches of a run: 10 are an epoch."""
    feed = Feed(batches.source, 0, kept=kept)
    return [feed.next_group()[0][0] for _ in range(number)]


@pytest.mark.parametrize(
    ("first", "second", "room", "reads"),
    [(25, 25, 2**20, (30, 30)), (25, 13, 2**20, (30, 30)), (13, 25, 2**20, (20, 40)), (25, 25, 1500, (30, 50)),
     (25, 25, 0, (30, 60))],
    ids=["alike", "shorter", "longer", "the first epoch", "nothing"],
)  # fmt: skip
def test_what_one_run_has_read_the_next_one_is_given(
    first: int, second: int, room: int, reads: tuple[int, int]
) -> None:
    """An epoch is 10 batches of 128 bytes."""
    expected = fed(Counting(), 25, None)
    batches, kept = Counting(), KeptEpochs(room)
    for number, read in zip((first, second), reads, strict=True):
        found = fed(batches, number, kept)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=False))
        assert batches.read == read


def test_an_epoch_of_which_more_is_needed_is_read_on() -> None:
    batches, kept = list(range(40)), KeptEpochs()
    for needed in (3, 3, 30, 40, 40):
        assert list(itertools.islice(kept.epoch(1, lambda: iter(batches)), needed)) == batches[:needed]


def test_batches_of_unknown_size_are_not_kept() -> None:
    class Own:
        def __init__(self, images: Tensor) -> None:
            self.images = images

    kept, read = KeptEpochs(), [0]

    def batches() -> Iterator[Any]:
        read[0] += 1
        yield Own(torch.zeros(2)), torch.zeros(2)

    assert [len(list(kept.epoch(1, batches))) for _ in range(2)] == [1, 1]
    assert read == [2]


@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_end_with_the_run(persistent: bool) -> None:
    before = set(multiprocessing.active_children())
    trained(job(source=source(num_workers=2, persistent_workers=persistent), steps=13))
    assert set(multiprocessing.active_children()) == before
