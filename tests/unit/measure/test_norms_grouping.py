"""A norm family that groups the rows of a micro-batch itself: ghost batches, added from outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.commands.scan import scan
from bnprobe.errors import ModelError
from bnprobe.measure.forward_pass import Grouping, RowLayout
from bnprobe.measure.norms import NORMS, BatchNormFamily, NormCall
from support.networks import images

GHOST = 3
"""Rows of a ghost batch."""


def ghost_norm(x: Tensor, mean: Tensor, variance: Tensor, training: bool, eps: float, rows: int) -> Tensor:
    """Normalize every ``rows`` rows with their own statistics, or all with the running ones."""
    parts = x.split(rows) if training else (x,)
    return torch.cat([F.batch_norm(part, mean.clone(), variance.clone(), training=training, eps=eps) for part in parts])


class GhostNorm(nn.BatchNorm2d):
    def __init__(self, channels: int, rows: int = GHOST) -> None:
        super().__init__(channels, affine=False)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return Functional.ghost_norm(x, self.running_mean, self.running_var, self.training, self.eps, self.rows)


class Functional:
    """Where the functional form is looked up, as torch.nn.functional is."""

    @staticmethod
    def ghost_norm(x: Tensor, *args: Any) -> Tensor:
        if torch.overrides.has_torch_function_unary(x) or torch._C._len_torch_function_stack():
            return torch.overrides.handle_torch_function(Functional.ghost_norm, (x,), x, *args)
        return ghost_norm(x, *args)


class GhostFamily(BatchNormFamily):
    name = "ghost"
    functionals = (Functional.ghost_norm,)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, GhostNorm)

    def parse(self, x: Tensor, mean: Tensor, variance: Tensor, training: bool, eps: float, rows: int) -> NormCall:
        return NormCall(x, mean, variance, None, None, training, eps)

    def rows_per_group(self, module: nn.Module, call: NormCall, rows: int) -> int:
        assert isinstance(module, GhostNorm)
        return module.rows


class Net(nn.Module):
    """A plain layer, a ghost layer, and a plain one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(2)
        self.ghost = GhostNorm(2)
        self.last = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.ghost(self.first(x)))).mean((2, 3))


@pytest.fixture(autouse=True)
def _ghosts() -> Iterator[None]:
    with NORMS.including(GhostFamily()):
        yield


def mismatch(x: list[Tensor], eps: float) -> Tensor:
    """D of each part against mean 0 and variance 1, averaged over channels."""
    found = []
    for part in x:
        part = part.double()
        mean, variance = part.mean((0, 2, 3)), part.var((0, 2, 3), correction=0)
        z_train = (part - mean[:, None, None]) / (variance[:, None, None] + eps).sqrt()
        z_test = part / (1 + eps) ** 0.5
        found.append((z_train - z_test).square().mean())
    return torch.stack(found)


@pytest.mark.parametrize("emulate", [True, False])
def test_ghost_batches_beside_plain_ones(emulate: bool) -> None:
    model, data = Net(), images(8, 2 * GHOST, 2, 4, 4)
    report = scan(model, data, 2 * GHOST, num_batches=8, emulate=emulate)
    assert report.scan.emulated == emulate
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["ghost"].values_per_channel == GHOST * 16
    assert by_name["first"].values_per_channel == 2 * GHOST * 16
    halves = [half for batch in data for half in (batch / (1 + 1e-5) ** 0.5).split(GHOST)]
    eval_ = by_name["ghost"].eval
    assert eval_ is not None
    assert eval_.mismatch == pytest.approx(float(mismatch(halves, 1e-5).mean()), rel=1e-4)
    first = by_name["first"].eval
    assert first is not None
    assert first.mismatch == pytest.approx(float(mismatch(data, 1e-5).mean()), rel=1e-4)
    # In training the last layer sees what ghost batches give.
    model.train()
    with torch.no_grad():
        normalized = [F.relu(model.ghost(model.first(batch))) for batch in data]
    train = by_name["last"].train
    assert train is not None
    assert train.mismatch == pytest.approx(float(mismatch(normalized, 1e-5).mean()), rel=1e-3)


@pytest.mark.parametrize("layout", RowLayout)
def test_groups_are_consecutive_in_the_micro_batch_as_it_runs_alone(layout: RowLayout) -> None:
    """Two micro-batches of two samples with three rows each, in groups of two rows."""
    samples = torch.arange(2)[:, None, None, None].expand(2, 2, 3, 1).double()
    alone = torch.arange(6).double() // 2
    group = samples.reshape(2, 6) * 3 + alone  # as each micro-batch sees it, consecutive or interleaved
    blocks = group.reshape(2, 3, 2).transpose(0, 1)
    rows = (group if layout is RowLayout.CONSECUTIVE else blocks).reshape(-1)
    grouping = Grouping(4, 2, 12, layout, group_rows=2)
    assert (grouping.groups, grouping.groups_per_micro_batch) == (6, 3)
    found = grouping.group_of_row(torch.device("cpu"))
    assert found is not None
    assert found.tolist() == rows.tolist()
    mean, variance = grouping.group_moments(rows[:, None], 1e-5)
    assert mean[:, 0].tolist() == list(range(6))
    assert not variance.any()


def test_a_group_that_does_not_divide_the_micro_batch_is_refused() -> None:
    model = nn.Sequential(GhostNorm(2, rows=4))
    with pytest.raises(ModelError, match=r"rows_per_group gave 4, which does not divide 6 rows"):
        scan(model, images(4, 6, 2, 4, 4), 6, num_batches=4)
