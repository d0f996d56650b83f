"""What train mode does beyond batch statistics is taken out before the two modes are compared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnprobe import scan
from bnprobe.records import Report

CLASSES = 4


class WithAuxiliaryHead(nn.Module):
    """A second head that runs in training only, as in Inception and GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, CLASSES)
        self.aux = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Any:
        x = self.bn(x)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class WithSmoothing(nn.Module):
    """Its own loss, which is another one in training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], label_smoothing=0.3 if self.training else 0.0)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(model, WithSmoothing):
        return model(batch)
    found = model(batch[0])
    if not isinstance(found, tuple):
        return F.cross_entropy(found, batch[1])
    return F.cross_entropy(found[0], batch[1]) + 0.5 * F.cross_entropy(found[1], batch[1])


def call(model: nn.Module, batch: Any) -> Any:
    return model(batch if isinstance(model, WithSmoothing) else batch[0])


def trained(model: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    labels = torch.randint(CLASSES, (512,))
    x = torch.eye(CLASSES, 6)[labels] * 2 + torch.randn(512, 6)
    data = list(zip(x.split(32), labels.split(32), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in data * 10:
        optimizer.zero_grad()
        loss_of(model.train(), batch).backward()
        optimizer.step()
    return model, data


@pytest.mark.parametrize("build", [WithAuxiliaryHead, WithSmoothing])
def test_loss_and_inference_are_compared_on_the_same_quantity(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, data = trained(build())
    bn = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    bn.running_mean -= 0.4 * bn.running_var.sqrt()  # stale, and harmless beside what training adds to the loss
    report = scan(model, data, 32, num_batches=len(data), forward=call, loss=loss_of)
    [gap] = report.summary.gaps
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train()
    expected = torch.stack([loss_of(twin, batch) for batch in data]).mean()
    assert gap.without_noise == pytest.approx(float(expected), rel=1e-5)
    assert gap.inference < gap.training  # which says nothing: training adds to the loss
    assert "trained_in_eval" not in causes(report)
    assert "train path with the rest in eval mode" in [each.name for each in report.scan.passes]


def test_a_network_that_only_normalizes_otherwise_needs_no_third_pass() -> None:
    torch.manual_seed(0)
    model, data = trained(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES)))
    report = scan(model, data, 32, num_batches=len(data), forward=call, loss=loss_of)
    [gap] = report.summary.gaps
    assert (gap.training_noise, gap.training_noise_interval) == (0.0, None)
    assert not [each for each in report.scan.passes if each.name.startswith("train path")]


def causes(report: Report) -> list[str]:
    return [found.cause for found in report.diagnoses]
