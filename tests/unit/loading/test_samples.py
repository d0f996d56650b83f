"""A batch has as many samples as its loader says, whatever it is made of."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from bnprobe.errors import DataError
from bnprobe.loading.samples import SampleCount, count_samples, kind_of_sample


@dataclass
class GraphBatch:
    """What torch_geometric.data.Batch has: graphs side by side, and to which of them each node belongs."""

    x: Tensor
    edge_index: Tensor
    batch: Tensor
    ptr: Tensor

    @property
    def num_graphs(self) -> int:
        return len(self.ptr) - 1

    def to(self, device: Any) -> GraphBatch:
        return GraphBatch(*(getattr(self, name).to(device) for name in ("x", "edge_index", "batch", "ptr")))


@dataclass
class DeepGraph:
    """What a batched graph of DGL has."""

    batch_size: int


def image(height: int = 8) -> Tensor:
    return torch.zeros(3, height, 8)


def graphs(sizes: list[int]) -> dict[str, Tensor]:
    """Ragged graphs as a dict: the nodes of all graphs one after the other."""
    nodes, counts = sum(sizes), torch.tensor(sizes)
    batch = torch.arange(len(sizes)).repeat_interleave(counts)
    return {"x": torch.zeros(nodes, 6), "edge_index": torch.zeros(2, 3 * nodes), "batch": batch}


SIZES = [5, 7, 6, 9]
RAGGED = graphs(SIZES)
NODES = sum(SIZES)
PTR = torch.tensor([0, *SIZES]).cumsum(0)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        pytest.param([torch.zeros(4, 3), torch.zeros(4)], 4, id="tensors"),
        pytest.param({"image": torch.zeros(4, 3), "meta": {"id": ["a", "b", "c", "d"]}}, 4, id="nested dicts"),
        pytest.param(UserDict(input_ids=torch.zeros(4, 9), labels=torch.zeros(4)), 4, id="BatchEncoding"),
        pytest.param(([image(), image(), image(9), image()], [{"boxes": torch.zeros(n, 4)} for n in (1, 2, 2, 5)]), 4),
        pytest.param([{"image": image(), "file": "a"}, {"image": image(9), "file": "b"}], 2, id="a list of dicts"),
        pytest.param({"images": [image(), image(9)], "sizes": torch.zeros(2, 2)}, 2, id="per-image tensors in a dict"),
        pytest.param(GraphBatch(**RAGGED, ptr=PTR), 4, id="torch_geometric"),
        pytest.param((GraphBatch(**RAGGED, ptr=PTR), torch.zeros(4)), 4, id="torch_geometric in a pair"),
        pytest.param(DeepGraph(5), 5, id="DGL"),
        pytest.param(RAGGED, 4, id="vector of graphs"),
        pytest.param({"pos": torch.zeros(NODES, 3), "feature": torch.zeros(7, 1), "ptr": PTR}, 4, id="ptr"),
        pytest.param(pack_sequence([torch.zeros(5, 2), torch.zeros(3, 2)]), 2, id="packed sequences"),
        pytest.param((torch.zeros(()), torch.zeros(4, 2)), 4, id="a scalar first"),
        pytest.param([[torch.zeros(8, 3), torch.zeros(8, 3)], torch.zeros(8)], 8, id="two views"),
    ],
)
def test_what_a_batch_shows_by_itself(batch: Any, samples: int) -> None:
    assert count_samples(batch) == samples


@pytest.mark.parametrize(
    ("stated", "batches", "samples"),
    [
        pytest.param(
            4,
            [{**RAGGED, "y": torch.zeros(4)}, {**graphs([5, 6]), "y": torch.zeros(2)}],
            [4, 2],
            id="the tensor of the loader's length counts, also in a partial batch",
        ),
        pytest.param(4, [(torch.zeros(NODES, 3), torch.zeros(NODES))], [4], id="ragged without any such tensor"),
        pytest.param(32, [(torch.zeros(30, 3), torch.zeros(30))] * 2, [30, 30], id="samples left out by collate"),
        pytest.param(2, [torch.zeros(8, 1, 16, 16)], [2], id="several patches per volume"),
        pytest.param(3, [([image(), image(), image()], torch.zeros(3))], [3], id="three images of three channels"),
        pytest.param(
            2,
            [([image(), image(9)], [{"boxes": torch.zeros(n, 4)} for n in (2, 7)]) for _ in range(2)],
            [2, 2],
            id="two images, the first with two boxes",
        ),
        pytest.param(7, [[torch.zeros(7, 9)], [torch.zeros(12, 5)]], [7, 12], id="a budget of tokens"),
    ],
)
def test_what_the_loader_states(stated: int, batches: list[Any], samples: list[int]) -> None:
    count = SampleCount(stated=stated)
    assert [count(batch) for batch in batches] == samples


def test_the_size_asked_for_is_believed_only_where_the_batch_has_it() -> None:
    assert SampleCount(asked=4)((torch.zeros(4, 2), torch.zeros(10))) == 4
    assert SampleCount(asked=8)((torch.zeros(4, 2), torch.zeros(4))) == 4


def test_the_users_function_comes_first() -> None:
    assert SampleCount(stated=9, told=lambda batch: len(batch["ptr"]) - 1)({"ptr": PTR, "x": torch.zeros(9)}) == 4


def test_what_cannot_be_told_names_the_line_to_write() -> None:
    batch = {"points": torch.zeros(434, 3), "edges": torch.zeros(2, 900), "y": torch.zeros(32, dtype=torch.int64)}
    with pytest.raises(DataError) as caught:
        SampleCount(asked=8, origin="load_data of model.py")(batch)
    message = str(caught.value)
    assert "batch['points']: 434, batch['edges']: 2, batch['y']: 32" in message
    assert "434, pass --batch-size" not in message
    line = message[message.index("def batch_size_of") :]
    names: dict[str, Any] = {}
    exec(line, names)  # as printed
    assert SampleCount(asked=8, told=names["batch_size_of"])(batch) == 32


def test_nothing_to_count() -> None:
    assert count_samples(("a", 1)) is None
    assert count_samples(object()) is None


KINDS = {
    "colour image": ([torch.zeros(4, 3, 32, 32), torch.zeros(4)], "image"),
    "grey image as a dictionary": ({"image": torch.zeros(4, 1, 28, 28)}, "image"),
    "photo behind its labels": ({"labels": torch.zeros(4), "pixel_values": torch.zeros(4, 3, 32, 32)}, "image"),
    "spectrogram": (torch.zeros(4, 1, 64, 400), "sample"),
    "joints of a skeleton over time": (torch.zeros(4, 3, 300, 25), "sample"),
    "feature map": (torch.zeros(4, 64, 8, 8), "sample"),
    "row": ((torch.zeros(4, 30), torch.zeros(4)), "row"),
    "recording": (torch.zeros(4, 16000), "sample"),
    "numbers of words": (torch.zeros(4, 30, dtype=torch.int64), "sample"),
    "volume": (torch.zeros(4, 1, 8, 8, 8), "sample"),
    "packed": (pack_sequence([torch.zeros(3, 1), torch.zeros(2, 1)]), "sequence"),
    "graph": (GraphBatch(torch.zeros(4, 3), torch.zeros(2, 5), torch.zeros(4), torch.tensor([0, 2, 4])), "graph"),
    "graphs side by side": (
        {"x": torch.zeros(7, 5), "edge_index": torch.zeros(2, 9), "batch": torch.tensor([0, 0, 0, 1, 1, 2, 2])},
        "graph",
    ),
    "images of several sizes": ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], "sample"),
    "nothing": ([], "sample"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_called_what_they_surely_are(kind: str) -> None:
    batch, word = KINDS[kind]
    assert kind_of_sample(batch) == word


def test_several_rows_of_a_sample_are_not_called_samples() -> None:
    cloud = {"points": torch.zeros(434, 3), "y": torch.zeros(4)}
    assert (kind_of_sample(cloud, 434), kind_of_sample(cloud, 4)) == ("row", "sample")
