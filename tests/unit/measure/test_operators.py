"""What a scan costs, counted: operators and waits for the device do not depend on the machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnprobe.analysis.findings import assemble
from bnprobe.commands.scan import scan
from bnprobe.measure.forward_pass import Pass
from support.networks import images
from support.operators import WAIT, Operators, reads
from support.running import session_of


def _deep() -> nn.Module:
    """Twelve layers, so that what a pass does once counts little, with the statistics of what they see."""
    blocks = [[nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()] for _ in range(12)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *[layer for block in blocks for layer in block])
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        for x in images(8, 64, 3, 12, 12):
            model(x)
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1  # a cumulative average is read on the host at every call
    return model


def _plain(model: nn.Module, x: Tensor, training: bool) -> int:
    with torch.no_grad(), Operators() as plain:
        model.train(training)(x)
    return plain.found.total()


@pytest.mark.parametrize("path", ["eval", "train"])
def test_operators_of_a_path_beside_those_of_a_plain_forward_pass(path: Any) -> None:
    model = _deep()
    [x] = images(1, 8, 3, 12, 12)
    session = session_of(model)
    with session.installed():
        session.forward(path, x, Pass(8, 2, per_sample=path == "eval"))  # what is found once
        with Operators() as measured, reads() as looks:
            session.forward(path, x, Pass(8, 2, per_sample=path == "eval"))
    assert measured.found.total() <= (2.3 if path == "eval" else 3.8) * _plain(model, x, path == "train")
    assert measured.found[WAIT] == 0
    assert looks == [2]  # once at all moments, on CPU alone


def test_what_a_longer_scan_adds() -> None:
    """Of a healthy network: both paths; the sums of many steps are taken together."""
    model, counts = _deep(), []
    for number in (64, 128):
        with Operators() as measured:
            report = scan(model, images(number, 2, 3, 12, 12), 2, num_batches=number, physical_batch=32)
        assert report.scan.emulated
        assert not any(layer.flagged for layer in report.layers)
        counts.append(measured.found)
    added = counts[1] - counts[0]
    [x] = images(1, 32, 3, 12, 12)
    plain = 4 * (_plain(model, x, True) + _plain(model, x, False))
    assert added.total() <= 4 * plain
    assert added[WAIT] == 64  # whether each micro-batch is finite, on the host


def test_what_further_layers_add_to_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing: the channels of all layers lie side by side."""
    found: list[int] = []

    def counted(*args: Any) -> Any:
        with Operators() as measured:
            findings = assemble(*args)
        found.append(measured.found.total())
        return findings

    monkeypatch.setattr("bnprobe.commands.scan.assemble", counted)
    for layers in (3, 30):
        model = nn.Sequential(*[nn.BatchNorm1d(4) for _ in range(layers)])
        scan(model, images(16, 4, 4), 4, num_batches=16, batch_sizes=(2,))
    assert found[0] == found[1]
