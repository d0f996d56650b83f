"""Shares of real networks with one thing wrong at a time, and what must hold of them always."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from bnprobe import scan
from bnprobe.errors import DeviceError
from bnprobe.records import Layer, Report, Shares
from support.networks import Dense, Flat, Residual, Siamese, UNet, images, unsettled

SIZE = 8


def pictures(batches: int, seed: int = 0, sorted_: bool = False) -> list[Tensor]:
    """Images whose brightness and contrast differ from image to image; sorted: those of a batch resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    count = batches * SIZE
    level = torch.randn(count, 3, 1, 1, generator=generator)
    if sorted_:
        level = level[level[:, 0, 0, 0].argsort()]
        groups = torch.randperm(batches, generator=generator)
        level = level.unflatten(0, (batches, SIZE))[groups].flatten(0, 1)
    return list((level + torch.randn(count, 3, 6, 6, generator=generator)).split(SIZE))


def trained(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Running statistics that have settled on these batches."""
    model.train()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model


def total(shares: Shares) -> float:
    return shares.small_batch + (shares.composition or 0.0) + shares.lag + shares.dropout + shares.propagation


def shares_of(report: Report) -> Iterator[tuple[Layer, Shares]]:
    for layer in report.layers:
        assert layer.shares is not None
        yield layer, layer.shares


@pytest.mark.parametrize("network", [Residual, Dense, UNet, lambda: Siamese(together=False), Flat])
@pytest.mark.parametrize(("size", "options"), [(4, {}), (1, {}), (4, {"emulate": False}), (3, {"physical_batch": 6})])
def test_shares_add_up_to_the_mismatch(network: Any, size: int, options: dict[str, Any]) -> None:
    shape = (6,) if network is Flat else (3, 6, 6)
    data = images(20, size, *shape)
    report = scan(unsettled(network()), data, size, num_batches=20, forward=_call, **options)
    for layer, shares in shares_of(report):
        assert layer.eval is not None
        assert total(shares) == pytest.approx(layer.eval.mismatch, rel=1e-9)
        assert (shares.composition is None) == ("emulate" in options)
        assert size > 1 or shares.composition == 0.0


def _call(model: nn.Module, batch: Any) -> Any:
    return model(torch.stack([batch, batch.flip(-1)], 1)) if isinstance(model, Siamese) else model(batch)


def test_settled_statistics_and_shuffled_batches_leave_the_small_batch_alone() -> None:
    model = trained(Residual(), pictures(300, seed=1))
    for layer, shares in shares_of(scan(model, pictures(96), SIZE, num_batches=96)):
        assert shares.small_batch > 0.85 * layer.eval.mismatch
        assert layer.share_intervals is not None
        for name in ("composition", "lag", "propagation"):
            low, high = _ends(getattr(layer.share_intervals, name))
            assert low - 0.002 <= 0 <= high + 0.002, (layer.name, name, low, high)
        assert layer.composition is not None
        assert layer.composition.p_value > 0.001


def test_sorted_batches_are_composition() -> None:
    model = trained(Residual(), pictures(300, seed=1, sorted_=True))
    for layer, shares in shares_of(scan(model, pictures(96, sorted_=True), SIZE, num_batches=96)):
        assert shares.composition > 0.5 * layer.eval.mismatch
        assert abs(shares.lag) < 0.1 * layer.eval.mismatch
        assert layer.composition.p_value < 1e-6
        assert layer.composition.intraclass_correlation > 0.2
        expected = 1 + (SIZE - 1) * layer.composition.intraclass_correlation
        assert layer.composition.design_effect == pytest.approx(expected)


def test_statistics_of_other_weights_are_lag() -> None:
    model = trained(Residual(), pictures(300, seed=1))
    model.bn2.running_mean += 1.0
    first, second = (shares for _, shares in shares_of(scan(model, pictures(64), SIZE, num_batches=64)))
    assert second.lag > 0.8 * total(second)
    assert abs(first.lag) < 0.1 * total(first)


def test_the_ladder_starts_at_the_path_that_the_running_statistics_fit() -> None:
    """Those of a network trained at batch size 60 fit the eval path, not the noisy train path at batch size 2."""
    model = trained(Residual(), list(torch.cat(pictures(300, seed=1)).split(60)))
    data = list(torch.cat(pictures(64)).split(2))
    _, (layer, shares) = shares_of(scan(model, data, 2, num_batches=256))
    assert shares.propagation == 0
    assert layer.share_intervals.propagation is None
    assert abs(shares.lag) < 0.02 * total(shares)


def test_dropout_before_a_layer_is_dropout() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.drop(x) ** 2)

    data = [batch.abs() + 1 for batch in images(300, 64, 6)]
    model = trained(Dropped(), data)
    report = scan(model, data, 64, num_batches=32)
    ((_, shares),) = shares_of(report)
    assert shares.dropout > 0.8 * total(shares)
    assert report.scan.passes[0].name == "train path without random layers"


def test_no_random_layer_costs_no_pass_and_has_no_share() -> None:
    report = scan(trained(Residual(), pictures(40)), pictures(16), SIZE, num_batches=16)
    assert [extra.name for extra in report.scan.passes] == ["impact"]
    for layer, shares in shares_of(report):
        assert (shares.dropout, shares.data_shift) == (0.0, None)
        assert layer.share_intervals.dropout is None


def test_evaluation_data_of_another_kind_is_a_data_shift() -> None:
    model = trained(Residual(), pictures(300, seed=1))
    same = scan(model, pictures(64), SIZE, num_batches=64, evaluation=pictures(64, seed=7))
    brighter = scan(model, pictures(64), SIZE, num_batches=64, evaluation=[x + 1 for x in pictures(64, seed=7)])
    for (layer, none), (_, some) in zip(shares_of(same), shares_of(brighter), strict=True):
        assert none.data_shift < 0.015 < 0.03 < some.data_shift
        assert layer.share_intervals.data_shift[0] < 0.01
        assert total(some) == pytest.approx(total(none))  # it comes on top
    assert [extra.name for extra in same.scan.passes] == ["held-out data", "impact"]


def test_the_order_of_evaluation_data_says_nothing() -> None:
    model = trained(Residual(), pictures(300, seed=1))
    batches = pictures(64, seed=7)
    ordered = torch.cat(batches)[torch.cat(batches).mean((1, 2, 3)).argsort()].split(SIZE)
    reports = [scan(model, pictures(64), SIZE, num_batches=64, evaluation=list(data)) for data in (batches, ordered)]
    for (_, one), (_, other) in zip(*(shares_of(report) for report in reports), strict=True):
        assert one.data_shift == pytest.approx(other.data_shift, abs=0.01)


def test_upstream_noise_that_running_statistics_took_in_is_propagation() -> None:
    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    # Of heavy-tailed data a batch norm makes bounded ones, of which squares are small; its running statistics do not.
    model = nn.Sequential(nn.BatchNorm1d(4), Squares(), nn.BatchNorm1d(4))
    data = [batch.exp() for batch in images(4000, 8, 4)]
    trained(model, data)
    (_, first), (_, second) = shares_of(scan(model, data, 8, num_batches=1000))
    assert abs(first.propagation) < 0.01
    assert second.propagation > 0.1
    assert abs(second.lag) < 0.2 * second.propagation


def test_two_domains_in_one_layer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.norm(x), self.norm(2 * x + 1)], 1)

    model = trained(Two(), pictures(300, seed=1))
    (layer,) = scan(model, pictures(64), SIZE, num_batches=64).layers
    assert layer.calls_per_forward == 2
    low, high = layer.domains.interval
    assert 0.1 < low < layer.domains.mismatch < high
    assert layer.composition.p_value > 0.001  # within each call the batches are shuffled


def test_one_domain_seen_twice_is_one() -> None:
    # The network takes 2 x + 1 of the second image.
    data = [torch.stack([x, (y - 1) / 2], 1) for x, y in zip(pictures(64), pictures(64, seed=9), strict=True)]
    report = scan(trained(Siamese(together=False), data), data, SIZE, num_batches=64)
    for layer in report.layers:
        assert layer.calls_per_forward == 2
        assert layer.domains.mismatch < 0.01


def _ends(interval: tuple[float, float | None] | None) -> tuple[float, float]:
    """The ends of an interval, infinite where tails are heavy."""
    low, high = interval or (-math.inf, None)
    return low, math.inf if high is None else high


def test_intervals_cover_what_many_scans_say_on_average() -> None:
    model = trained(Residual(), pictures(300, seed=1))
    model.bn2.running_mean += 0.3
    # At a threshold that flags nothing: shares know nothing of it, and the effects of flagged layers are not measured.
    options: dict[str, Any] = {"num_batches": 24, "thresholds": 1.01}
    reports = [scan(model, pictures(24, seed=seed), SIZE, **options) for seed in range(80)]
    for position in range(2):
        layers = [report.layers[position] for report in reports]
        for name in ("small_batch", "composition", "lag"):
            values = torch.tensor([getattr(layer.shares, name) for layer in layers])
            ends = torch.tensor([_ends(getattr(layer.share_intervals, name)) for layer in layers])
            covered = (ends[:, 0] <= values.mean()) & (values.mean() <= ends[:, 1])
            assert covered.double().mean() >= 0.85, (name, position)
            if name == "composition":
                assert abs(values.mean()) < 3 * values.std() / len(reports) ** 0.5


def test_a_globally_sorted_loader_is_composition_not_lag_nor_data_shift() -> None:
    everything = torch.cat(pictures(300, seed=1))
    model = trained(nn.Sequential(nn.BatchNorm2d(3)), list(everything.split(SIZE)))
    ordered = TensorDataset(everything[everything.mean((1, 2, 3)).argsort()])
    loader = DataLoader(ordered, batch_size=SIZE)
    report = scan(model, loader, SIZE, evaluation=DataLoader(TensorDataset(everything), batch_size=SIZE))
    assert report.diagnoses[0].cause == "composition"
    assert not {"lag", "data_shift"} & {diagnosis.cause for diagnosis in report.diagnoses}
    assert all(layer.shares.data_shift < 0.02 for layer in report.layers)
    shuffled = scan(model, DataLoader(TensorDataset(everything), SIZE, shuffle=True), SIZE, evaluation=loader)
    assert all(layer.shares.data_shift < 0.02 for layer in shuffled.layers)


class Uneven(nn.Module):
    """A layer that is called twice among some that are called once, of several widths and with few rows or many."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3), nn.Conv2d(7, 7, 1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(5), nn.BatchNorm2d(7), nn.BatchNorm2d(7), nn.BatchNorm1d(7)])
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[1](self.convs[1](self.norms[0](self.convs[0](x)).relu()))
        x = self.norms[2](self.convs[2](self.drop(self.norms[2](x).relu())))
        return self.norms[3](x.mean((2, 3)))


def test_figures_do_not_depend_on_how_many_layers_are_evaluated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def report() -> Report:
        torch.manual_seed(0)
        data, held_out = pictures(24, sorted_=True), pictures(5, seed=3)
        return scan(unsettled(Uneven()), data, SIZE, num_batches=24, evaluation=held_out, batch_sizes=(2, 16))

    together = report()
    assert [layer.calls_per_forward for layer in together.layers] == [1, 1, 2, 1]
    monkeypatch.setattr("bnprobe.measure.evidence._COLUMNS", 1)
    monkeypatch.setattr("bnprobe.stats.composition._CHUNK_VALUES", 1)
    for one, other in zip(together.layers, report().layers, strict=True):
        _assert_same(asdict(one), asdict(other))


def _assert_same(found: Any, expected: Any) -> None:
    """Equal to rounding, field by field."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            _assert_same(found[name], value)
    elif isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            _assert_same(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-9, abs=1e-12) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DeviceError("no memory")])
def test_a_report_is_not_lost_to_the_ranking(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("bnprobe.measure.impact.Impacts.together", fail)
    report = scan(unsettled(Residual()), pictures(16), SIZE, num_batches=16)
    assert [layer.flagged for layer in report.layers] == [True, True]
    assert report.diagnoses
