"""Micro-batches that run together give what real ones give, or are not run together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnprobe.commands.scan import scan
from bnprobe.config.spec import ScanSettings
from bnprobe.distributed import Share
from bnprobe.errors import UserCodeError
from bnprobe.measure import memory
from bnprobe.measure.forward_pass import Pass
from bnprobe.measure.reader import Reader
from bnprobe.measure.scan_loop import probe
from bnprobe.measure.session import PathName, Session, no_progress
from bnprobe.records import Report
from support.compare import assert_same_figures
from support.networks import (
    BatchAttention,
    Dense,
    Flat,
    FunctionalNorm,
    Gan,
    InvertedBottleneck,
    MinibatchStd,
    Residual,
    Shuffle,
    Siamese,
    UNet,
    Video,
    images,
    unsettled,
)
from support.reference import measure


def gan_batches(count: int, size: int) -> list[dict[str, Tensor]]:
    pairs = zip(images(count, size, 3, 3, 3), images(count, size, 5, seed=3), strict=True)
    return [{"real": real, "noise": noise} for real, noise in pairs]


SHAPES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], list[Any]], dict[str, Any]]] = {
    "flat": (Flat, lambda k, n: images(k, n, 6), {}),
    "residual": (Residual, lambda k, n: images(k, n, 3, 6, 6), {}),
    "dense": (Dense, lambda k, n: images(k, n, 3, 6, 6), {}),
    "inverted bottleneck": (InvertedBottleneck, lambda k, n: images(k, n, 3, 6, 6), {}),
    "u-net": (UNet, lambda k, n: images(k, n, 3, 8, 8), {}),
    "video, clip by clip": (lambda: Video(False), lambda k, n: images(k, n, 5, 3, 4, 4), {}),
    "video, frame by frame": (lambda: Video(True), lambda k, n: images(k, n, 5, 3, 4, 4), {}),
    "siamese, two calls": (lambda: Siamese(False), lambda k, n: images(k, n, 2, 3, 6, 6), {}),
    "siamese, one batch": (lambda: Siamese(True), lambda k, n: images(k, n, 2, 3, 6, 6), {}),
    "gan": (Gan, gan_batches, {"forward": Gan.step}),
}


def both(model: nn.Module, data: list[Any], size: int, **options: Any) -> tuple[Report, Report]:
    options.setdefault("num_batches", len(data))
    together = scan(model, data, size, **options)
    return together, scan(model, data, size, emulate=False, **options)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_emulation_equals_the_real_loop(shape: str, size: int) -> None:
    make, batches, options = SHAPES[shape]
    together, real = both(unsettled(make()), batches(9, size), size, **options)
    assert together.scan.emulated, together.scan.emulation
    assert together.scan.physical_batch == 9 * size
    assert together.scan.self_check.passed
    assert not real.scan.emulated
    assert real.scan.physical_batch == size
    assert_same_figures(together, real, rel=1e-4)


@pytest.mark.parametrize("physical", [2, 4, 6, 100])
def test_any_physical_batch_gives_the_same(physical: int) -> None:
    model, data = unsettled(Residual()), images(7, 2, 3, 6, 6)
    report = scan(model, data, 2, num_batches=7, physical_batch=physical)
    assert report.scan.physical_batch == min(physical, 14)
    assert report.scan.emulated == (physical > 2)
    assert_same_figures(report, scan(model, data, 2, num_batches=7, emulate=False), rel=1e-4)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Path and samples of every forward pass, in order: a list that the model held would be put back."""
    found: list[tuple[str, int]] = []
    run = Session._run

    def noted(session: Session, path: PathName, batch: Any, pass_: Pass) -> Any:
        found.append((path, pass_.samples))
        return run(session, path, batch, pass_)

    monkeypatch.setattr(Session, "_run", noted)
    return found


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_first_physical_batch_is_the_joined_one_of_the_check(offset: float, passes: list[tuple[str, int]]) -> None:
    """Also where the moments of a layer lose digits: the passes over single micro-batches show which do."""
    norm, data = nn.BatchNorm2d(3, momentum=1.0), [batch + offset for batch in images(32, 32, 3, 8, 8)]
    norm(torch.cat(data))  # its statistics are those of the data, so that nothing is flagged
    report = scan(norm, data, 32, num_batches=32, physical_batch=1024)
    assert report.scan.emulated
    assert report.scan.self_check.passed
    assert not report.layers[0].flagged
    # Two micro-batches by themselves, then all of them.
    assert passes == [(path, samples) for samples in (32, 32, 1024) for path in ("train", "eval")]


@pytest.mark.parametrize(("rank", "alone"), [(0, 2), (1, 3)])
def test_of_several_processes_each_checks_its_own_first_physical_batch(
    rank: int, alone: int, passes: list[tuple[str, int]]
) -> None:
    """By its own micro-batches: only process 0 has run one of them where layers were looked for."""
    assert _checked_in(Share(rank, 2), batches=8) == 4
    assert passes == [(path, samples) for samples in (*[4] * alone, 16) for path in ("train", "eval")]


def test_a_process_without_a_micro_batch_makes_the_whole_check() -> None:
    assert _checked_in(Share(2, 3), batches=2) == 0


def _checked_in(share: Share, batches: int) -> int:
    """The micro-batches that one of several processes measures, which comes to the verdict that they run together."""
    settings = ScanSettings(batches=batches)
    session, reader = Session.open(nn.BatchNorm2d(3), settings), Reader(images(8, 4, 3, 8, 8), 4, share=share)
    with session.installed():
        evidence = probe(session, reader, settings, no_progress)
    assert evidence is not None
    assert evidence.batching.emulation.check is not None
    assert evidence.batching.emulation.check.passed
    return evidence.batches


@pytest.mark.parametrize("random", [False, True])
def test_where_more_than_rounding_is_to_be_seen_the_whole_check_runs(
    random: bool, passes: list[tuple[str, int]]
) -> None:
    """Where training is random before the first physical batch; where rounding is amplified after it."""
    model, data = chaotic()
    if random:
        model, data = unsettled(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5))), images(8, 4, 6)
    report = scan(model, data, len(data[0]), num_batches=len(data))
    assert report.scan.emulated
    sizes = [samples for _, samples in passes]
    two, every = (sizes.index(number * len(data[0])) for number in (2, len(data)))
    assert (two < every) == random


MIXING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "spread over the batch": (MinibatchStd, (3, 5, 5)),
    "attention over the batch": (BatchAttention, (6,)),
    "batch norm outside a layer": (FunctionalNorm, (6,)),
    "shuffled batch": (Shuffle, (6,)),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_images_runs_real_micro_batches(name: str) -> None:
    make, shape = MIXING[name]
    report, real = both(unsettled(make()), images(8, 4, *shape), 4)
    assert not report.scan.emulated
    assert report.scan.physical_batch == 4
    assert "mixes the samples" in report.scan.emulation
    assert not report.scan.self_check.passed
    assert max(report.scan.self_check.output_error, report.scan.self_check.statistic_error) > 0.01
    assert report.layers == real.layers
    assert report.summary == real.summary


class MixesOnOnePath(nn.Module):
    """Subtracts the mean over the batch in one of the two modes only."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.when = training
        self.first, self.second = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.second(x - x.mean(0) if self.training == self.when else x)


@pytest.mark.parametrize("training", [True, False])
def test_mixing_in_one_mode_only_is_caught(training: bool) -> None:
    report, real = both(unsettled(MixesOnOnePath(training)), images(8, 4, 6), 4)
    assert not report.scan.emulated
    assert report.layers == real.layers


@pytest.mark.parametrize("planned", [False, True], ids=["asked for", "by its size"])
def test_a_physical_batch_of_one_micro_batch_says_so(planned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CPU_TENSOR_BYTES", 1)
    options = {} if planned else {"physical_batch": 4}
    report = scan(unsettled(Residual()), images(8, 4, 3, 6, 6), 4, **options)
    assert (report.scan.emulated, report.scan.emulation) == (False, "One micro-batch already fills a physical batch.")


def test_dropout_is_no_mixing() -> None:
    model = nn.Sequential(unsettled(nn.BatchNorm1d(6)), nn.Dropout(0.5), nn.BatchNorm1d(6))
    report = scan(model, images(8, 4, 6), 4, num_batches=8)
    assert report.scan.emulated
    assert report.scan.self_check.passed


def test_the_check_names_the_first_layer_behind_the_mixing() -> None:
    report = scan(unsettled(MinibatchStd()), images(8, 4, 3, 5, 5), 4, num_batches=8)
    assert report.scan.self_check.first_layer == "second.1"


class BySize(nn.Module):
    """Does something else with more than 8 samples."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.skips, self.first, self.second = skips, nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        many = len(x) > 8
        return self.second(x.exp() if many and self.skips else self.first(3 * x if many else x).exp())


@pytest.mark.parametrize("skips", [True, False])
def test_what_only_batches_of_more_than_two_micro_batches_show(skips: bool) -> None:
    together, real = both(unsettled(BySize(skips)), images(8, 4, 3), 4)
    assert not together.scan.emulated
    assert_same_figures(together, real, rel=1e-4)


class ByFirstSample(nn.Module):
    def __init__(self, swaps: bool) -> None:
        super().__init__()
        self.swaps, self.first, self.second = swaps, nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] > 0:
            return self.second(self.first(x))
        return self.first(self.second(x)) if self.swaps else self.second(x)


@pytest.mark.parametrize("swaps", [True, False])
def test_which_layers_run_may_be_decided_by_what_only_a_later_batch_holds(swaps: bool) -> None:
    data = images(12, 4, 3)
    for position, batch in enumerate(data):
        batch[0, 0] = 1.0 if position < 8 else -1.0
    together, real = both(unsettled(ByFirstSample(swaps)), data, 4, physical_batch=16)
    assert together.scan.emulation.startswith("Later micro-batches run one by one. Which layers are called")
    assert_same_figures(together, real, rel=1e-4)


def test_a_random_forward_pass_cannot_be_checked() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + torch.randn_like(x))

    report = scan(Noisy(), images(8, 4, 6), 4, num_batches=8)
    assert not report.scan.emulated
    assert "random" in report.scan.emulation
    assert report.scan.batches == 8


def test_images_of_different_size() -> None:
    data = [torch.randn(2, 3, size, size) for size in (5, 6, 5, 7)]
    report, real = both(unsettled(Residual()), data, 2)
    assert not report.scan.emulated
    assert "differ in size" in report.scan.emulation
    assert report.layers == real.layers


def test_images_of_different_size_later_in_the_data() -> None:
    data = [torch.randn(2, 3, size, size) for size in (5, 5, 5, 5, 6, 7)]
    report, real = both(unsettled(Residual()), data, 2, physical_batch=4)
    assert "differ in size" in report.scan.emulation
    assert report.scan.batches == 6
    assert_same_figures(report, real, rel=1e-4)


class Boxes:
    """A batch object that only its own library can take apart."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Boxes:
        return Boxes(self.x.to(device))


def test_batch_objects_that_cannot_be_joined() -> None:
    data = [Boxes(x) for x in images(5, 2, 3, 6, 6)]
    model = unsettled(Residual())
    report = scan(model, data, 2, num_batches=5, forward=lambda model, batch: model(batch.x))
    plain = scan(model, images(5, 2, 3, 6, 6), 2, num_batches=5, emulate=False)
    assert not report.scan.emulated
    assert "Boxes" in report.scan.emulation
    assert report.layers == plain.layers


class Regions(nn.Module):
    """A head whose rows are not images: as many as there are positive pixels."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.rows, self.image = nn.BatchNorm1d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        picked = x.permute(0, 2, 3, 1).flatten(0, 2)[:-1]
        parts = [lambda: self.rows(picked).mean(), lambda: self.image(x).mean()]
        return sum(part() for part in (parts if self.first else parts[::-1]))


@pytest.mark.parametrize("first", [True, False])
def test_rows_that_are_no_images(first: bool) -> None:
    model, data = unsettled(Regions(first)), images(6, 2, 3, 4, 4)
    report = scan(model, data, 2, num_batches=6)
    assert not report.scan.emulated
    assert "31 rows" in report.scan.emulation or "63 rows" in report.scan.emulation
    reference = measure(model, data, "train")
    for layer in report.layers:
        (figures,) = reference.layer(layer.name)
        expected = torch.tensor([row.mean() for row in figures.mismatch]).mean()
        assert layer.values_per_channel == figures.values_per_channel
        assert layer.train.mismatch == pytest.approx(float(expected), rel=1e-4)
        assert layer.eval.mismatch == pytest.approx(float(expected), rel=1e-4)


def test_one_micro_batch_of_data_is_not_emulated() -> None:
    report = scan(unsettled(Flat()), images(1, 4, 6), 4)
    assert not report.scan.emulated
    assert report.scan.self_check is None
    assert "only one" in report.scan.emulation


class Refuses(nn.Module):
    """Raises on batches of another size than it was written for, from a marked micro-batch on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.norm = size, nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 50 and len(x) != self.size:
            raise ValueError(f"made for {self.size} rows, got {len(x)}\nand a second line")
        return self.norm(x)


@pytest.mark.parametrize("marked", [0, 5])
def test_an_exception_on_joined_micro_batches_means_that_they_run_one_by_one(marked: int) -> None:
    data = images(8, 4, 6)
    data[marked][0, 0] = 99.0
    report, real = both(unsettled(Refuses(4)), data, 4, physical_batch=8)
    assert report.scan.batches == 8
    joined = "Joined micro-batches raise ValueError: made for 4 rows, got 8."
    assert report.scan.emulation == (f"Later micro-batches run one by one. {joined}" if marked else joined)
    assert_same_figures(report, real, rel=1e-5)


def test_an_exception_on_a_real_micro_batch_is_the_users_error() -> None:
    data = images(8, 4, 6)
    data[5][0, 0] = 99.0
    with pytest.raises(UserCodeError, match="made for 3 rows, got 4") as raised:
        scan(unsettled(Refuses(3)), data, 4, num_batches=8, physical_batch=8)
    assert raised.value.report is not None
    assert raised.value.report.scan.batches == 5
    assert "Joined" not in raised.value.report.scan.emulation


class RandomPartner(nn.Module):
    """Mixes two samples of a batch, or one with its own copies only, at random and in training only."""

    def __init__(self, partner: str) -> None:
        super().__init__()
        self.partner, self.lift, self.norm = partner, nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        if self.training:
            mask = torch.rand(len(x), 1) < 0.7
            whole = torch.rand(()) < 0.7
            order = torch.randperm(len(x))
            x = {
                "another sample": lambda: 0.6 * x + 0.4 * x[order],
                "the mean": lambda: x + mask * x.mean(),
                "dropped rows": lambda: x * mask / 0.7,
                "dropped batch": lambda: x * whole + x,
                "noise": lambda: x + torch.randn_like(x),
                "numpy": lambda: x * float(np.random.default_rng().random() > 2) + x * float(np.random.rand() > 2) + x,
            }[self.partner]()
        return self.norm(x)


@pytest.mark.parametrize("partner", ["another sample", "the mean"])
def test_mixing_at_random_in_training_only_is_caught(partner: str) -> None:
    report = scan(unsettled(RandomPartner(partner)), images(8, 4, 6), 4, num_batches=8)
    assert not report.scan.emulated
    assert report.scan.emulation == "In training, the model mixes the samples of a batch at random."
    assert report.scan.self_check.first_layer == "norm"
    assert report.scan.self_check.statistic_error > 0.1


@pytest.mark.parametrize("partner", ["dropped rows", "dropped batch", "noise", "numpy"])
def test_random_layers_that_treat_samples_by_themselves_are_not_accused(partner: str) -> None:
    report = scan(unsettled(RandomPartner(partner)), images(8, 4, 6), 4, num_batches=8)
    assert report.scan.emulated, report.scan.emulation
    assert report.scan.self_check.paths == ("steady", "eval", "train")


class RandomHead(nn.Module):
    """An auxiliary head with dropout, whose rows lie in blocks: no pass without random layers shows how."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.aux = nn.BatchNorm1d(6), nn.Dropout(), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.training:
            return x.sum(1) + self.aux(self.drop(torch.cat([x[:, :3], 2 * x[:, 3:] + 1]))).sum(1).view(2, -1).sum(0)
        return x.sum(1)


def test_rows_of_a_head_that_only_training_runs_are_not_given_to_the_wrong_sample() -> None:
    report = scan(unsettled(RandomHead()), images(8, 4, 6), 4, num_batches=8)
    assert not report.scan.emulated


class Chaotic(nn.Module):
    """The samples of a batch differ in their last digits only, which the first norm divides by almost nothing."""

    def __init__(self, dtype: torch.dtype | None = None, mixes: bool = False) -> None:
        super().__init__()
        self.dtype, self.mixes = dtype, mixes
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.one, self.other = nn.BatchNorm1d(64, eps=1e-14), nn.BatchNorm1d(64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.first(x.to(self.dtype)))
        return self.other(self.second(x - 0.01 * x[:1] if self.mixes else x))


def chaotic(**options: Any) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model, data = Chaotic(**options), [1 + 1e-5 * x for x in images(16, 2, 64)]
    for _ in range(30):
        model(torch.cat(data))
    return model, data


def test_where_rounding_hides_the_answer_it_is_found_in_float64() -> None:
    model, data = chaotic()
    report, real = both(model, data, 2)
    assert report.scan.emulated, report.scan.emulation
    assert report.scan.self_check.float64
    for layer, alone in zip(report.layers, real.layers, strict=True):  # rounding is amplified in both
        assert layer.train.mismatch == pytest.approx(alone.train.mismatch, rel=0.02)
    assert next(model.parameters()).dtype == torch.float32


def test_mixing_is_found_in_float64_where_rounding_hides_it() -> None:
    model, data = chaotic(mixes=True)
    report = scan(model, data, 2, num_batches=16)
    assert "mixes the samples" in report.scan.emulation


def test_a_model_that_cannot_run_in_float64_stays_refused() -> None:
    model, data = chaotic(dtype=torch.float32)
    report = scan(model, data, 2, num_batches=16)
    assert not report.scan.emulated
    assert "amplifies rounding errors" in report.scan.emulation


class Bounded(nn.Module):
    """Refuses values that are no probabilities, as a loss within the forward pass does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        assert 0 <= x.min() <= x.max() <= 1
        return self.norm(x)


def test_changed_inputs_stay_within_their_range() -> None:
    report = scan(unsettled(Bounded()), [(x > 0).float() for x in images(8, 4, 6)], 4, num_batches=8)
    assert report.scan.emulated, report.scan.emulation


class OnlyInTraining(nn.Module):
    """At inference it calls no layer and returns one number: nothing shows whether samples are mixed there."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).sum() if self.training else (x - x.mean(0)).square().sum()


def test_a_check_that_compares_nothing_does_not_pass() -> None:
    report = scan(OnlyInTraining(), images(4, 4, 6), 4, num_batches=4)
    assert not report.scan.emulated
    assert report.scan.emulation == "No layer and no output shows whether micro-batches can run together."
    assert report.scan.self_check is None
