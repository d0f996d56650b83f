"""A scan of ghost batch norm against the layers themselves, run on real micro-batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bnprobe
from bnprobe.config.spec import ScanSettings
from bnprobe.errors import ModelError
from bnprobe.measure.evidence import Evidence, by_layer
from bnprobe.measure.reader import Reader
from bnprobe.measure.scan_loop import probe
from bnprobe.measure.session import no_progress
from bnprobe.nn import GhostBatchNorm2d
from support.running import session_of

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


def measured(model: nn.Module) -> Evidence:
    """What a scan measures, also for batches of twice the size."""
    session, reader = session_of(model), Reader([x for (x,) in batches()], SIZE)
    with session.installed():
        evidence = probe(session, reader, ScanSettings(batches=BATCHES, batch_sizes=(2 * SIZE,)), no_progress)
    assert evidence is not None
    return evidence


def test_batches_are_not_said_to_be_composed_where_samples_are_not_told_apart() -> None:
    evidence = measured(network())
    [(indices, calls)] = evidence.side_by_side(by_layer(evidence.eval.calls))
    assert indices == [0, 1]
    for path in (evidence.eval, evidence.batch_sizes[2 * SIZE]):
        assert evidence.composed(calls, path).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("plain", [1, 4])
def test_a_layer_beside_one_of_plain_bn_does_not_change_the_number_of_larger_batches(plain: int) -> None:
    model = network()
    model[plain] = nn.BatchNorm2d(8)
    assert measured(model).batch_sizes[2 * SIZE].batches == BATCHES // 2
