"""A multi-layer perceptron on the breast cancer table: BatchNorm1d, once directly after dropout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

DATA = Path(__file__).parent / "cancer.npz"

Batch = tuple[Tensor, Tensor]


class TableNet(nn.Module):
    """Three hidden layers of 32 units, each with BN; the third BN sees the output of a dropout layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(30, 32), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(32),
        )  # fmt: skip
        self.head = nn.Linear(32, 2)

    def forward(self, features: Tensor) -> Tensor:
        """(N, 30) -> class scores (N, 2)."""
        return self.head(self.hidden(features))


def load_model() -> nn.Module:
    """The network, untrained; the spec names the checkpoint."""
    return TableNet()


def load_data(batch_size: int = 64) -> DataLoader[Batch]:
    """The 455 training rows, shuffled; no partial batch."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(_read(held_out=False), batch_size, shuffle=True, generator=generator, drop_last=True)


def load_eval_data(batch_size: int = 64) -> DataLoader[Batch]:
    """The 114 rows that no training saw."""
    return DataLoader(_read(held_out=True), batch_size)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Class scores (N, 2)."""
    features, _ = batch
    return model(features)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy, in nats."""
    return F.cross_entropy(forward(model, batch), batch[1])


def metric(model: nn.Module, batch: Batch) -> Tensor:
    """Accuracy, 0 to 1."""
    return (forward(model, batch).argmax(dim=1) == batch[1]).float().mean()


def _read(*, held_out: bool) -> TensorDataset:
    """Rows of one split, standardized with the mean and deviation of the training rows."""
    with np.load(DATA) as file:
        features, labels, is_eval = file["features"], file["labels"], file["is_eval"]
    mean, deviation = features[~is_eval].mean(axis=0), features[~is_eval].std(axis=0)
    chosen = is_eval == held_out
    rows = (features[chosen] - mean) / deviation
    return TensorDataset(torch.from_numpy(rows), torch.from_numpy(labels[chosen]).long())
