"""The same on a CUDA device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bnprobe.nn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, RenormSchedule, watch_clipping

pytestmark = pytest.mark.cuda

LAYERS = [
    (BatchRenorm1d, (6, 4)),
    (BatchRenorm1d, (6, 4, 9)),
    (BatchRenorm2d, (3, 4, 8, 8)),
    (BatchRenorm3d, (2, 4, 3, 5, 5)),
]


@pytest.mark.parametrize(("kind", "shape"), LAYERS)
@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.1, 0.2), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cuda_equals_cpu(
    kind: type[nn.Module], shape: tuple[int, ...], limits: tuple[float, float], dtype: torch.dtype
) -> None:
    here = kind(4, r_max=limits[0], d_max=limits[1], dtype=dtype)
    nn.init.normal_(here.weight)
    there, results = copy.deepcopy(here).cuda(), []
    x, seed = (2 * torch.randn(shape) + 1).to(dtype), torch.randn(shape).to(dtype)
    for layer, device in ((there, "cuda"), (here, "cpu")):
        leaf = x.to(device).requires_grad_()
        for _ in range(2):
            y = layer(leaf)
        gradients = torch.autograd.grad(y, (leaf, layer.weight, layer.bias), seed.to(device))
        results.append([part.cpu() for part in (y, *gradients, layer.running_mean, layer.running_var)])
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_and_channels_last(dtype: torch.dtype, layout: torch.memory_format) -> None:
    layer = BatchRenorm2d(8).cuda()
    wide, x = copy.deepcopy(layer), torch.randn(4, 8, 16, 16, device="cuda").to(dtype).to(memory_format=layout)
    leaves = [x.clone().requires_grad_(), x.float().requires_grad_()]
    outputs = [layer(leaves[0]), wide(leaves[1])]
    for y in outputs:
        y.float().pow(3).sum().backward()
    assert outputs[0].dtype == dtype
    assert outputs[0].stride() == leaves[0].grad.stride() == x.stride()
    assert_close(outputs[0].float(), outputs[1], rtol=0.02, atol=0.02)
    assert_close(layer.weight.grad, wide.weight.grad, rtol=0.02, atol=1.0)
    assert_close(layer.running_var, wide.running_var, rtol=1e-4, atol=0)


def test_no_waiting_for_the_device() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchRenorm2d(4, momentum=None), BatchRenorm2d(4)).cuda()
    schedule, x = RenormSchedule(4), torch.randn(2, 3, 8, 8, device="cuda")
    schedule.attach(net)
    with watch_clipping(net) as watch:
        net(x).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            net(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert watch.read() is not None


def test_one_value_per_channel_and_a_variance_far_below_the_mean() -> None:
    layer = BatchRenorm1d(2).cuda()
    assert torch.isfinite(layer(torch.randn(1, 2, device="cuda"))).all()
    layer = BatchRenorm2d(2, momentum=1.0).cuda()
    x = 1000 + 0.01 * torch.randn(8, 2, 32, 32, device="cuda")
    layer(x)
    assert_close(layer.running_var.double(), x.double().var((0, 2, 3)), rtol=0.01, atol=0)


def test_compiled() -> None:
    torch._dynamo.reset()
    layer, x = BatchRenorm2d(4, r_max=1.1, d_max=0.1).cuda(), torch.randn(2, 4, 8, 8, device="cuda")
    twin, results = copy.deepcopy(layer), []
    for model, one in ((torch.compile(layer, fullgraph=True), layer), (twin, twin)):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        results.append([y, *torch.autograd.grad(y.pow(3).sum(), [leaf, *one.parameters()]), one.running_var])
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
