"""Every figure of a scan against the float64 loop over real micro-batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bnprobe.commands.scan import scan
from support.compare import assert_layer_matches, assert_report_matches
from support.networks import Flat, Gan, Residual, images, unsettled
from support.reference import measure

SHAPES = {1: (3, 9), 2: (3, 5, 4), 3: (3, 4, 3, 3)}

FP32, FP64 = 2e-4, 1e-9


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_without_positions(size: int, dtype: torch.dtype) -> None:
    model, data = unsettled(Flat()).to(dtype), [batch.to(dtype) for batch in images(7, size, 6)]
    report = scan(model, data, size, num_batches=7)
    assert report.scan.emulated
    assert_report_matches(report, model, data, FP64 if dtype is torch.float64 else FP32)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_every_dimension(dimensions: int, size: int, dtype: torch.dtype) -> None:
    model = unsettled(Residual(dimensions)).to(dtype)
    data = [batch.to(dtype) for batch in images(6, size, *SHAPES[dimensions])]
    report = scan(model, data, size, num_batches=6)
    assert report.scan.emulated
    assert report.layers[0].kind == f"BatchNorm{dimensions}d"
    assert_report_matches(report, model, data, FP64 if dtype is torch.float64 else FP32)


@pytest.mark.parametrize(
    ("dimensions", "memory_format"), [(2, torch.channels_last), (3, torch.channels_last_3d)], ids=["2d", "3d"]
)
def test_channels_last(dimensions: int, memory_format: torch.memory_format) -> None:
    model = unsettled(Residual(dimensions)).to(memory_format=memory_format)
    data = [batch.to(memory_format=memory_format) for batch in images(6, 4, *SHAPES[dimensions])]
    assert_report_matches(scan(model, data, 4, num_batches=6), model, data, FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_half_precision_parameters(dtype: torch.dtype, dimensions: int) -> None:
    model = unsettled(Residual(dimensions)).to(dtype)
    data = [batch.to(dtype) for batch in images(6, 4, *SHAPES[dimensions])]
    report = scan(model, data, 4, num_batches=6)
    assert report.scan.dtype == str(dtype).removeprefix("torch.")
    assert_report_matches(report, model, data, 0.05)


def test_autocast() -> None:
    model, data = unsettled(Residual()), images(6, 4, *SHAPES[2])
    report = scan(model, data, 4, num_batches=6, autocast="bfloat16")
    exact = scan(model, data, 4, num_batches=6)
    assert (report.scan.autocast, report.scan.dtype) == ("bfloat16", "float32")
    assert report.layers[1].train != exact.layers[1].train
    assert_report_matches(report, model, data, 0.05)


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"eps": 0.1}], ids=str)
def test_layer_options(options: dict[str, object]) -> None:
    model, data = unsettled(Residual(**options)), images(5, 2, *SHAPES[2])
    report = scan(model, data, 2, num_batches=5)
    assert_report_matches(report, model, data, FP32)
    assert report.layers[0].momentum == options.get("momentum", 0.1)
    assert report.layers[0].eps == options.get("eps", 1e-5)


def test_sync_batch_norm() -> None:
    model, data = unsettled(Residual(norm=nn.SyncBatchNorm)), images(5, 2, *SHAPES[2])
    report = scan(model, data, 2, num_batches=5)
    assert {layer.kind for layer in report.layers} == {"SyncBatchNorm"}
    assert_report_matches(report, model, data, FP32)


class NormAct(nn.BatchNorm2d):
    """A norm that applies its activation, as timm's does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu() + 0.1


def test_a_subclass_keeps_doing_more_than_normalizing() -> None:
    model, data = unsettled(Residual(norm=NormAct)), images(5, 2, *SHAPES[2])
    report = scan(model, data, 2, num_batches=5)
    assert {layer.kind for layer in report.layers} == {"NormAct"}
    assert_report_matches(report, model, data, FP32)


def test_the_layer_is_the_model() -> None:
    model, data = unsettled(nn.BatchNorm2d(3)), images(5, 4, *SHAPES[2])
    report = scan(model, data, 4, num_batches=5)
    assert [layer.name for layer in report.layers] == ["(root)"]
    train, eval_ = measure(model, data, "train"), measure(model, data, "eval")
    one, other = torch.cat(train.outputs), torch.cat(eval_.outputs)
    assert report.summary.output.relative_l2 == pytest.approx(float((one - other).norm() / other.norm()), rel=FP32)
    assert_layer_matches(report.layers[0], train.layer("(root)"), eval_.layer("(root)"), FP32)
    # Nothing lies upstream, so both paths see the same values.
    assert report.layers[0].train == report.layers[0].eval


class Shared(nn.Module):
    """One layer under two names, called twice on different data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.first = nn.BatchNorm1d(6)
        self.second = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.linear(self.first(x)).relu() * 3 + 1))


def test_a_shared_layer_is_listed_once_and_its_calls_are_kept_apart() -> None:
    model, data = unsettled(Shared()), images(9, 4, 6)
    report = scan(model, data, 4, num_batches=9)
    (layer,) = report.layers
    assert (layer.name, layer.aliases, layer.calls_per_forward) == ("first", ("second",), 2)
    assert [call.index for call in layer.calls] == [0, 1]
    assert layer.calls[0].train.d.mean < 0.5 < layer.calls[1].train.d.mean
    assert_report_matches(report, model, data, FP32)


def test_calls_of_one_layer_with_different_sizes() -> None:
    class TwoScales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            z = self.norm(self.conv(x[..., ::2, ::2]))
            return self.head(y.mean((2, 3)) + z.mean((2, 3)))

    model, data = unsettled(TwoScales()), images(5, 2, 3, 6, 6)
    report = scan(model, data, 2, num_batches=5)
    assert [call.values_per_channel for call in report.layers[0].calls] == [72, 18]
    assert_report_matches(report, model, data, FP32)


def test_several_outputs_and_inputs_through_forward() -> None:
    model = unsettled(Gan())
    real, noise = images(6, 4, 3, 3, 3), images(6, 4, 5, seed=3)
    data = [{"real": one, "noise": other} for one, other in zip(real, noise, strict=True)]
    report = scan(model, data, 4, num_batches=6, forward=Gan.step)
    assert report.scan.emulated
    reference = {path: measure(model, data, path, Gan.step) for path in ("train", "eval")}
    critic = next(layer for layer in report.layers if layer.name == "critic.1")
    for index, call in enumerate(critic.calls):
        expected = [float(row.mean()) for row in reference["train"].layer("critic.1")[index].mismatch]
        assert call.train.mismatch == pytest.approx(sum(expected) / 6, rel=FP32)
    flat = {path: torch.cat([torch.cat(out) for out in found.outputs]) for path, found in reference.items()}
    expected_l2 = float((flat["train"] - flat["eval"]).norm() / flat["eval"].norm())
    assert report.summary.output.relative_l2 == pytest.approx(expected_l2, rel=FP32)
    # Two columns of scores are no class scores.
    assert report.summary.output.kl_divergence is None


@pytest.mark.parametrize("emulate", [True, False])
def test_a_mean_far_from_zero_beside_the_spread(emulate: bool) -> None:
    """N(1000, 0.01^2): the difference of two squares would have no correct digit in float32."""
    model = nn.BatchNorm2d(3)
    model.running_mean.fill_(1000.0)
    model.running_var.fill_(1e-4)
    data = [1000 + 0.01 * batch for batch in images(5, 2, 3, 16, 16)]
    report = scan(model, data, 2, num_batches=5, emulate=emulate)
    (layer,) = report.layers
    train, eval_ = (measure(model, data, path).layer("(root)") for path in ("train", "eval"))
    assert_layer_matches(layer, train, eval_, 1e-3)
    assert layer.train.r.mean == pytest.approx(1.0, abs=0.02)


def test_labels_make_class_scores_and_their_absence_a_plain_table() -> None:
    model = unsettled(Residual())
    data = [(x, torch.randint(0, 3, (4,))) for x in images(6, 4, *SHAPES[2])]
    assert_report_matches(scan(model, data, 4, num_batches=6), model, data, FP32)
    targets = [(x, torch.randn(4, 3)) for x, _ in data]
    assert scan(model, targets, 4, num_batches=6).summary.output.argmax_changed is None


def test_dropout_acts_on_the_train_path_only() -> None:
    """With the dropout in front of the layer, the batch statistics see it and the running ones do not."""
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6))
    data = images(20, 256, 6)
    report = scan(model, data, 256, num_batches=20, physical_batch=1024)
    (layer,) = report.layers
    assert report.scan.emulated
    # E[x^2] doubles where half of the values are zeroed and the others doubled.
    assert layer.train.r.mean / layer.eval.r.mean == pytest.approx(2**0.5, rel=0.05)
    plain = scan(copy.deepcopy(model[1]), data, 256, num_batches=20).layers[0]
    assert layer.eval.mismatch == pytest.approx(plain.eval.mismatch, rel=1e-6)
