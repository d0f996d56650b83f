"""Projects of Hugging Face, timm, torchvision, PyTorch Geometric and MONAI, and files of tensors, as their owners have
them.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from functional.command import MODEL, Workspace
from support.frameworks import framework

IMAGES = '''\
"""Images of 16 pixels a side, brighter from class to class."""

import torch
from torch.utils.data import DataLoader

CLASSES = 4


def images(count, side=16):
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (count,), generator=random)
    return torch.randn(count, 3, side, side, generator=random) + labels[:, None, None, None], labels


train_loader = DataLoader(list(zip(*images(64))), batch_size=8, shuffle=True)
'''

_DATASET = '''\
"""A data set of datasets: photos and their labels."""

import datasets
import numpy as np
from PIL import Image

random = np.random.default_rng(0)
labels = random.integers(0, 4, 64)
photos = [Image.fromarray(random.integers(0, 60 + 60 * label, (20, 20, 3), dtype=np.uint8)) for label in labels]
dataset = datasets.Dataset.from_dict({"image": photos, "label": labels}).train_test_split(0.25, seed=0)
'''

_GRAPHS = '''\
"""Graphs of 5 to 11 nodes."""

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
        yield Data(x=torch.randn(nodes, 6, generator=random), edge_index=edges, y=torch.tensor([index % 3]))


class GNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = GCNConv(6, 8), BatchNorm(8), nn.Linear(8, 3)

    def forward(self, x, edge_index, batch):
        return self.head(global_mean_pool(self.bn(self.conv(x, edge_index)).relu(), batch))


train_loader = DataLoader(list(graphs(64)), batch_size=8, shuffle=True)


def loss(model, data):
    return nn.functional.cross_entropy(model(data.x, data.edge_index, data.batch), data.y)
'''

_VOLUMES = '''\
"""Volumes of 16 voxels a side with their masks."""

import numpy as np
from monai.data import CacheDataset, DataLoader
from monai.networks.nets import BasicUNet
from monai.transforms import EnsureTyped

random = np.random.default_rng(0)
shape = (1, 16, 16, 16)
cases = [
    {"image": random.normal(size=shape).astype("float32"), "label": random.integers(0, 2, shape).astype("float32")}
    for _ in range(16)
]
train_loader = DataLoader(CacheDataset(cases, EnsureTyped(keys=["image", "label"]), progress=False), batch_size=2)


def unet():
    return BasicUNet(spatial_dims=3, in_channels=1, out_channels=2, features=(4, 4, 4, 4, 4, 4), norm="batch")
'''


def write_huggingface(workspace: Workspace) -> None:
    """A trained model as save_pretrained() leaves it, with its image processor, and a data set of datasets."""
    transformers = framework("transformers")
    framework("transformers.models.resnet.modeling_resnet")
    framework("datasets")
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 4}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    transformers.utils.logging.disable_progress_bar()
    _trained(model, torch.randn(64, 3, 16, 16)).save_pretrained(workspace.folder / "resnet")
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=1.0)
    processor.save_pretrained(workspace.folder / "resnet")
    workspace.write("data.py", _DATASET)
    workspace.write("net.py", _NET)


_NET = """\
from transformers import AutoModelForImageClassification

net = AutoModelForImageClassification.from_pretrained("resnet")
"""


def write_timm(workspace: Workspace) -> None:
    """A checkpoint of timm's train.py."""
    model = framework("timm").create_model("resnet10t", num_classes=4)
    args = argparse.Namespace(model="resnet10t", num_classes=4, opt="sgd", lr=0.1)
    state = _trained(model, torch.randn(16, 3, 16, 16)).state_dict()
    torch.save({"arch": "resnet10t", "state_dict": state, "args": args}, workspace.folder / "last.pth.tar")
    workspace.write("data.py", IMAGES)


def write_torchvision(workspace: Workspace) -> None:
    """A checkpoint of torchvision's train.py for classification, and pictures with boxes for detection."""
    model = framework("torchvision.models").get_model("shufflenet_v2_x0_5", num_classes=4)
    args = argparse.Namespace(model="shufflenet_v2_x0_5", lr=0.1)
    state = _trained(model, torch.randn(16, 3, 32, 32)).state_dict()
    torch.save({"model": state, "args": args}, workspace.folder / "checkpoint.pth")
    workspace.write("data.py", IMAGES.replace("side=16", "side=32"))


def write_graphs(workspace: Workspace) -> None:
    """A network of PyTorch Geometric with its loader."""
    framework("torch_geometric.loader")
    workspace.write("gnn.py", _GRAPHS)


def write_volumes(workspace: Workspace) -> None:
    """A network of MONAI with its loader."""
    for name in ("monai.data", "monai.networks.nets", "monai.transforms"):
        framework(name)
    workspace.write("segment.py", _VOLUMES)


def write_tensors(workspace: Workspace) -> None:
    """A model file without data, and its samples as tensors."""
    workspace.write("net.py", MODEL.split("def load_data")[0])
    torch.save((torch.randn(64, 2, 8, 8), torch.zeros(64)), workspace.folder / "samples.pt")


def write_buffer(workspace: Workspace) -> None:
    """A model file, and a replay buffer with nothing but sample(batch_size)."""
    workspace.write("net.py", MODEL.split("def load_data")[0])
    workspace.write("replay.py", _BUFFER)


_BUFFER = """\
import torch


class ReplayBuffer:
    def __init__(self, observations):
        self.observations = observations

    def sample(self, batch_size):
        chosen = torch.randint(0, len(self.observations), (batch_size,))
        return self.observations[chosen], torch.zeros(batch_size)


buffer = ReplayBuffer(torch.randn(256, 2, 8, 8))
"""


def _trained(model: Any, images: torch.Tensor) -> Any:
    """A model whose running statistics are those of some batches."""
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(images)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return model.eval()
