from __future__ import annotations

import pytest
import torch
from torch import nn

from bnprobe.nn import BatchRenorm1d, BatchRenorm2d, watch_clipping


def _net() -> nn.Sequential:
    """Three channels, one of which is clipped in r and d, one in d alone; and two that are never clipped."""
    net = nn.Sequential(BatchRenorm1d(3, momentum=0.0), nn.Linear(3, 2), BatchRenorm1d(2, r_max=1e9, d_max=1e9))
    net[0].running_mean.copy_(torch.tensor([0.0, 100.0, 100.0]))
    net[0].running_var.copy_(torch.tensor([1.0, 1e-4, 1.0]))
    return net


X = torch.tensor([[-1.0, 1.0, 1.0], [1.0, -1.0, -1.0]])


def test_fractions_are_over_channels_layers_and_steps() -> None:
    net = _net()
    with watch_clipping(net) as watch:
        assert watch.read() is None
        for _ in range(3):
            net(X)
        assert watch.read() == pytest.approx((1 / 5, 2 / 5))
        assert watch.read() is None
        net[0].running_mean.zero_()
        net(X)
        assert watch.read() == pytest.approx((1 / 5, 0.0))


def test_plain_batch_norm_clips_everything() -> None:
    layer = BatchRenorm2d(4, r_max=1, d_max=0)
    with watch_clipping(layer) as watch:
        layer(torch.randn(2, 4, 3, 3))
        assert watch.read() == (1.0, 1.0)


def test_inference_is_not_counted() -> None:
    net = _net().eval()
    with watch_clipping(net) as watch:
        net(X)
        assert watch.read() is None


def test_watching_changes_nothing_and_ends() -> None:
    net, twin = _net(), _net()
    twin.load_state_dict(net.state_dict())
    with watch_clipping(net) as watch:
        assert torch.equal(net(X), twin(X))
    net(X)
    assert watch.read() == pytest.approx((1 / 5, 2 / 5))
    assert watch.read() is None
    assert list(net.state_dict()) == list(twin.state_dict())


def test_the_last_watch_counts_and_closing_the_first_does_not_end_it() -> None:
    net = _net()
    first, last = watch_clipping(net), watch_clipping(net)
    first.close()
    net(X)
    assert first.read() is None
    assert last.read() == pytest.approx((1 / 5, 2 / 5))


def test_a_model_without_such_layers_has_nothing_to_read() -> None:
    with watch_clipping(nn.Linear(2, 2)) as watch:
        assert watch.read() is None


def test_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    net = _net()
    with watch_clipping(net) as watch:
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            compiled(X)
        assert watch.read() == pytest.approx((1 / 5, 2 / 5))
