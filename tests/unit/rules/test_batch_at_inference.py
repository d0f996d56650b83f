"""BN216."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnprobe
from bnprobe.testing import make_evidence, make_layer, run_rule
from support.networks import images, unsettled
from unit.rules.expect import passed


def test_layers_that_use_their_running_statistics_pass() -> None:
    assert run_rule("BN216", make_evidence(make_layer("one"))) == [
        passed("BN216", "one", "The layer does not use batch statistics in eval mode, or keeps no others.")
    ]


class Function(nn.Module):
    """Passes training=True, whatever the mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, training=True)


class Subclass(nn.BatchNorm2d):
    """Does not ask self.training."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps)


class Network(nn.Module):
    def __init__(self, first: nn.Module, stuck: bool = False) -> None:
        super().__init__()
        self.conv, self.first, self.last, self.stuck = nn.Conv2d(3, 4, 3), first, nn.BatchNorm2d(4), stuck

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.conv(x)).relu()).mean((2, 3))

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        if self.stuck:
            self.first.train()
        return self


CALLED, LEFT = "it is called with training=True", "eval() of the model leaves it in train mode"


@pytest.mark.parametrize("size", [2, 64])
@pytest.mark.parametrize(
    ("network", "why"),
    [
        (lambda: Network(Function(4)), CALLED),
        (lambda: Network(Subclass(4)), CALLED),
        (lambda: Network(nn.BatchNorm2d(4), stuck=True), LEFT),
    ],
)
def test_batch_statistics_in_eval_mode_are_an_error_at_any_batch_size(network: Any, why: str, size: int) -> None:
    report = bnprobe.scan(unsettled(network()), images(8, size, 3, 5, 5), size, num_batches=8)
    (found,) = [verdict for verdict in report.verdicts if verdict.rule == "BN216" and verdict.outcome == "failed"]
    assert (found.layer, found.severity) == ("first", "error")
    assert why in found.message
    assert found.value is not None
    assert found.value > 0.02
    assert "batch_at_inference" in [diagnosis.cause for diagnosis in report.diagnoses]
    first = report.layers[0]
    assert not first.flagged  # it normalizes alike in both modes
    assert not any(v.layer == "first" and v.cause == "lag" and v.outcome == "failed" for v in report.verdicts)


def test_where_outputs_hardly_depend_on_the_batch_it_is_a_warning() -> None:
    class Damped(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1e-3 + 1

    report = bnprobe.scan(unsettled(Damped(Function(4))), images(8, 64, 3, 5, 5), 64, num_batches=8)
    (found,) = [verdict for verdict in report.verdicts if verdict.rule == "BN216" and verdict.outcome == "failed"]
    assert found.severity == "warning"


def test_layers_without_running_statistics_are_another_matter() -> None:
    report = bnprobe.scan(Network(nn.BatchNorm2d(4, track_running_stats=False)), images(8, 8, 3, 5, 5), 8)
    assert not any(verdict.rule == "BN216" and verdict.outcome == "failed" for verdict in report.verdicts)
    assert any(verdict.rule == "BN104" and verdict.outcome == "failed" for verdict in report.verdicts)
