"""A scan of ghost batch norm against the layers themselves, run on real micro-batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bnprobe
from bnprobe.errors import ModelError
from bnprobe.nn import GhostBatchNorm2d

SIZE, GHOST, BATCHES = 6, 2, 16


def network(size: int = GHOST) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [GhostBatchNorm2d(8, virtual_batch_size=size) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 8, 3), norms[1], nn.Flatten())
    with torch.no_grad():
        for _ in range(50):
            model.train()(torch.randn(8, 1, 8, 8))
    return model


def batches(size: int = SIZE) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 1, 8, 8, generator=generator),) for _ in range(BATCHES)]


def test_figures_are_those_of_the_layer() -> None:
    model = network()
    report = bnprobe.scan(model, batches(), SIZE, num_batches=BATCHES)
    assert report.scan.emulated
    square = norm = 0.0
    mismatch = []
    for (images,) in batches():
        trained = copy.deepcopy(model).train()
        inputs: list[Tensor] = []
        trained[1].register_forward_pre_hook(lambda module, given, inputs=inputs: inputs.append(given[0]))
        with torch.no_grad():
            in_training, at_inference = trained(images), model.eval()(images)
            layer = copy.deepcopy(model[1])
            mismatch.append(float((layer.train()(inputs[0]) - model[1](inputs[0])).square().mean()))
        square += float((in_training - at_inference).square().sum())
        norm += float(at_inference.square().sum())
    assert report.summary.output.relative_l2 == pytest.approx((square / norm) ** 0.5, rel=1e-3)
    assert report.layers[0].train is not None
    assert report.layers[0].train.mismatch == pytest.approx(sum(mismatch) / BATCHES, rel=1e-3)
    assert report.layers[0].note == "normalizes ghost batches: figures are per part of a batch"


def test_parts_of_the_whole_batch_are_bn() -> None:
    model, plain = network(SIZE), network()
    for index in (1, 4):
        plain[index] = nn.BatchNorm2d(8)
    plain.load_state_dict(model.state_dict())
    ghosts, expected = (bnprobe.scan(each, batches(), SIZE, num_batches=BATCHES) for each in (model, plain))
    assert [layer.train for layer in ghosts.layers] == [layer.train for layer in expected.layers]


def test_parts_of_different_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"a batch of 5 rows has 3 parts of at most 2 \(virtual_batch_size\)"):
        bnprobe.scan(network(), batches(5), 5, num_batches=4)
