"""Models that do what models should not, and are measured right all the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.commands.scan import scan
from bnprobe.errors import BnprobeError, UsageError, UserCodeError
from bnprobe.records import Report
from support.compare import assert_same_figures
from support.networks import images, unsettled

LABELS = torch.randint(0, 3, (8, 4), generator=torch.Generator().manual_seed(1))
DATA = list(zip(images(8, 4, 3, 6, 6), LABELS, strict=True))


class Doubling(nn.Module):
    """Doubles its input, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.conv, self.bn, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mul_(2) if self.in_place else x * 2
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


def twins(*variants: Any, model: type[nn.Module]) -> list[nn.Module]:
    """The same weights in every variant."""
    made = [unsettled(model(variant)) for variant in variants]
    for other in made[1:]:
        other.load_state_dict(made[0].state_dict())
    return made


@pytest.mark.parametrize("emulate", [True, False])
def test_a_model_that_writes_into_its_input(emulate: bool) -> None:
    plain, in_place = twins(False, True, model=Doubling)
    before = [image.clone() for image, _ in DATA]
    expected = scan(plain, DATA, 4, num_batches=8, emulate=emulate)
    found = scan(in_place, DATA, 4, num_batches=8, emulate=emulate)
    assert found.scan.emulated == emulate
    assert_same_figures(found, expected, 1e-6)
    assert all(torch.equal(one, other) for one, (other, _) in zip(before, DATA, strict=True))


class Forces(nn.Module):
    """Differentiates an energy in its forward, as networks of molecules do: every sample's by its own input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, size - 2))
        self.flat = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4))
        self.last = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.flat(self.body(x)).square().sum()
            (forces,) = torch.autograd.grad(energy, x)
        return self.last(forces)


@pytest.mark.parametrize("size", [6, 3])  # the first layer's maps: 4x4, and single values
def test_a_forward_that_differentiates(size: int) -> None:
    """Through the statistics of the batch, too: the last layer sees the gradients."""
    model, data = unsettled(Forces(size)), images(8, 4, 3, size, size)
    emulated, real = (scan(model, data, 4, num_batches=8, emulate=emulate) for emulate in (True, False))
    assert emulated.scan.emulated
    assert_same_figures(emulated, real, 1e-3)
    twin = copy.deepcopy(model).train()
    seen: list[Tensor] = []
    twin.last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for batch in data:
        copy.deepcopy(twin)(batch)
    layer = next(layer for layer in real.layers if layer.name == "last")
    assert layer.train is not None
    std = (twin.last.running_var + twin.last.eps).sqrt()
    d = torch.stack([(x.mean((0, 2, 3)) - twin.last.running_mean) / std for x in seen])
    assert layer.train.d.mean == pytest.approx(float(d.double().mean()), rel=1e-3)


def test_what_depends_on_gradients_through_other_statistics_is_not_tried() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    data = images(8, 4, 3, 6, 6)
    report = scan(unsettled(Forces(6)), data, 4, num_batches=8, loss=loss, evaluation=data[:4], what_if=True)
    assert "batch statistics" in {remedy.name for remedy in report.remedies}
    assert any('"instance renorm" was not tried' in note for note in report.scan.notes)


def test_a_call_without_rows_at_inference_is_left_out() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) if self.training else torch.cat([self.bn(x), self.bn(x[:0])])

    class Once(Empty):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x)

    data = images(8, 4, 3, 6, 6)
    [found], [expected] = (scan(unsettled(kind()), data, 4).layers for kind in (Empty, Once))
    assert found.eval == expected.eval


def test_a_loss_that_writes_into_the_batch() -> None:
    (model,) = twins(False, model=Doubling)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = F.cross_entropy(model(batch[0]), batch[1])
        batch[0].zero_()
        return value

    def metric(model: nn.Module, batch: Any) -> float:
        return float(batch[0].abs().sum())

    output = scan(model, DATA, 4, num_batches=8, loss=loss, metric=metric).summary.output
    assert output.metric is not None
    assert output.metric.train == pytest.approx(sum(float(image.abs().sum()) for image, _ in DATA) / 8)


def test_a_forward_that_changes_the_output_in_place_is_not_replayed() -> None:
    (model,) = twins(False, model=Doubling)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).mul_(0)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    expected = scan(model, DATA, 4, num_batches=8, loss=loss).summary.output.loss
    found = scan(model, DATA, 4, num_batches=8, loss=loss, forward=forward).summary.output.loss
    assert expected is not None
    assert found is not None
    assert (found.train, found.eval) == pytest.approx((expected.train, expected.eval), rel=1e-5)


@pytest.mark.parametrize("function", ["forward", "loss"])
def test_an_output_for_inputs_that_were_changed_in_place_is_not_replayed(function: str) -> None:
    (model,) = twins(False, model=Doubling)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0].mul_(3) if function == "forward" else batch[0])

    def loss(model: nn.Module, batch: Any, factor: int = 3 if function == "loss" else 1) -> Tensor:
        return F.cross_entropy(model(batch[0].mul_(factor)), batch[1])

    expected = []
    for training in (True, False):
        copies = [(copy.deepcopy(model).train(training), image.clone(), labels) for image, labels in DATA]
        with torch.no_grad():
            expected.append(sum(float(loss(twin, (image, labels))) for twin, image, labels in copies) / len(DATA))
    found = scan(model, DATA, 4, num_batches=8, loss=loss, forward=forward).summary.output.loss
    assert found is not None
    assert (found.train, found.eval) == pytest.approx(expected, rel=1e-5)


class Squeezing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head = nn.BatchNorm2d(3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(x).mean((2, 3))).squeeze()


def test_an_output_that_loses_its_axes_at_batch_size_one() -> None:
    data = [image for image, _ in DATA]
    report = scan(Squeezing(), [part[:1] for part in data], 1, num_batches=8)
    assert report.scan.batches == 8
    assert report.layers[0].eval is not None


class Hungry(nn.Module):
    """An output whose comparison has no memory above so many images."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).mean((2, 3))


def test_no_memory_for_comparing_outputs_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real comparison, made to fail as a full GPU would; there is no other way to fill one here."""
    from bnprobe.measure.outputs import OutputSums

    measure = OutputSums.measure

    def limited(self: OutputSums, batch: Any, inputs: set[int], train: Any, eval_: Any) -> Any:
        if eval_.shape[0] > 8:
            raise torch.OutOfMemoryError("no memory for the output")
        return measure(self, batch, inputs, train, eval_)

    expected = scan(Hungry(), DATA, 4, num_batches=8, physical_batch=8)
    monkeypatch.setattr(OutputSums, "measure", limited)
    found = scan(Hungry(), DATA, 4, num_batches=8, physical_batch=32)
    assert found.scan.physical_batch == 8
    assert_same_figures(found, expected, 1e-9)
    train = found.layers[0].train
    assert train is not None
    assert sum(train.r.histogram.counts) == 8 * 3


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head = nn.BatchNorm2d(3), nn.Linear(3 * 36, 3)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.bn(image).flatten(1)
        return features, self.head(features)


class Logits(TwoOutputs):
    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(image)[1]


def predictions(report: Report) -> tuple[float | None, float | None]:
    return report.summary.output.argmax_changed, report.summary.output.kl_divergence


def test_class_scores_are_the_logits_not_the_features() -> None:
    one, other = unsettled(Logits()), unsettled(TwoOutputs())
    other.load_state_dict(one.state_dict())
    expected = predictions(scan(one, DATA, 4, num_batches=8))
    assert None not in expected
    assert predictions(scan(other, DATA, 4, num_batches=8)) == pytest.approx(expected)


@pytest.mark.parametrize("soft", [False, True])
def test_labels_are_found_wherever_they_stand(soft: bool) -> None:
    model = unsettled(Logits())
    expected = predictions(scan(model, DATA, 4, num_batches=8))
    data = [{"label": F.one_hot(y, 3).float() if soft else y, "image": x} for x, y in DATA]
    assert predictions(scan(model, data, 4, num_batches=8)) == pytest.approx(expected)


def test_an_index_of_each_image_makes_no_classes() -> None:
    data = [(x, torch.arange(100 + 4 * i, 104 + 4 * i)) for i, (x, _) in enumerate(DATA)]
    assert predictions(scan(unsettled(Logits()), data, 4, num_batches=8)) == (None, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_said(value: float) -> None:
    output = scan(Squeezing(), DATA, 4, num_batches=4, loss=lambda model, batch: value).summary.output
    assert output.loss is None
    assert output.note == "The loss is NaN or Inf in training and at inference."


def test_layers_put_into_eval_mode_by_the_user_stay_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].running_mean.fill_(5.0)
    model.train()
    model[0].eval()
    report = scan(model, [x for x, _ in DATA], 4, num_batches=8)
    first, second = report.layers
    assert (first.flagged, first.train) == (False, None)
    assert first.note is not None
    assert first.note.startswith("frozen")
    assert second.train is not None


def test_a_model_in_eval_mode_is_measured_in_training_as_well() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    assert scan(model, [x for x, _ in DATA], 4, num_batches=8).layers[0].train is not None


def test_a_layer_that_overflows_at_inference_is_flagged() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].running_var.fill_(1e-38)
    model[1].weight.data.mul_(1e37)
    report = scan(model, [x for x, _ in DATA], 4, num_batches=8, include=("2",))
    (layer,) = report.layers
    assert (layer.flagged, layer.undecided, layer.eval) == (True, False, None)


class Video(nn.Module):
    """Frames folded into the batch: image by image at inference, frame by frame in training."""

    def __init__(self, switching: bool) -> None:
        super().__init__()
        self.switching, self.bn = switching, nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        swap = self.switching and self.training
        y = x.transpose(0, 1) if swap else x
        y = self.bn(y.flatten(0, 1)).unflatten(0, y.shape[:2])
        return (y.transpose(0, 1) if swap else y).mean((1, 3, 4))


def test_the_row_layout_may_differ_between_the_paths() -> None:
    plain, switching = twins(False, True, model=Video)
    clips = [torch.stack([x + i for i in range(3)], 1) * torch.rand(4, 1, 1, 1, 1) for x, _ in DATA]
    expected = scan(plain, clips, 4, num_batches=8, emulate=False)
    found = scan(switching, clips, 4, num_batches=8)
    assert found.scan.emulated
    assert_same_figures(found, expected, 1e-5)


def test_a_model_that_only_runs_under_autocast_runs_real_micro_batches() -> None:
    data = [x.bfloat16() for x, _ in DATA]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    report = scan(model, data, 4, num_batches=4, autocast="bfloat16")
    assert not report.scan.emulated
    assert report.scan.emulation == "The self-check runs without autocast, which this model does not support."


class OwnKernel(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def test_a_layer_with_a_kernel_of_its_own_is_skipped_for_that_reason() -> None:
    model = nn.Sequential(OwnKernel(3), nn.BatchNorm2d(3))
    report = scan(model, [x for x, _ in DATA], 4, num_batches=4)
    assert [(layer.name, layer.reason) for layer in report.skipped] == [
        ("0", "its forward does not call torch.nn.functional.batch_norm")
    ]


def test_a_physical_batch_below_the_batch_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"physical_batch=2 is smaller than the batch size, 4\. Give at least 4"):
        scan(Squeezing(), DATA, 4, physical_batch=2)


def test_batch_sizes_that_need_more_images_are_named() -> None:
    report = scan(Squeezing(), DATA, 4, num_batches=4, batch_sizes=(2, 64))
    assert "Batch size 64 needs at least 128 samples, and 16 were measured: raise num_batches." in report.scan.notes
    assert [point.batch_size for point in report.layers[0].batch_sizes] == [2]


def test_a_wrapped_model_is_unwrapped() -> None:
    report = scan(nn.DataParallel(Squeezing()), DATA, 4, num_batches=4)
    assert [layer.name for layer in report.layers] == ["bn"]
    assert report.scan.notes[0] == "The model was wrapped in DataParallel; the module inside it is used."


def test_a_glob_that_matches_nothing_is_named() -> None:
    notes = scan(Squeezing(), DATA, 4, num_batches=4, exclude=("nb",)).scan.notes
    assert notes[0] == 'The glob "nb" of exclude matches no layer; the nearest name is "bn".'


def test_a_loader_that_raises_late_loses_nothing() -> None:
    def failing() -> Any:
        yield from DATA[:6]
        raise OSError("the disk is gone")

    with pytest.raises(UserCodeError, match="the disk is gone") as caught:
        scan(Squeezing(), failing(), 4, num_batches=8, physical_batch=8)
    report = caught.value.report
    assert report is not None
    assert (report.scan.batches, report.scan.stopped, report.scan.partial) == (6, "failed", True)
    expected = scan(Squeezing(), DATA, 4, num_batches=6, physical_batch=8)
    assert report.layers == tuple(replace(layer, impact=None) for layer in expected.layers)


def test_one_value_per_channel_is_as_if_the_batch_were_one() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].running_var.fill_(100.0)
    data = [torch.randn(4, 3) for _ in range(16)]
    sizes = scan(model, data, 4, num_batches=16, batch_sizes=(1, 2)).layers[0].batch_sizes
    assert [point.equivalent_batch_size == 1.0 for point in sizes] == [True, False]
    (layer,) = scan(model, [x[:1] for x in data], 1, num_batches=16).layers
    assert layer.train is not None
    assert layer.train.equivalent_batch_size == 1.0
    assert layer.note is not None
    assert layer.note.startswith("one value per channel")


def test_an_untrained_model_is_said_to_be() -> None:
    notes = scan(Squeezing(), DATA, 4, num_batches=4).scan.notes
    assert [note for note in notes if "new model" in note]
    trained = Squeezing()
    trained(DATA[0][0])
    assert not scan(trained, DATA, 4, num_batches=4).scan.notes


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, image: Tensor, extra: Tensor) -> Tensor:
        return self.bn(image).mean((2, 3)) + extra


class Detector(nn.Module):
    """Takes a list of images, and in training the boxes in each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, images: list[Tensor], targets: list[Tensor] | None = None) -> Tensor:
        found = self.bn(torch.stack(list(images))).mean((2, 3))
        return found + sum(target.sum() for target in targets) if self.training else found


class TakesAll(Detector):
    def forward(self, data_dict: dict[str, Tensor]) -> Tensor:
        return self.bn(data_dict["picture"]).mean((2, 3))


class TakesOne(Detector):
    def forward(self, signal: Tensor) -> Tensor:
        return self.bn(signal).mean((2, 3))


@pytest.mark.parametrize(
    ("made", "arrange", "line"),
    [
        (Detector, lambda x: (tuple(x), tuple(torch.ones(k, 4) for k in range(len(x)))), "model(*batch)"),
        (TakesAll, lambda x: {"picture": x, "size": torch.ones(len(x))}, "model(batch)"),
        (TakesOne, lambda x: {"picture": x, "size": torch.ones(len(x))}, "model(batch['picture'])"),
    ],
)
def test_the_line_that_calls_the_model_is_the_right_one(
    made: type[nn.Module], arrange: Callable[[Tensor], Any], line: str
) -> None:
    data = [arrange(x) for x, _ in DATA]
    with pytest.raises(BnprobeError) as caught:
        scan(made(), data, 4)
    said = next(each for each in str(caught.value).splitlines() if "def forward" in each).strip()
    assert said == f"def forward(model, batch): return {line}"
    names: dict[str, Any] = {}
    exec(said, names)
    assert scan(made(), data, 4, forward=names["forward"]).layers


def test_a_model_of_several_inputs_needs_a_forward_and_is_told() -> None:
    data = [(x, torch.zeros(4, 3)) for x, _ in DATA]
    with pytest.raises(
        UserCodeError, match=r"calling the model on batch\[0\] of shape .* only, because there is no forward"
    ):
        scan(TwoInputs(), data, 4)
    assert scan(TwoInputs(), data, 4, forward=lambda model, batch: model(*batch)).layers


@pytest.mark.parametrize(
    ("arrange", "called", "line"),
    [
        (
            lambda x, extra, labels: (x, extra, labels),
            "on batch[0] of shape (4, 3, 6, 6) only",
            "model(batch[0], batch[1])",
        ),
        (
            lambda x, extra, labels: ((x, extra), labels),
            "on batch[0] = (tensor (4, 3, 6, 6), tensor (4, 3)) only",
            "model(*batch[0])",
        ),
        (
            lambda x, extra, labels: ({"picture": x, "extra": extra}, labels),
            "on batch[0] = {picture: tensor (4, 3, 6, 6), extra: tensor (4, 3)} only",
            "model(batch[0]['picture'], batch[0]['extra'])",
        ),
    ],
)
def test_the_error_says_what_the_model_was_called_with_and_how_to_call_it(
    arrange: Callable[..., Any], called: str, line: str
) -> None:
    data = [arrange(x, torch.zeros(4, 3), torch.zeros(4)) for x, _ in DATA]
    with pytest.raises(UserCodeError) as raised:
        scan(TwoInputs(), data, 4)
    assert called in str(raised.value)
    assert str(raised.value).endswith(f"\n  def forward(model, batch): return {line}")


def test_a_forward_of_the_users_gets_no_advice() -> None:
    data = [(x, torch.zeros(4, 3)) for x, _ in DATA]
    with pytest.raises(UserCodeError, match=r"forward\(model, batch\) on a batch = \(tensor \(4, 3") as raised:
        scan(TwoInputs(), data, 4, forward=lambda model, batch: model(batch))
    assert "for example" not in str(raised.value)
