"""What looks like a norm is either harmless, or skipped with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bnprobe.commands.scan import scan
from bnprobe.measure.norms import lookalike_reason
from support.networks import images


class FrozenBatchNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))


class Whitening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moving_mean", torch.zeros(2))


class MyBatchNorm(nn.Module):
    pass


class ABN(nn.Module):
    pass


class NormBlock(nn.Sequential):
    """Holds norms, is none."""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (FrozenBatchNorm2d(), "frozen"),
        (Whitening(), "running statistics"),
        (MyBatchNorm(), "unknown norm-like module MyBatchNorm"),
        (ABN(), "unknown norm-like module ABN"),
        (nn.InstanceNorm2d(2, track_running_stats=True), "instance norm"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_skipped_with_a_reason(module: nn.Module, words: str) -> None:
    assert words in lookalike_reason(module)


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(2),
        nn.GroupNorm(1, 2),
        nn.RMSNorm(2),
        nn.LocalResponseNorm(2),
        nn.InstanceNorm2d(2),
        nn.Linear(2, 2),
        nn.ReLU(),
        NormBlock(nn.BatchNorm2d(2)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_nothing_to_say(module: nn.Module) -> None:
    assert lookalike_reason(module) is None


@pytest.mark.parametrize("normalized", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_a_norm_of_weights_is_none_of_batches(normalized: Callable[[nn.Module], nn.Module]) -> None:
    modules = list(normalized(nn.Linear(2, 2)).modules())
    assert any("Norm" in type(module).__name__ for module in modules)
    assert [lookalike_reason(module) for module in modules] == [None] * len(modules)


class GhostNorm(nn.BatchNorm2d):
    """Takes the parts of a batch for channels of their own, and keeps statistics of each."""

    def __init__(self, channels: int, parts: int) -> None:
        super().__init__(channels)
        self.parts = parts
        self.register_buffer("running_mean", torch.zeros(parts * channels))
        self.register_buffer("running_var", torch.ones(parts * channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, *positions = x.shape
        if self.training:
            split = x.reshape(-1, self.parts * c, *positions)
            return F.batch_norm(split, self.running_mean, self.running_var, training=True).view(n, c, *positions)
        return F.batch_norm(x, self.running_mean[:c], self.running_var[:c])


def test_a_layer_with_statistics_for_each_part_of_a_batch_is_skipped_by_name() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), GhostNorm(3, 2))
    report = scan(model, images(6, 4, 3, 4, 4), 4, num_batches=6)
    assert [layer.name for layer in report.layers] == ["0"]
    (skipped,) = report.skipped
    assert (skipped.name, skipped.kind) == ("1", "GhostNorm")
    assert skipped.reason == "its running_mean holds 6 values for 3 channels, as ghost batches may have"
