"""What the tests of frameworks train: a small network on data that is drawn anew by its index."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import Dataset

CLASSES, FEATURES = 4, 12
CENTRES = 3 * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two BN layers and a dropout."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2))
        self.neck = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.body(x)))


class Blobs(Dataset[tuple[Tensor, Tensor]]):
    """Points around centres; sorted by their label, where it is asked for."""

    def __init__(self, size: int, in_order: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        self.labels = labels.sort().values if in_order else labels
        self.points = CENTRES[self.labels] + torch.randn(size, FEATURES, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.labels[index]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_nothing_is_left(*models: nn.Module) -> None:
    """No hook on a module, none on optimizers, and no mode that sees torch's functions."""
    for model in models:
        for name, module in model.named_modules():
            assert not module._forward_pre_hooks, name
            assert not module._forward_hooks, name
    assert not _get_current_function_mode_stack()
    assert not _global_optimizer_post_hooks
    assert not _global_optimizer_pre_hooks


@contextmanager
def only_warnings_of_bnprobe(findings: bool = False) -> Iterator[None]:
    """What a framework warns of is its own; what bnprobe warns of is an error, but for findings of a test's making."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="bnprobe")
        if findings:
            warnings.filterwarnings("ignore", message="bnprobe, step")
        yield
