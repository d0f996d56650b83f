"""The same on a CUDA device."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from bnprobe.commands.scan import scan
from bnprobe.errors import DeviceError
from bnprobe.nn import BatchRenorm2d
from support.compare import assert_same_figures
from support.fingerprint import fingerprint
from support.networks import InvertedBottleneck, Residual, UNet, images, unsettled

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _full_precision() -> Any:
    """TF32 would round the convolutions to three digits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("make", [Residual, InvertedBottleneck, UNet])
@pytest.mark.parametrize("emulate", [True, False])
def test_cuda_equals_cpu(make: type[nn.Module], emulate: bool) -> None:
    model, data = unsettled(make()), images(9, 2, 3, 8, 8)
    there = scan(model, data, 2, num_batches=9, device="cuda", emulate=emulate)
    assert there.scan.device.startswith("cuda")
    assert there.scan.emulated == emulate
    assert_same_figures(there, scan(model, data, 2, num_batches=9, device="cpu", emulate=emulate), rel=1e-3)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_every_dimension(dimensions: int) -> None:
    model, data = unsettled(Residual(dimensions)), images(6, 3, 3, *[5] * dimensions)
    there = scan(model, data, 3, num_batches=6, device="cuda")
    assert_same_figures(there, scan(model, data, 3, num_batches=6, device="cpu"), rel=1e-3)


def test_channels_last() -> None:
    model = unsettled(Residual()).to(memory_format=torch.channels_last)
    data = [x.to(memory_format=torch.channels_last) for x in images(6, 4, 3, 8, 8)]
    there = scan(model, data, 4, num_batches=6, device="cuda")
    assert_same_figures(there, scan(model, data, 4, num_batches=6, device="cpu"), rel=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_autocast(dtype: str) -> None:
    model, data = unsettled(Residual()), images(6, 4, 3, 8, 8)
    half = scan(model, data, 4, num_batches=6, device="cuda", autocast=dtype)
    assert half.scan.autocast == dtype
    full = scan(model, data, 4, num_batches=6, device="cuda")
    assert half.layers[1].train != full.layers[1].train
    assert_same_figures(half, full, rel=0.1)


def test_sync_batch_norm() -> None:
    model, data = unsettled(Residual(norm=nn.SyncBatchNorm)), images(6, 2, 3, 5, 5)
    there = scan(model, data, 2, num_batches=6, device="cuda")
    assert_same_figures(there, scan(model, data, 2, num_batches=6, device="cpu"), rel=1e-3)


def test_batch_renorm() -> None:
    """It corrects its batches, whose statistics are then not those of plain BN."""
    norm = partial(BatchRenorm2d, r_max=3.0, d_max=5.0)
    model, data = unsettled(Residual(norm=norm)), images(6, 4, 3, 8, 8)
    there = scan(model, data, 4, num_batches=6, device="cuda")
    assert_same_figures(there, scan(model, data, 4, num_batches=6, device="cpu"), rel=1e-3)


def test_a_mean_far_from_zero_beside_the_spread() -> None:
    model = nn.BatchNorm2d(3)
    model.running_mean.fill_(1000.0)
    model.running_var.fill_(1e-4)
    data = [1000 + 0.01 * batch for batch in images(5, 2, 3, 16, 16)]
    report = scan(model, data, 2, num_batches=5, device="cuda")
    assert report.layers[0].train.r.mean == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_the_model_comes_back_to_where_it_was(home: str) -> None:
    model, data = unsettled(Residual()).to(home), images(5, 2, 3, 5, 5)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    torch.cuda.init()
    before = fingerprint(model)
    for device in ("auto", "cuda", "cpu"):
        scan(model, data, 2, num_batches=5, device=device)
        assert fingerprint(model) == before


def test_a_device_of_that_number_is_not_there() -> None:
    with pytest.raises(DeviceError, match="This machine has cpu and cuda:0 to"):
        scan(unsettled(Residual()), images(5, 2, 3, 5, 5), 2, device="cuda:99")


def test_the_random_state_of_the_device_comes_back() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    scan(model, images(5, 2, 3, 5, 5), 2, num_batches=5, device="cuda")
    assert torch.equal(torch.rand(4, device="cuda"), expected)
