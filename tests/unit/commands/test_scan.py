"""The Python call: settings, sources of data, and the facts of the report."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnprobe
from bnprobe.commands.scan import scan
from bnprobe.errors import DataError, DeviceError, UsageError
from bnprobe.measure.accumulators import STATISTICS
from bnprobe.measure.statistic import Statistic, Step
from bnprobe.records import Report
from bnprobe.report.json import dump, load_as
from support.networks import Flat, images, unsettled

DATA = images(5, 4, 6)
SET = TensorDataset(torch.cat(DATA), torch.zeros(20, dtype=torch.int64))


def test_the_facts_of_the_report() -> None:
    model = unsettled(Flat())
    report = bnprobe.scan(model, DATA, 4, num_batches=5, seed=7)
    assert (report.schema_version, report.tool.name, report.tool.version) == (1, "bnprobe", bnprobe.__version__)
    assert (report.environment.torch, report.environment.python) == (torch.__version__, platform.python_version())
    described = report.scan
    assert (described.model, described.batch_size, described.batches, described.images) == ("Flat", 4, 5, 20)
    assert (described.seed, described.device, described.dtype, described.autocast) == (7, "cpu", "float32", None)
    assert (described.synthetic, described.checkpoint) == (False, None)
    assert described.seconds > 0


def test_the_layers_left_out_are_named_in_network_order() -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(DATA[0].shape[1]) for _ in range(4)))
    report = scan(model, DATA, 4, num_batches=5, include=("0", "2", "3"), exclude=("3",))
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert report.scan.unselected == ("1", "3")
    assert scan(model, DATA, 4, num_batches=5).scan.unselected == ()


def test_samples_too_few_to_be_regrouped_are_no_measurement_of_their_own() -> None:
    few, enough = (scan(unsettled(Flat()), DATA, 4, num_batches=batches) for batches in (3, 4))
    assert few.scan.pool is None
    assert enough.scan.pool is not None
    [reason] = {verdict.message for verdict in few.verdicts if verdict.rule == "BN202"}
    assert reason.startswith("Not judged: 12 ")
    assert reason.endswith("are too few to regroup at random in batches of 4 (at least 16).")


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_loader_at_its_own_size(batch_size: int | None) -> None:
    model = unsettled(Flat())
    report = scan(model, DataLoader(SET, batch_size=4), batch_size, num_batches=5)
    assert report.scan.batch_size == 4
    assert_same_batches(report, scan(model, DATA, 4, num_batches=5))


class Range(Statistic):
    """From outside the package: the spread of the batch means of a layer's first channel, in running deviations."""

    name = "range of means"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.declare("low", "min", per="channel")
        self.declare("high", "max", per="channel")

    def update(self, step: Step) -> None:
        self.accumulate("low", step.columns.channel, step.values.d.amin(0))
        self.accumulate("high", step.columns.channel, step.values.d.amax(0))

    def compute(self, states: Mapping[str, Tensor]) -> list[float]:
        return [float(states["low"][0]), float(states["high"][0])]


def test_a_statistic_from_outside_stands_in_the_report() -> None:
    model = nn.BatchNorm1d(6)
    with STATISTICS.including(Range):
        report = scan(model, DATA, 4, num_batches=5)
    (layer,) = report.layers
    means = torch.stack([batch[:, 0].mean() for batch in DATA]) / (1 + model.eps) ** 0.5
    for path in (layer.train, layer.eval):
        assert path is not None
        low, high = path.statistics["range of means"]
        assert (low, high) == pytest.approx((float(means.min()), float(means.max())), abs=1e-6)
    document = json.loads(dump(report))
    assert document["layers"][0]["train"]["statistics"].keys() == {"range of means"}
    assert load_as(Report, dump(report)) == report
    plain = dump(scan(model, DATA, 4, num_batches=5))
    assert "statistics" not in json.loads(plain)["layers"][0]["train"]


@pytest.mark.parametrize(
    ("result", "shown"), [((1, 2.5), [1, 2.5]), ({"a": True}, {"a": True}), ("text", "text"), (float("nan"), None)]
)
def test_a_statistic_gives_what_json_can_hold(result: object, shown: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Range, "compute", lambda self, states: result)
    with STATISTICS.including(Range):
        if shown is None:
            with pytest.raises(UsageError, match=r'The statistic "range of means" gave nan, which JSON cannot hold'):
                scan(nn.BatchNorm1d(6), DATA, 4, num_batches=5)
            return
        report = scan(nn.BatchNorm1d(6), DATA, 4, num_batches=5)
    assert report.layers[0].train is not None
    assert report.layers[0].train.statistics == {"range of means": shown}
    assert load_as(Report, dump(report)) == report


def assert_same_batches(report: Report, expected: Report) -> None:
    """In whatever order: of data that is read in a fixed order, batches are taken from all over it."""
    for layer, other in zip(report.layers, expected.layers, strict=True):
        for name in ("train", "eval"):
            one, same = getattr(layer, name), getattr(other, name)
            assert one.mismatch == pytest.approx(same.mismatch, rel=1e-5)
            assert (one.r.min, one.d.max) == pytest.approx((same.r.min, same.d.max), rel=1e-5)


def test_a_loader_is_rebuilt_at_the_size_asked_for() -> None:
    model = unsettled(Flat())
    report = scan(model, DataLoader(SET, batch_size=10), 2, num_batches=10)
    assert (report.scan.batch_size, report.scan.batches) == (2, 10)
    assert any("rebuilt at batch size 2" in note for note in report.scan.notes)
    halves = [half for batch in DATA for half in batch.split(2)]
    assert_same_batches(report, scan(model, halves, 2, num_batches=10))


def test_a_data_set() -> None:
    model = unsettled(Flat())
    report = scan(model, SET, 4, num_batches=5)
    assert (report.scan.batches, report.scan.images) == (5, 20)
    judged = [verdict for verdict in report.verdicts if verdict.rule == "BN202"]
    assert [verdict.outcome for verdict in judged] == ["skipped"]  # the order is bnprobe's own
    assert any("bnprobe shuffles it" in note for note in report.scan.notes)
    assert report.layers == scan(model, SET, 4, num_batches=5).layers  # the same order every time


def test_data_that_cannot_be_used() -> None:
    with pytest.raises(UsageError, match="batch size"):
        scan(unsettled(Flat()), SET)
    with pytest.raises(DataError, match="larger than the data set of 20"):
        scan(unsettled(Flat()), SET, 21)
    with pytest.raises(DataError, match="not a source of batches"):
        scan(unsettled(Flat()), DATA[0], 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"num_batches": 0}, "batches"),
        ({"max_batchs": 4}, 'the nearest is "max_batches"'),
        ({"seed": -1}, "seed"),
        ({"autocast": "float8"}, "autocast"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        scan(unsettled(Flat()), DATA, **{"batch_size": 4, **settings})


def test_batch_sizes_need_images_that_can_be_regrouped() -> None:
    with pytest.raises(UsageError, match="batch_sizes"):
        scan(unsettled(Flat()), DATA, 4, batch_sizes=(1, 2), emulate=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "nonsense"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(DeviceError, match=rf"device '{device}' cannot be used.*use device='cpu'"):
        scan(unsettled(Flat()), DATA, 4, device=device)
