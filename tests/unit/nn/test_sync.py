"""Batch Renorm over two processes (gloo) against one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bnprobe.nn import BatchRenorm2d, SyncBatchRenorm
from bnprobe.nn.functional import sync_batch_renorm
from bnprobe.nn.kernels import Renorm
from bnprobe.nn.sync import merge
from support import renormworkers as workers
from support.processes import run_together


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    folder = tmp_path_factory.mktemp("processes")
    run_together(2, workers.work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", workers.SIZES)
@pytest.mark.parametrize("limits", [(1.5, 0.8), (1.0, 0.0)])
def test_two_processes_are_one_big_batch(found: list[dict[str, Any]], case: str, limits: tuple[float, float]) -> None:
    expected = workers.steps(workers.layer(False, limits), workers.images(case), workers.seeds(case))
    one, other = (ranks[case if limits != (1.0, 0.0) else f"{case} plain"] for ranks in found)
    by_image = 2 * workers.STEPS
    together = [torch.cat(parts) for parts in zip(one[:by_image], other[:by_image], strict=True)]
    assert_close(together, expected[:by_image])
    added_up = [sum(parts) for parts in zip(one[by_image:][:2], other[by_image:][:2], strict=True)]
    assert_close(added_up, expected[by_image:][:2])  # DDP adds up, as for any parameter
    for buffers in (one[by_image + 2 :], other[by_image + 2 :]):
        assert_close(buffers, expected[by_image + 2 :])


def test_ddp_keeps_the_processes_together(found: list[dict[str, Any]]) -> None:
    one, other = (ranks["ddp"] for ranks in found)
    local = {"1.running_mean", "1.running_var"}  # of each process's own last batch; DDP shares them before the next
    for name, value in one.items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, other[name]) == (name not in local)


def test_alone_it_is_batch_renorm() -> None:
    one, other, x = SyncBatchRenorm(3), BatchRenorm2d(3), torch.randn(4, 3, 5, 5)
    assert torch.equal(one(x), other(x))
    assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_merging_weighs_by_count_and_adds_the_spread_of_the_means() -> None:
    values = torch.randn(10, 2, dtype=torch.float64) * 3 + 100
    parts = [values[:7], values[7:9], values[9:]]
    rows = [torch.cat([p.mean(0), p.var(0, correction=0), torch.tensor([float(len(p))])]) for p in parts]
    merged = merge(torch.stack([*rows, torch.zeros(5, dtype=torch.float64)]))  # one process has nothing
    assert_close(merged.mean, values.mean(0))
    assert_close(merged.variance, values.var(0, correction=0))
    assert merged.count == 10
    assert_close(merged.unbiased_variance(otherwise=torch.zeros(2)), values.var(0))


def test_the_function_can_be_intercepted() -> None:
    class Interceptor(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return args[0] if func is sync_batch_renorm else func(*args, **(kwargs or {}))

    x = torch.randn(2, 3)
    with Interceptor():
        assert nn.Sequential(SyncBatchRenorm(3))(x) is x


@pytest.mark.parametrize("of_std", [False, True])
@pytest.mark.parametrize("count", [0, 1])
def test_too_few_values_over_all_processes_leave_the_variance_alone(of_std: bool, count: int) -> None:
    rows = torch.zeros(2, 5, dtype=torch.float64)  # two processes and channels
    rows[0] = torch.tensor([5.0, 6.0, 0.0, 0.0, 1.0]) * count
    merged = merge(rows)
    assert_close(merged.mean, torch.tensor([5.0, 6.0], dtype=torch.float64) * count)
    mean, variance = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    Renorm(mean, variance, 0.5, 1e-5, None, 3.0, 5.0, None, of_std).step(merged, (merged.variance + 1e-5).rsqrt())
    assert_close(variance, torch.tensor([3.0, 4.0]))
    assert_close(mean, torch.tensor([3.0, 4.0]) if count else torch.tensor([1.0, 2.0]))
