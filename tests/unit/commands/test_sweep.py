"""A sweep against scans one by one, and its replay against networks that really train."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from bnprobe.analysis.momentum import MomentumPlan, momentum_sweep
from bnprobe.commands.scan import scan
from bnprobe.commands.sweep import sweep
from bnprobe.config.spec import ScanSettings
from bnprobe.errors import UsageError
from bnprobe.measure import momentum_series
from bnprobe.measure.layers import find_layers
from bnprobe.measure.momentum_series import Recording, record, storage
from bnprobe.measure.reader import Reader
from bnprobe.measure.restore import untouched
from bnprobe.measure.session import Session, UserFunctions, no_progress
from bnprobe.records import SweepReport
from bnprobe.report import RenderOptions, render
from bnprobe.rules.shares import flagging_limit
from bnprobe.stats.ema import replay, weights
from support.networks import BatchAttention, Flat, Residual, Siamese, images, unsettled

DATA = images(64, 4, 3, 6, 6)
RATES = (0.3, 0.1, 0.01, None)


def _residual(**options: object) -> nn.Module:
    return unsettled(Residual(**options))


def _record(model: nn.Module, data: list[Tensor], **settings: object) -> Recording:
    with untouched(model):
        layers = find_layers(model, lambda *names: True)
        session = Session(model, layers, UserFunctions(), torch.device("cpu"))
        return record(session, Reader(data, len(data[0])), ScanSettings(**settings), no_progress)


def _settled_on(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.cat(batches))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 0.1
    return model.eval()


# ---- batch sizes


def test_every_size_of_the_eval_path_is_what_a_scan_at_that_size_measures() -> None:
    model = _residual()
    found = sweep(model, DATA, 4, batch_sizes=(1, 2, 16), num_batches=64)
    for index, layer in enumerate(found.layers):
        assert [point.batch_size for point in layer.eval] == [1, 2, 4, 16]
        for point in layer.eval:
            again = torch.cat(DATA).split(point.batch_size)
            alone = scan(model, list(again), point.batch_size, num_batches=256 // point.batch_size).layers[index]
            assert alone.eval is not None
            assert point.batches == 256 // point.batch_size
            assert point.mismatch == pytest.approx(alone.eval.mismatch, rel=1e-5)
            assert point.interval == pytest.approx(alone.eval.interval, rel=1e-4)
            assert point.limit == pytest.approx(flagging_limit(alone), rel=0.01)


@pytest.mark.parametrize(
    ("shift", "standings"),
    [
        (0.0, ["fails", "fails", "passes", "passes"]),  # noise of 16 values is within its limit, 14
        (0.3, ["fails", "fails", "fails", "fails"]),  # and beyond the limit of all else, 32
        (0.15, ["fails", "fails", "fails", "passes"]),  # half of one limit and more than half of the other
    ],
)
def test_a_sweep_judges_a_layer_at_every_size_as_a_scan_at_that_size(shift: float, standings: list[str]) -> None:
    data, sizes = images(512, 2, 6, seed=6), (2, 8, 16, 32)
    model = _settled_on(nn.Sequential(nn.BatchNorm1d(6)), data)
    model[0].running_mean += shift
    (layer,) = sweep(model, data, 2, batch_sizes=sizes, num_batches=512, thresholds={"*": 32.0}).layers
    assert [point.standing for point in layer.eval] == standings
    for point in layer.eval:
        again = list(torch.cat(data).split(point.batch_size))
        (alone,) = scan(model, again, point.batch_size, num_batches=len(again)).layers
        assert alone.flagged == (point.standing == "fails")
        assert point.limit == pytest.approx(flagging_limit(alone), rel=0.03)


def test_the_samples_of_a_ragged_batch_are_what_the_user_says() -> None:
    nodes = images(16, 32, 6)
    loader = DataLoader([{"nodes": each, "edges": torch.zeros(2, 50)} for each in nodes], batch_size=None)
    report = sweep(
        unsettled(Flat()),
        loader,
        batch_sizes=(),
        num_batches=16,
        forward=lambda model, batch: model(batch["nodes"]),
        batch_size_of=lambda batch: 4,
    )
    assert (report.scan.batch_size, report.scan.images) == (4, 64)


def test_the_train_path_is_measured_at_each_size_beside_the_scanned_one() -> None:
    model = _residual()
    loader = DataLoader(TensorDataset(torch.cat(DATA)), batch_size=4)
    found = sweep(model, loader, 4, batch_sizes=(2,), train_sizes=(8,), num_batches=16)
    alone = scan(model, loader, 8, num_batches=16)
    for layer, scanned in zip(found.layers, alone.layers, strict=True):
        assert [point.batch_size for point in layer.train] == [4, 8]
        assert scanned.train is not None
        assert (layer.train[1].mismatch, layer.train[1].batches) == (scanned.train.mismatch, 16)


def test_images_that_fit_the_statistics_follow_the_theory() -> None:
    data = images(400, 2, 6, seed=5)
    model = _settled_on(nn.Sequential(nn.BatchNorm1d(6)), data)
    (layer,) = sweep(model, data, 2, batch_sizes=(4, 8, 32), num_batches=400).layers
    for point in layer.eval:
        assert point.mismatch == pytest.approx(point.theory, rel=0.15)
        assert point.equivalent_batch_size == pytest.approx(point.batch_size, rel=0.2)
    assert layer.eval[0].theory == pytest.approx(layer.eval[0].mismatch)


def test_the_smallest_size_is_the_first_from_which_on_all_layers_pass() -> None:
    data = images(512, 2, 6, seed=6)
    model = _settled_on(nn.Sequential(nn.BatchNorm1d(6)), data)
    found = sweep(model, data, 2, batch_sizes=(8, 64), num_batches=512, thresholds={"*": 5.0})
    assert (found.smallest.surely, found.smallest.likely) == (8, 8)
    assert found.layers[0].smallest == found.smallest
    assert [point.standing for point in found.layers[0].eval] == ["fails", "passes", "passes"]
    assert "The smallest batch size at which every layer passes at inference is 8." in _printed(found)
    strict = sweep(model, data, 2, batch_sizes=(8, 16), num_batches=512, thresholds={"*": 100.0})
    assert (strict.smallest.surely, strict.smallest.likely) == (None, None)
    assert "No batch size up to 16 lets every layer pass" in _printed(strict)


def test_the_slowest_layer_decides_for_the_model() -> None:
    data = images(512, 2, 6, seed=6)
    model = _settled_on(nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6)), data)
    thresholds = {"0": 1.5, "1": 5.0}
    found = sweep(model, data, 2, batch_sizes=(8, 64), num_batches=512, thresholds=thresholds)
    assert [layer.smallest.likely for layer in found.layers] == [2, 8]
    assert found.smallest.likely == 8


def test_wrong_statistics_are_not_blamed_on_the_batch_size() -> None:
    found = sweep(_residual(), DATA, 4, batch_sizes=(64,), num_batches=64)
    assert found.smallest.likely is None
    assert "the batch size does not explain that" in _printed(found)


def test_sizes_beyond_half_of_the_data() -> None:
    loader = DataLoader(TensorDataset(torch.cat(DATA[:8])), batch_size=4)  # 32 images
    with pytest.raises(UsageError, match=r"batch_sizes 32 is more than half of the 32 samples"):
        sweep(_residual(), loader, 4, batch_sizes=(2, 32))
    with pytest.raises(UsageError, match=r"train_sizes 17 is more than half of the 32 samples"):
        sweep(_residual(), loader, 4, train_sizes=(17,))
    with pytest.raises(UsageError, match=r"batch_sizes 0 is not a batch size"):
        sweep(_residual(), loader, 4, batch_sizes=(0, 2))
    found = sweep(_residual(), loader, 4)
    assert [point.batch_size for point in found.layers[0].eval] == [1, 2, 4, 8, 16]
    assert any("Batch size 32, 64 was left out, because 32 samples" in note for note in found.notes)
    fewer = sweep(_residual(), loader, 4, num_batches=4)
    assert [point.batch_size for point in fewer.layers[0].eval] == [1, 2, 4, 8]


def test_enough_images_are_measured_for_the_largest_size_unless_someone_said_how_many() -> None:
    model, data = _residual(), images(300, 1, 3, 6, 6)
    enough = sweep(model, data, 1, batch_sizes=(32,), max_batches=None)
    assert enough.layers[0].eval[-1].batches >= 8
    limited = sweep(model, data, 1, batch_sizes=(8,), max_batches=16)
    assert limited.layers[0].eval[-1].batches == 2


def test_images_that_cannot_be_regrouped_are_swept_at_their_own_size_only() -> None:
    model, data = unsettled(BatchAttention()), images(64, 4, 6)
    with pytest.raises(UsageError, match="regroups samples"):
        sweep(model, data, 4, batch_sizes=(8,), num_batches=16)
    found = sweep(model, data, 4, num_batches=32, momentum=MomentumPlan(RATES))
    assert [point.batch_size for point in found.layers[0].eval] == [4]
    assert any("regroups samples" in note for note in found.notes)
    assert found.momentum is not None


# ---- rates


@pytest.mark.parametrize("network", [Residual, lambda: Siamese(together=False)], ids=["residual", "two calls"])
@pytest.mark.parametrize("emulate", [True, False])
def test_the_replay_gives_the_statistics_of_a_network_that_really_trains(network: type, emulate: bool) -> None:
    model = unsettled(network()).double()
    shape = (2, 3, 6, 6) if isinstance(model, Siamese) else (3, 6, 6)
    data = [batch.double() for batch in images(20, 4, *shape)]
    recording = _record(model, data, batches=20, emulate=emulate)
    assert len(recording.series) == 2
    for rate in RATES:
        trained = copy.deepcopy(model).train()
        for module in trained.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = rate
        with torch.no_grad():
            for batch in data:
                trained(batch)
        for series in recording.series:
            expected = trained.get_submodule(series.layer.name)
            found = replay(series.stream, series.start, weights([rate], len(series.stream.values), 0), 1e-5)
            torch.testing.assert_close(found.mean[0], expected.running_mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.variance[0], expected.running_var, rtol=1e-12, atol=1e-12)


def test_recording_keeps_within_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage(100, 50, 100 * 50 * 8) == (False, 50)
    assert storage(100, 50, 100 * 50 * 8 - 1) == (True, 50)
    assert storage(100, 50, 100 * 30 * 4) == (True, 30)
    model, values = _residual(), 16  # mean and variance of two layers of four channels
    whole = _record(model, DATA, batches=40)
    assert (whole.batches, whole.bytes, whole.single, whole.cut) == (40, 40 * values * 8, False, False)
    monkeypatch.setattr(momentum_series, "MEMORY_CAP", 40 * values * 4)
    single = _record(model, DATA, batches=40)
    assert (single.batches, single.bytes, single.single, single.cut) == (40, 40 * values * 4, True, False)
    monkeypatch.setattr(momentum_series, "MEMORY_CAP", 24 * values * 4)
    fewer = _record(model, DATA, batches=40)
    assert (fewer.batches, fewer.bytes, fewer.single, fewer.cut) == (24, 24 * values * 4, True, True)
    for one, other in zip(single.series, whole.series, strict=True):
        torch.testing.assert_close(one.stream.mean.double(), other.stream.mean, rtol=1e-6, atol=1e-7)


def test_slow_rates_track_best_without_a_change_and_fast_ones_with_it() -> None:
    data = images(200, 4, 6, seed=7)
    model = _settled_on(Flat(), data)
    plan = MomentumPlan((0.5, 0.1, 0.01), shift=2.0)
    found = sweep(model, data, 4, batch_sizes=(8,), num_batches=200, momentum=plan).momentum
    assert found is not None
    assert (found.batches, found.dtype, found.shift, found.scale) == (200, "float64", 2.0, 1.0)
    curve = found.model
    assert [point.rate for point in curve.points] == [0.5, 0.1, 0.01]
    assert curve.best.converged[0] == 0.01
    assert 0.5 not in curve.best.converged
    assert curve.best.shifted[0] == 0.5
    fast, own, slow = curve.points
    assert fast.recovery is not None
    assert own.recovery is not None
    assert fast.recovery < own.recovery <= 40
    assert slow.recovery is None
    assert slow.shifted is not None
    assert slow.shifted.mismatch > 5 * slow.converged.mismatch
    assert (curve.momentum, curve.one_momentum) == (0.1, True)


def test_wrong_statistics_are_left_behind_by_fast_rates_only() -> None:
    data = images(64, 4, 6, seed=7)
    model = _settled_on(Flat(), data)
    with torch.no_grad():
        model.get_submodule("body.1").running_mean += 3.0
    found = momentum_sweep(_record(model, data, batches=64), MomentumPlan((0.1, 0.001)), 4)
    first = found.layers[0]
    assert first.best.loaded == (0.1,)
    assert 0.001 in first.best.converged
    slow = first.points[-1]
    assert slow.loaded.mismatch > 5 * slow.converged.mismatch


def test_the_mean_over_layers_is_that_of_their_curves_and_a_scale_is_a_change_too() -> None:
    found = momentum_sweep(_record(_residual(), DATA, batches=64), MomentumPlan(RATES, scale=2.0), 4)
    for index, point in enumerate(found.model.points):
        for name in ("loaded", "converged", "shifted"):
            each = [getattr(curve.points[index], name).mismatch for curve in found.layers]
            assert getattr(point, name).mismatch == pytest.approx(sum(each) / len(each))
    assert found.model.points[2].shifted is not None
    assert found.model.points[2].shifted.mismatch > 1.5 * found.model.points[2].converged.mismatch


def test_the_rates_of_the_layers_are_replayed_too() -> None:
    model = _residual(momentum=0.07)
    model.bn2.momentum = None
    found = momentum_sweep(_record(model, DATA, batches=32), MomentumPlan((0.5,)), 4)
    assert [point.rate for point in found.model.points] == [0.5, 0.07, None]
    assert [curve.momentum for curve in found.layers] == [0.07, None]
    assert (found.model.momentum, found.model.one_momentum) == (None, False)


def test_layers_that_training_does_not_update_are_left_out_with_a_reason() -> None:
    model = Residual()
    model.bn2 = nn.BatchNorm2d(4, track_running_stats=False)
    found = momentum_sweep(_record(model, DATA, batches=32), MomentumPlan(RATES), 4)
    assert [curve.layer for curve in found.layers] == ["bn1"]
    assert [(layer.name, "no running statistics" in layer.reason) for layer in found.omitted] == [("bn2", True)]
    with pytest.raises(UsageError, match="statistics are updated in training: one value per channel"):
        momentum_sweep(_record(Flat(), images(32, 1, 6), batches=32), MomentumPlan(RATES), 1)


def test_too_few_batches_for_a_replay() -> None:
    with pytest.raises(UsageError, match=r"at least 16 micro-batches, and 8 of 4 samples"):
        _record(_residual(), DATA[:8])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (MomentumPlan((0.1, 1.5)), r"momentum 1.5 is out of range"),
        (MomentumPlan((0.0,)), r"momentum 0 is out of range"),
        (MomentumPlan((float("nan"),)), r"momentum nan is out of range"),
        (MomentumPlan(()), "at least one rate"),
        (MomentumPlan(scale=0.0), "scale 0 is out of range"),
        (MomentumPlan(shift=float("inf")), "shift inf is not a finite number"),
    ],
)
def test_plans_that_mean_nothing_are_refused_before_anything_is_measured(plan: MomentumPlan, message: str) -> None:
    def fail(done: int, planned: int) -> None:
        pytest.fail("something was measured")

    with pytest.raises(UsageError, match=message):
        sweep(_residual(), DATA, 4, momentum=plan, progress=fail)


# ---- the whole


def test_the_model_comes_back_untouched() -> None:
    model = _residual()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    sweep(model, DATA, 4, batch_sizes=(2,), num_batches=32, momentum=MomentumPlan(RATES, 1.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_ctrl_c_while_recording_keeps_what_was_measured() -> None:
    passes = 0

    def interrupt(done: int, planned: int) -> None:
        nonlocal passes
        passes += done == 0
        if passes == 2:
            raise KeyboardInterrupt

    found = sweep(
        _residual(), DATA, 4, batch_sizes=(2,), num_batches=32, momentum=MomentumPlan(RATES), progress=interrupt
    )
    assert (found.partial, found.momentum) == (True, None)
    assert len(found.layers[0].eval) == 2
    assert "(PARTIAL)" in _printed(found)


def test_reports_fit_their_page_and_json_has_no_nan() -> None:
    model = _residual()
    found = sweep(model, DATA, 4, batch_sizes=(1, 8), num_batches=32, momentum=MomentumPlan(RATES, 1.0, 2.0))
    long = replace(
        found, layers=tuple(replace(layer, name="block." * 12 + str(i)) for i, layer in enumerate(found.layers))
    )
    for report in (found, long):
        for width in (40, 60, 80, 120):
            text = render(report, "terminal", RenderOptions(width=width, unicode=False))
            assert text.isascii()
            assert max(map(len, text.splitlines())) <= width
    written = json.loads(render(found, "json"), parse_constant=pytest.fail)
    assert written["schema_version"] == 1
    assert [point["rate"] for point in written["momentum"]["model"]["points"]] == [0.3, 0.1, 0.01, None]


def _printed(report: SweepReport) -> str:
    """The terminal report in one line."""
    return " ".join(render(report).split())
