"""Batch Renorm on workers, against a layer for each worker; what batches sorted by class do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnprobe import lab
from bnprobe.lab.experiment import Budget
from bnprobe.lab.layers import BatchRenorm
from bnprobe.lab.renorm import BATCH_NORM, MIXED, SCRATCH, SORTED, Renorm, WorkersRenorm

CHANNELS, BATCH, WORKERS = 3, 4, 5


def inputs() -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return 3 + 2 * torch.randn(WORKERS * BATCH, CHANNELS, 2, 2, dtype=torch.float64, generator=draws)


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.2, 0.5), (3.0, 5.0)])
def test_workers_normalize_for_themselves_and_share_their_averages(r_max: float, d_max: float) -> None:
    ours = WorkersRenorm(CHANNELS, BATCH, r_max, d_max).double()
    alone = [BatchRenorm(CHANNELS, r_max=r_max, d_max=d_max).double() for _ in range(WORKERS)]
    for layer in (ours, *alone):
        layer.running_mean += 2.5
    x = inputs().requires_grad_()
    parts = [layer(part) for layer, part in zip(alone, x.split(BATCH), strict=True)]
    weights = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).reshape(x.shape)
    results = []
    for y in (ours(x), torch.cat(parts)):
        results.append((y, *torch.autograd.grad((y * weights).sum(), x)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    for name in ("running_mean", "running_var"):
        expected = torch.stack([getattr(layer, name) for layer in alone]).mean(0)
        torch.testing.assert_close(getattr(ours, name), expected)


def test_open_limits_train_as_at_inference_and_closed_ones_do_not() -> None:
    opened, closed = (WorkersRenorm(CHANNELS, 2, *limits).double() for limits in ((50.0, 50.0), (1.0, 0.0)))
    for layer in (opened, closed):
        at_inference = layer.eval()(inputs())
        differences = (layer.train()(inputs()) - at_inference).abs().max().item()
        assert (differences < 1e-9) == (layer is opened)


def test_batch_norm_suffers_from_small_batches_sorted_by_class() -> None:
    """Theory fixes the sign: of one class, statistics are not those of all, which inference uses."""

    def accuracy(kind: str, size: int) -> object:
        torch.manual_seed(0)
        condition = {"start": SCRATCH, "norm": BATCH_NORM, "batches": kind, "batch": size}
        return Renorm().trial(condition, 0, Budget(0.4))["accuracy"]

    mixed, of_one_class = accuracy(MIXED, 32), accuracy(SORTED, 2)
    assert isinstance(mixed, float)
    assert isinstance(of_one_class, float)
    assert of_one_class < mixed - 0.1


def test_a_run_has_a_figure_at_every_place_of_every_chart() -> None:
    found = lab.run("renorm", budget=0.01, seeds=1, jobs=1)
    assert len(found.claims) == 10
    assert all(None not in series.y for chart in found.charts for series in chart.series)
