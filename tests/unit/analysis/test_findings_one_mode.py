"""Layers that the model runs in one mode only, or never."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bnprobe.analysis.diagnosis import has_findings
from bnprobe.commands.scan import scan
from bnprobe.config.spec import RulesSpec
from bnprobe.records import Layer, Report
from bnprobe.report import render
from support.networks import images


class Heads(nn.Module):
    """Three heads behind one layer, of which inference runs one, training two, and nobody the last."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.aux, self.extra, self.unused = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.body(x))
        return x + 0.1 * (self.aux if self.training else self.extra)(x.relu())


def trained(**statistics: tuple[float, float]) -> tuple[nn.Module, list[Tensor]]:
    """A network whose statistics fit, but for those of the layers named: (mean, variance)."""
    torch.manual_seed(0)
    model, data = Heads(), images(32, 8, 3, 8, 8)
    model.extra.train()
    for x in data * 3:
        model.train()(x)
        model.extra(model.bn(model.body(x)).relu())
    for name, (mean, variance) in statistics.items():
        layer = getattr(model, name)
        layer.running_mean.fill_(mean)
        layer.running_var.fill_(variance)
    return model, data


def scanned(**statistics: tuple[float, float]) -> tuple[Report, dict[str, Layer]]:
    model, data = trained(**statistics)
    report = scan(model, data, 8, num_batches=32)
    return report, {layer.name: layer for layer in report.layers}


def causes(report: Report, layer: str) -> list[tuple[str, str]]:
    failed = (verdict for verdict in report.verdicts if verdict.outcome == "failed" and verdict.layer == layer)
    return [(verdict.cause, verdict.severity) for verdict in failed]


def test_where_all_is_well_nothing_is_said_against_them() -> None:
    report, layers = scanned()
    assert {name: layer.only_in for name, layer in layers.items()} == {"bn": None, "aux": "train", "extra": "eval"}
    assert layers["aux"].eval is None
    assert layers["extra"].train is None
    assert layers["aux"].shares is not None
    assert layers["aux"].shares.composition is None
    assert sum(vars(layers["aux"].shares)[name] for name in ("small_batch", "lag")) == pytest.approx(
        layers["aux"].train.mismatch
    )
    assert not has_findings(report, RulesSpec())
    assert not [layer.name for layer in report.layers if layer.flagged or layer.undecided]
    text = render(report, "terminal")
    assert "3 BatchNorm2d layers: ✓ 3 fine" in text
    assert "1 layer runs in training only. 1 layer runs at inference only." in " ".join(text.split())
    assert "could not be measured" not in text
    assert "frozen" not in text
    assert "overflow" not in text


def test_statistics_that_nothing_uses_may_be_anything() -> None:
    report, layers = scanned(aux=(5.0, 0.01))
    assert layers["aux"].train.mismatch > 10
    assert layers["aux"].shares.lag > 10
    assert not layers["aux"].flagged
    assert causes(report, "aux") == []
    assert not has_findings(report, RulesSpec())


def test_a_head_of_training_that_was_never_trained_is_a_remark() -> None:
    report, _ = scanned(aux=(0.0, 1.0))
    assert causes(report, "aux") == [("never_trained", "info")]


def test_statistics_of_inference_alone_count() -> None:
    report, layers = scanned(extra=(5.0, 0.01))
    assert layers["extra"].flagged
    assert causes(report, "extra") == [("lag", "error")]
    assert has_findings(report, RulesSpec())


class SmallHead(nn.Module):
    """An auxiliary head with one value per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bn, self.aux = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.body(x))
        return self.aux(x.mean((2, 3))) if self.training else x.mean((2, 3))


def test_the_noise_of_its_batches_is_judged() -> None:
    torch.manual_seed(0)
    model, data = SmallHead(), images(32, 4, 3, 8, 8)
    for x in [torch.cat(data)] * 60:
        model.train()(x)
    report = scan(model, data, 4, num_batches=32)
    layers = {layer.name: layer for layer in report.layers}
    assert layers["aux"].flagged
    assert not layers["bn"].flagged
    assert causes(report, "aux") == [("small_batch", "error")]
    assert "runs in training only" in next(v.message for v in report.verdicts if v.outcome == "failed")


def test_a_layer_that_is_never_called_is_a_remark() -> None:
    report, layers = scanned()
    assert "unused" not in layers
    assert [(layer.name, layer.reason) for layer in report.skipped] == [("unused", "never called by the forward pass")]
    assert causes(report, "unused") == [("never_trained", "info")]
