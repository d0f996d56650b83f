"""A block under activation checkpointing: its forward pass runs twice in each training step."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = checkpoint(self.block, self.stem(x), use_reentrant=False)
        return self.head(x.mean((2, 3)))


def load_model():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():  # a first pass over the data, so that the running statistics are those of the data
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model(_images())
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
    return model


def load_data(batch_size):
    labels = torch.arange(512) % 2
    return DataLoader(TensorDataset(_images(), labels), batch_size, shuffle=True)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _images():
    return torch.randn(512, 3, 12, 12, generator=torch.Generator().manual_seed(0))
