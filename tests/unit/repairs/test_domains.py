from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnprobe
from bnprobe.errors import UserCodeError
from bnprobe.nn import domain
from bnprobe.repairs.domains import recalibrate_domains

CPU = torch.device("cpu")
SIZES = (5, 5, 3)


def batches(shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Of three domains, of which the last has no sample."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in SIZES:
        which = torch.randint(0, 2, (size,), generator=generator)
        x = torch.randn(size, 3, *shape, generator=generator)
        found.append((100 + x + 5 * which.view(-1, 1, *[1] * len(shape)), which))
    return found


def mixed(model: nn.Module, batch: Any) -> Any:
    with domain(batch[1]):
        return model(batch[0])


def one_by_one(model: nn.Module, batch: Any) -> Any:
    for image, which in zip(*batch, strict=True):
        with domain(int(which)):
            model(image[None])


@pytest.mark.parametrize("shape", [(), (4, 5)])
@pytest.mark.parametrize("forward", [mixed, one_by_one])
def test_statistics_are_pooled_over_the_samples_of_a_domain(
    shape: tuple[int, ...], forward: Callable[[nn.Module, Any], Any]
) -> None:
    """In batches of different sizes, and calls of different data."""
    norm: nn.Module = nn.BatchNorm2d(3) if shape else nn.BatchNorm1d(3)
    model = bnprobe.convert(nn.Sequential(nn.Dropout(), norm), to="per-domain", domains=3).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    recalibrate_domains(model.eval(), batches(shape), forward, CPU)
    values, which = (torch.cat(each) for each in zip(*batches(shape), strict=True))
    for k in range(2):
        own = values[which == k].double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(model[1].domain_mean[k].double(), own.mean(1), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(model[1].domain_var[k].double(), own.var(1), rtol=1e-5, atol=1e-6)
    for name in ("domain_mean", "domain_var"):
        assert torch.equal(model.get_buffer(f"1.{name}")[2], before[f"1.{name}"][2])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(model.get_buffer(f"1.{name}"), before[f"1.{name}"])


def test_the_model_is_given_back_in_its_modes_after_an_error() -> None:
    model = bnprobe.convert(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)), to="per-domain").train()
    model[1].eval()

    def forward(model: nn.Module, batch: Any) -> Any:
        assert not model[0].training
        mixed(model, batch)
        raise ValueError("mine")

    with pytest.raises(UserCodeError, match="calling forward"):
        recalibrate_domains(model, batches(()), forward, CPU)
    assert [module.training for module in model.modules()] == [True, True, False]
    assert model[1].track_running_stats
    assert not model[1]._forward_pre_hooks
