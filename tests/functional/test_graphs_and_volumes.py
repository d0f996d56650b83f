"""Graphs of PyTorch Geometric and volumes of MONAI are scanned with the user's own loaders and data sets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from functional.command import CLEAN, ERROR, FINDINGS, Workspace
from support.compare import assert_same_json
from support.frameworks import framework

GRAPHS = """\
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import BatchNorm, GCNConv, global_mean_pool

def graphs(count):
    random = torch.Generator().manual_seed(0)
    for index in range(count):
        nodes = int(torch.randint(5, 12, (), generator=random))
        edges = torch.randint(0, nodes, (2, 3 * nodes), generator=random)
        yield Data(x=torch.randn(nodes, 6, generator=random) + index % 3, edge_index=edges, y=torch.tensor([index % 3]))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = GCNConv(6, 8), BatchNorm(8)
        self.conv2, self.bn2 = GCNConv(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x, edge_index, batch):
        x = self.bn1(self.conv1(x, edge_index)).relu()
        x = self.bn2(self.conv2(x, edge_index)).relu()
        return self.head(global_mean_pool(x, batch))

class OnData(Net):
    def forward(self, data):
        return super().forward(data.x, data.edge_index, data.batch)

class Nodes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = GCNConv(6, 8), BatchNorm(8)

    def forward(self, x, edge_index, edge_weight=None):
        return self.bn(self.conv(x, edge_index, edge_weight))

train_loader = DataLoader(list(graphs(48)), batch_size=8)
listed = list(graphs(48))
whole = next(graphs(1))
"""

BY_HAND = """\
def forward(model, batch):
    return model(batch.x, batch.edge_index, batch.batch)

def loss(model, batch):
    return nn.functional.cross_entropy(forward(model, batch), batch.y)
"""


def scan(workspace: Workspace, target: str, *more: str) -> dict[str, Any]:
    """The JSON report."""
    result = workspace.run("scan", target, "--batches", "4", "--format", "json", *more)
    assert result.code in (CLEAN, FINDINGS), result
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def graphs(workspace: Workspace) -> Workspace:
    framework("torch_geometric.loader")
    workspace.write("model.py", GRAPHS)
    return workspace


@pytest.mark.parametrize("net", ["Net", "OnData"])
def test_graphs_are_samples_and_nodes_are_rows(graphs: Workspace, net: str) -> None:
    report = scan(graphs, f"model.py:{net}")
    assert (report["scan"]["batch_size"], report["scan"]["sample"]) == (8, "graph")
    nodes = 8 * 8  # a graph has 5 to 11
    assert [layer["name"] for layer in report["layers"]] == ["bn1.module", "bn2"]
    assert report["layers"][0]["values_per_channel"] == pytest.approx(nodes, rel=0.4)


def test_the_figures_are_those_of_a_model_file(graphs: Workspace) -> None:
    found = scan(graphs, "model.py:Net")
    graphs.write("model.py", GRAPHS + BY_HAND)
    by_hand = scan(graphs, "model.py:Net")
    for report in (found, by_hand):
        for layer in report["layers"]:
            del layer["impact"]["loss"]
    assert_same_json(found["layers"], by_hand["layers"])
    assert found["summary"]["output"]["relative_l2"] == by_hand["summary"]["output"]["relative_l2"]
    assert by_hand["summary"]["output"]["loss"] is not None


def test_loaders_of_graphs_are_rebuilt(graphs: Workspace) -> None:
    report = scan(graphs, "model.py:Net", "--batch-size", "4")
    assert report["scan"]["batch_size"] == 4
    assert any(note.startswith("The loader was rebuilt at batch size 4") for note in report["scan"]["notes"])


def test_lists_of_graphs_and_single_graphs(graphs: Workspace) -> None:
    report = scan(graphs, "model.py:Net", "--data", "listed", "--batch-size", "4")
    assert report["scan"]["data"] == "listed of model.py (48 samples)"
    report = scan(graphs, "model.py:Nodes", "--data", "whole")
    assert (report["scan"]["batches"], report["scan"]["sample"]) == (1, "graph")


def test_loaders_that_make_their_batches_themselves(graphs: Workspace) -> None:
    """As those that sample neighbours: what they collate is not yet a batch."""
    graphs.write(
        "own.py",
        "from model import *\n"
        "class Sampling(DataLoader):\n"
        "    def _get_iterator(self):\n"
        "        return super()._get_iterator()\n"
        "loader = Sampling(listed, batch_size=8)\n",
    )
    result = graphs.run("scan", "own.py:Net", "--batch-size", "4")
    message = result.error(ERROR)
    assert "cannot be rebuilt at batch size 4, because Sampling has its own _get_iterator" in message


# ---- volumes

VOLUMES = """\
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, Dataset, ThreadDataLoader
from monai.networks.nets import BasicUNet, DenseNet, SegResNet
from monai.transforms import Compose, EnsureTyped, RandSpatialCropSamplesd

random = np.random.default_rng(0)
SIDE = 16
cases = [
    {
        "image": random.normal(size=(1, SIDE, SIDE, SIDE)).astype("float32"),
        "label": random.integers(0, 2, (1, SIDE, SIDE, SIDE)).astype("float32"),
        "name": f"case {index}",
    }
    for index in range(12)
]
typed = EnsureTyped(keys=["image", "label"])
crops = RandSpatialCropSamplesd(keys=["image", "label"], roi_size=(8, 8, 8), num_samples=2, random_size=False)
cached, plain = CacheDataset(cases, typed, progress=False), Dataset(cases, typed)
patches = Dataset(cases, Compose([typed, crops]))
loader = DataLoader(cached, batch_size=2, shuffle=True)
threaded = ThreadDataLoader(cached, batch_size=2)

class Forever(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield from map(typed, cases)

endless = DataLoader(Forever(), batch_size=2)

def unet():
    return BasicUNet(spatial_dims=3, in_channels=1, out_channels=2, features=(4, 4, 4, 4, 4, 4), norm="batch")

def segresnet():
    return SegResNet(spatial_dims=3, in_channels=1, init_filters=8, norm="batch", blocks_down=(1, 1), blocks_up=(1,))

def densenet():
    return DenseNet(3, in_channels=1, out_channels=2, init_features=4, growth_rate=4, block_config=(1, 1))
"""


@pytest.fixture
def volumes(workspace: Workspace) -> Workspace:
    for name in ("monai.data", "monai.networks.nets", "monai.transforms"):
        framework(name)
    workspace.write("model.py", VOLUMES)
    return workspace


@pytest.mark.parametrize(
    ("net", "data", "size"),
    [
        ("unet", "loader", 2),
        ("segresnet", "cached", 2),
        ("densenet", "plain", 2),
        ("densenet", "patches", 2),
        ("densenet", "endless", 2),
        ("densenet", "threaded", 4),
    ],
)
def test_volumes(volumes: Workspace, net: str, data: str, size: int) -> None:
    report = scan(volumes, f"model.py:{net}", "--data", data, "--batch-size", str(size))
    kinds = {layer["kind"] for layer in report["layers"]}
    assert kinds == {"BatchNorm3d"}
    assert report["scan"]["batch_size"] == size
    assert report["scan"]["images"] == size * report["scan"]["batches"]
    assert report["scan"]["emulated"] == (data != "patches")


def test_endless_data_has_one_batch_size(volumes: Workspace) -> None:
    message = volumes.run("scan", "model.py:densenet", "--data", "endless", "--batch-size", "4").error(ERROR)
    assert "cannot be rebuilt at batch size 4, because its data set is iterable" in message
