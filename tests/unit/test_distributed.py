"""Processes of a launch: real ones, over gloo; and how micro-batches are dealt out to them."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bnprobe.distributed import ALONE, OPENING, Share, World, connected, launched, packed
from bnprobe.errors import DataError
from bnprobe.loading.data import as_batch_source
from bnprobe.loading.order import deal, spread
from bnprobe.measure.accumulators import SamplePool
from bnprobe.measure.layers import find_layers
from bnprobe.measure.reader import Reader
from bnprobe.measure.statistic import CallTable, Columns, SampleStep
from support import conversation
from support.processes import run_together

SIZES = st.integers(1, 5)
IMAGES = torch.arange(23.0)


@given(SIZES, st.integers(1, 4), st.integers(0, 60))
def test_every_micro_batch_is_one_process_s(size: int, run: int, total: int) -> None:
    shares = [Share(rank, size, run) for rank in range(size)]
    owned = [[position for position in range(total) if share.owns(position)] for share in shares]
    assert sorted(position for positions in owned for position in positions) == list(range(total))
    for share, positions in zip(shares, owned, strict=True):
        assert share.count(total) == len(positions)
        assert [share.position(number) for number in range(len(positions))] == positions


@given(SIZES, st.sampled_from([1, 3]), st.booleans())
def test_processes_take_what_one_would(size: int, run: int, by_index: bool) -> None:
    """Whether the loader is dealt out by index or read and skipped; the partial last batch is left out by all."""
    taken: dict[int, Any] = {}
    for rank in range(size):
        share = Share(rank, size, run)
        read: list[int] = []
        feed = _feed(share, by_index, read)
        opening = feed.look_ahead(OPENING)
        assert [batch.tolist() for batch in opening] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        own_ahead = feed.look_ahead_own(2)
        batches = feed.take(100)
        assert all(one is other for one, other in zip(own_ahead, batches[:2], strict=True))
        taken |= {share.position(number): batch for number, batch in enumerate(batches)}
        assert len(batches) == share.count(7)
        if by_index:
            own = [index for index in range(23) if share.reads(index // 3)]
            assert read == own
    assert [taken[position].tolist() for position in range(7)] == IMAGES[:21].view(7, 3).tolist()


def _feed(share: Share, by_index: bool, read: list[int]) -> Reader:
    class Images(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 23

        def __getitem__(self, index: int) -> torch.Tensor:
            read.append(index)
            return IMAGES[index]

    data = DataLoader(Images(), 3) if by_index else list(IMAGES.split(3))
    source = deal(as_batch_source(data, 3), share)
    assert source.dealt == (by_index and share.size > 1)
    return Reader(source.batches, 3, share=share, dealt=source.dealt)


def test_a_message_names_the_position_among_all() -> None:
    """Of the process that reads the image; the order is drawn at random, alike."""
    images = IMAGES.clone()[:, None]
    images[13] = torch.nan
    said = []
    for size in (1, 3):
        for rank in range(size):
            share = Share(rank, size)
            source = deal(spread(as_batch_source(DataLoader(TensorDataset(images), 3), 3), seed=0), share)
            try:
                Reader(source.batches, 3, share=share, dealt=source.dealt).take(9)
            except DataError as error:
                said.append(str(error))
    assert len(said) > 1
    assert len(set(said)) == 1
    assert "item 13 of the data set" in said[0]


def test_a_loader_that_deals_itself_is_refused() -> None:
    data = TensorDataset(IMAGES)
    source = as_batch_source(DataLoader(data, 3, sampler=DistributedSampler(data, 2, 0)), 3)
    assert deal(source, Share()) is source
    with pytest.raises(DataError, match="DistributedSampler, but bnprobe itself distributes"):
        deal(spread(source, seed=0), Share(0, 2))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_keep_the_images_that_one_would(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pool of 16 places, that 60 images pass; origins differ, since every process sees other images first."""
    monkeypatch.setattr("bnprobe.measure.accumulators.POOL_SAMPLES", 16)
    d = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 100
    one, several = SamplePool(0), [SamplePool(0) for _ in range(size)]
    layers, table = find_layers(torch.nn.BatchNorm1d(4), lambda *names: True).layers, CallTable()
    table.add((0, 0), 4)
    columns = Columns.of(layers, {(0, 0): 1}, table, torch.device("cpu"))
    for batch in range(20):
        rows = d[3 * batch : 3 * batch + 3]
        for pool in (one, several[batch % size]):
            pool.update_samples(SampleStep(columns, rows, rows.square(), 3, [batch % 16], [batch]))
    merged = several[0].on_host()
    for pool in several[1:]:
        merged.merge(pool.on_host(), table, table)
    assert sum(number >= 0 for number in one.number) == 16
    assert (merged.number, merged.replicate) == (one.number, one.replicate)
    assert torch.equal(merged.variance, one.variance)
    assert torch.allclose(merged.mean + merged.origin, one.mean + one.origin, rtol=0, atol=1e-6)
    assert merged.bytes == one.bytes == 16 * 4 * 2 * 4
    assert torch.equal(merged.samples([(0, 0)]).replicate, one.samples([(0, 0)]).replicate)


def test_one_process_needs_no_other() -> None:
    assert ALONE.gather("a") == ["a"]
    assert ALONE.share("a") == "a"
    assert list(ALONE.to_main("a")) == ["a"]
    ALONE.wait()
    ALONE.halt()
    assert (ALONE.is_main, ALONE.halted) == (True, False)


def test_what_is_sent_is_what_a_tensor_shows() -> None:
    """And not the whole of what it is a view of; tensors that are no arrays come through as well."""
    whole = torch.arange(1e6)
    values = [
        whole[::200_000],
        whole[7],
        torch.zeros(0, 3),
        torch.tensor([True]),
        whole[:5].bfloat16(),
        torch.ones(2, requires_grad=True),
        torch.eye(3).to_sparse(),
        nn.Parameter(torch.ones(2)),
    ]
    sent = packed(values)
    assert len(sent) < 10_000
    for value, received in zip(values, pickle.loads(sent), strict=True):
        assert (type(received), received.dtype, received.layout) == (type(value), value.dtype, value.layout)
        assert received.requires_grad == value.requires_grad
        assert torch.equal(received.to_dense(), value.to_dense())


def test_a_size_without_an_address_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() == ALONE
    with connected() as world:
        assert world == ALONE
    for name, value in (("RANK", "3"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert launched() == World(3, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What three processes saw."""
    folder = tmp_path_factory.mktemp("processes")
    run_together(3, conversation.work, folder)
    return [json.loads((folder / str(rank)).read_text(encoding="utf-8")) for rank in range(3)]


def test_what_processes_tell_each_other(found: list[dict[str, Any]]) -> None:
    assert [each["rank"] for each in found] == [0, 1, 2]
    assert [each["gathered"] for each in found] == [[0, 1, 2]] * 3
    assert [each["shared"] for each in found] == ["of 0"] * 3
    assert [each["to_main"] for each in found] == [[0, 1, 2], [], []]
    assert all(each["same"] for each in found)
    assert [(each["halted before"], each["halted"]) for each in found] == [(False, True)] * 3


def test_models_that_differ_become_that_of_process_0(found: list[dict[str, Any]]) -> None:
    """Processes 0 and 2 differ most: means 1 and 3, variances 1 and 7, of 2 as seen by a layer that runs on 0's."""
    r, rho = ((7 + 1e-5) / (1 + 1e-5)) ** 0.5, 7 / (7 + 1e-5)
    assert found[0]["mismatch"] == pytest.approx({"1": 4 / (1 + 1e-5) + rho * (r - 1) ** 2, "2": 0.0})
    assert [each["mismatch"] for each in found[1:]] == [{}, {}]
    assert [each["mean"] for each in found] == [[1.0, 1.0]] * 3
    assert all("all of them measured the model of process 0" in each["note"] for each in found)
    assert [each["again"] for each in found] == [[{"1": 0.0, "2": 0.0}, None]] * 3


def test_other_architectures_are_refused_by_all(found: list[dict[str, Any]]) -> None:
    wanted = "Process 2 loaded another model than process 0: weight is a float32 tensor of shape (3, 2) there"
    assert all(each["refused"].startswith(wanted) for each in found)
