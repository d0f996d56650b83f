"""Which layers are listed, which are skipped and why."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnprobe
from bnprobe.commands.scan import scan
from bnprobe.config.spec import ScanSettings
from bnprobe.errors import NothingToProbeError
from bnprobe.measure.layers import find_layers, unmatched_globs
from support.networks import Flat, FunctionalNorm, Residual, images, unsettled

DATA = images(4, 2, 3, 6, 6)


def test_network_order_and_settings() -> None:
    model = unsettled(Residual(eps=0.01, momentum=0.3))
    model(DATA[0])
    report = scan(model, DATA, 2, num_batches=4)
    assert [layer.name for layer in report.layers] == ["bn1", "bn2"]
    assert report.skipped == ()
    first = report.layers[0]
    assert (first.kind, first.channels, first.eps, first.momentum) == ("BatchNorm2d", 4, 0.01, 0.3)
    assert (first.batches_tracked, first.calls_per_forward, first.values_per_channel) == (1, 1, 72)
    assert (first.running_statistics, first.note, first.calls, first.aliases) == (True, None, (), ())
    assert (report.summary.layers, report.summary.skipped) == (2, 0)


def test_lazy_layers_once_materialised() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d())
    model(DATA[0])
    report = scan(model, DATA, 2, num_batches=4)
    assert [(layer.name, layer.kind, layer.channels) for layer in report.layers] == [("1", "BatchNorm2d", 4)]


def test_lazy_layers_that_saw_no_batch_are_skipped() -> None:
    report = scan(nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d()), DATA, 2, num_batches=4)
    assert [layer.name for layer in report.layers] == ["0"]
    assert (report.skipped[0].name, report.skipped[0].kind) == ("1", "LazyBatchNorm2d")
    assert "lazy" in report.skipped[0].reason


def test_a_model_of_lazy_layers_that_never_ran() -> None:
    with pytest.raises(NothingToProbeError, match="run the model once before scanning it"):
        scan(nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d()), DATA, 2)


def test_no_running_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    report = scan(model, DATA, 2, num_batches=4)
    layer = report.layers[0]
    assert not layer.running_statistics
    assert "track_running_stats=False" in layer.note
    assert (layer.train, layer.eval, layer.flagged, layer.undecided) == (None, None, False, False)
    assert layer.batches_tracked is None
    # It gives both paths the same, so the layer behind it sees the same.
    assert report.layers[1].train.mismatch == pytest.approx(report.layers[1].eval.mismatch, rel=1e-4)


def test_a_layer_that_is_never_called() -> None:
    model = unsettled(Residual())
    model.unused = nn.BatchNorm1d(4)
    report = scan(model, DATA, 2, num_batches=4)
    assert [layer.name for layer in report.layers] == ["bn1", "bn2"]
    (skipped,) = report.skipped
    assert (skipped.name, skipped.reason) == ("unused", "never called by the forward pass")


def test_no_layer_is_called() -> None:
    model = nn.Linear(3, 3)
    model.unused = nn.BatchNorm1d(4)
    with pytest.raises(NothingToProbeError, match=r"called none of the BN layers \(found: 1\)"):
        scan(model, images(4, 2, 3), 2)


def test_no_layer_at_all() -> None:
    with pytest.raises(NothingToProbeError, match="Linear has no Batch Normalization layer"):
        scan(nn.Linear(3, 3), images(4, 2, 3), 2)


class KeepsFrozen(nn.Module):
    """Trains with its first norm frozen, as detection models do."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.bn1.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.bn1(x).relu())


@pytest.mark.parametrize("emulate", [True, False])
def test_a_layer_that_training_keeps_frozen_is_noted_and_not_flagged(emulate: bool) -> None:
    model = unsettled(KeepsFrozen())
    model.bn1.running_mean.fill_(3.0)
    report = scan(model, DATA, 2, num_batches=4, emulate=emulate)
    assert report.scan.emulated == emulate
    frozen, other = report.layers
    assert frozen.note.startswith("frozen")
    assert (frozen.flagged, frozen.undecided, frozen.train) == (False, False, None)
    assert frozen.eval.interval[0] > 1  # else it would not be flagged anyhow
    assert other.note is None
    # Both paths use the running statistics in front of it.
    assert other.train.mismatch == pytest.approx(other.eval.mismatch, rel=1e-4)
    assert report.summary.flagged == other.flagged


def test_a_layer_that_the_user_holds_in_eval_mode_is_half_frozen_to_a_scan_too() -> None:
    """Without a train() of the model's own that would hold it there: the flags are those of the last pass otherwise."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    unsettled(model)[0].eval()
    found = {each.layer: each for each in scan(model, DATA, 2, num_batches=4).verdicts if each.rule == "BN105"}
    assert found["0"].outcome == "failed"
    assert found["0"].message.startswith("The running statistics are frozen (eval mode during training)")
    assert found["2"].outcome == "passed"
    assert not model[0].training


def test_functional_batch_norm_is_listed_with_its_place() -> None:
    report = scan(unsettled(FunctionalNorm()), images(4, 4, 6), 4, num_batches=4)
    (skipped,) = report.skipped
    path, line = skipped.name.rsplit(":", 1)
    assert path.endswith("networks.py")
    source = Path(path).read_text().splitlines()[int(line) - 1]
    assert "F.batch_norm" in source
    assert skipped.kind == "batch_norm"


class OwnNorm(nn.Module):
    """A batch norm that does not derive from torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


def test_other_norms() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.InstanceNorm2d(3),
        nn.GroupNorm(1, 3),
        nn.LayerNorm(6),
        OwnNorm(),
    )
    before = model[5].running_mean.clone()
    report = scan(model, DATA, 2, num_batches=4)
    assert [layer.name for layer in report.layers] == ["0", "5"]
    assert [(layer.name, layer.kind) for layer in report.skipped] == [("1", "InstanceNorm2d")]
    assert report.layers[1].note == "batch_norm called as a function, with running_mean and running_var"
    assert torch.equal(model[5].running_mean, before)


def test_include_and_exclude() -> None:
    model = unsettled(Residual())
    both = scan(model, DATA, 2, num_batches=4)
    one = scan(model, DATA, 2, num_batches=4, exclude=("bn1",))
    assert [layer.name for layer in one.layers] == ["bn2"]
    # A layer left out still normalizes per micro-batch.
    assert one.layers[0].eval == both.layers[1].eval
    assert one.layers[0].train == both.layers[1].train
    included = scan(model, DATA, 2, num_batches=4, include=("*1",)).layers
    assert [layer.eval for layer in included] == [both.layers[0].eval]
    with pytest.raises(NothingToProbeError, match=r"include/exclude exclude every BN layer of \w+ \(2 in all\)"):
        scan(model, DATA, 2, include=("nothing*",))


class TwoNames(nn.Module):
    """One norm under two names, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.BatchNorm2d(3))
        self.head = nn.ModuleDict({"bn": self.stem[0], "last": nn.BatchNorm2d(3), "odd": OwnNorm()})


@pytest.mark.parametrize(
    ("globs", "selected"),
    [
        ({"exclude": ("head.bn",)}, ["head.last"]),
        ({"exclude": ("stem.*",)}, ["head.last"]),
        ({"include": ("head.*",)}, ["stem.0", "head.last"]),
        ({"include": ("stem.*", "head.last"), "exclude": ("*.bn",)}, ["head.last"]),
    ],
)
def test_a_shared_layer_is_left_out_by_any_of_its_names(globs: dict[str, tuple[str]], selected: list[str]) -> None:
    found = find_layers(TwoNames(), ScanSettings(**globs).is_selected)
    assert [layer.name for layer in found.selected] == selected


def test_globs_that_match_nothing_are_named_with_the_nearest_layer() -> None:
    settings = ScanSettings(
        include=("head.*", "hed.last"), exclude=("stm.*", "head.odd"), thresholds={"*": 8, "head.bm": 4, "head.bn": 2}
    )
    found = find_layers(TwoNames(), settings.is_selected)
    assert unmatched_globs(settings, found) == (
        'The glob "hed.last" of --include matches no layer; the nearest name is "head.last".',
        'The glob "stm.*" of --exclude matches no layer; the nearest name is "stem.0".',
        'The glob "head.bm" of thresholds matches no layer; the nearest name is "head.bn".',
    )
    assert unmatched_globs(ScanSettings(), found) == ()


def test_thresholds_by_glob() -> None:
    model = unsettled(Flat())
    report = scan(model, images(16, 16, 6), 16, num_batches=16, thresholds={"*": 1.5, "body.4": 1e6})
    assert [layer.threshold for layer in report.layers] == [1.5, 1e6]
    assert [layer.flagged for layer in report.layers] == [False, True]
    assert report.summary.flagged == 1


@pytest.mark.parametrize(
    ("buffer", "value", "words"),
    [
        ("running_mean", float("nan"), "1 NaN or Inf value"),
        ("running_var", float("inf"), "1 NaN or Inf value"),
        ("running_var", -1.0, "1 negative variance"),
    ],
)
def test_buffers_that_are_no_statistics(buffer: str, value: float, words: str) -> None:
    """Everything else is measured, and the rule for them fires."""
    sound = unsettled(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    broken = copy.deepcopy(sound)
    getattr(broken[2], buffer)[1] = value
    expected, found = (scan(model, DATA, 2) for model in (sound, broken))
    first, second, third = found.layers
    assert (first.train, first.eval) == (expected.layers[0].train, expected.layers[0].eval)
    assert (second.train, second.eval, second.flagged) == (None, None, True)
    assert second.note == f"its running statistics hold {words}: there is nothing to compare batches with"
    assert third.train == expected.layers[2].train
    assert found.diagnoses[0].rule == "BN103"
    if value == float("inf"):  # by which a channel becomes 0
        assert third.eval is not None
        return
    assert third.eval is None
    assert third.note == "its input is not finite at inference, because of the running statistics of 2"


def test_one_value_per_channel_is_noted() -> None:
    report = scan(unsettled(Flat()), images(6, 1, 6), 1, num_batches=6)
    assert "one value per channel" in report.layers[0].note
    assert report.layers[0].train.r.max < 0.05  # sqrt(eps) over the running deviation


@pytest.mark.parametrize(
    ("to", "agrees"),
    [("frozen", True), ("instance-renorm", True), ("mabn", False), ("example-weighing", False), ("per-domain", False)],
)
def test_a_skipped_layer_says_whether_training_and_inference_agree_by_construction(to: str, agrees: bool) -> None:
    model = bnprobe.convert(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)), ["0"], to=to)
    assert [(layer.name, layer.agrees) for layer in find_layers(model, lambda *_: True).skipped] == [("0", agrees)]
