"""A monitor in service: what it says of a shift, and that it changes nothing; its test is in stats/test_sequential."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnprobe
from bnprobe.errors import BnprobeError, DataError, NothingToProbeError, UsageError
from bnprobe.measure.batch import MicroBatch
from bnprobe.measure.drift import LayerInputs
from bnprobe.measure.restore import random_state
from bnprobe.monitor.shift import _SHARE
from bnprobe.records import Profile
from bnprobe.stats.sequential import MOST_KEPT
from support.operators import Operators


class Net(nn.Module):
    """A BN over images, one that is called twice, and one over vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.mix, self.shared = nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12)
        self.last = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.shared(torch.relu(self.shared(self.mix(x))))
        return self.last(x.mean((2, 3)))


def _images(size: int, seed: int) -> Tensor:
    """Images of different brightness."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=generator) + torch.randn(size, 1, 1, 1, generator=generator)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    for step in range(40):
        net(_images(32, step))
    return net.eval()


@pytest.fixture(scope="module")
def profile(model: nn.Module) -> Profile:
    return bnprobe.profile(model, [_images(32, 1_000 + step) for step in range(48)])


def _watch(model: nn.Module, profile: Profile, change: Callable[[Tensor], Tensor], **settings: Any) -> Any:
    """A monitor that has seen 40 healthy batches, and up to 40 changed ones until its alarm."""
    monitor = bnprobe.ShiftMonitor(model, profile, **{"every": 1, "on_alarm": lambda monitor: None, **settings})
    with monitor:
        for step in range(40):
            model(_images(16, 2_000 + step))
        assert not monitor.alarm
        for step in range(40):
            if not monitor.alarm:
                model(change(_images(16, 3_000 + step)))
    return monitor


# --- The profile ------------------------------------------------------------------------------------------------------


def test_a_profile_is_what_a_loop_over_single_images_gives(model: nn.Module, profile: Profile) -> None:
    assert [(layer.name, layer.call) for layer in profile.layers] == [
        ("first.1", 0),
        ("shared", 0),
        ("shared", 1),
        ("last.1", 0),
    ]
    assert (profile.described, profile.blocks, profile.block) == (128, 176, 8)
    layer, norm = profile.layers[0], model.get_submodule("first.1")
    images = torch.cat([_images(32, 1_000 + step) for step in _order(48)])
    figures = []
    for image in images:
        seen = model.get_submodule("first.0")(image[None]).double()[0]
        scale = (norm.running_var.double() + norm.eps).sqrt()
        off = (seen - norm.running_mean[:, None, None].double()) / scale[:, None, None]
        figures.append(torch.stack([off.mean((1, 2)), (1 + off.square().mean((1, 2))).log()]))
    rows = torch.stack(figures).detach()
    mean, std = rows[:128].mean(0), rows[:128].std(0)
    torch.testing.assert_close(torch.tensor([layer.position, layer.extent]).double(), mean, rtol=1e-5, atol=1e-5)
    spreads = torch.tensor([layer.position_spread, layer.extent_spread]).double()
    torch.testing.assert_close(spreads, std, rtol=1e-4, atol=1e-5)
    block = 8 * ((rows[128:136].mean(0) - mean) / std).square()
    assert layer.scores[0] == pytest.approx(float(block.mean()), rel=1e-3)


def _order(count: int) -> list[int]:
    """The order in which a list of batches is read."""
    from bnprobe.commands.profile import reader_of
    from bnprobe.config.load import settings_from
    from bnprobe.loading.data import as_batch_source

    numbers = [torch.full((32,), step) for step in range(count)]
    read: list[MicroBatch] = list(reader_of(as_batch_source(numbers, as_given=True), settings_from({})))
    return [int(batch.data[0]) for batch in read]


def test_a_profile_is_saved_and_read(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    assert "176 blocks of 8" in str(profile)


def test_a_profile_is_bounded_and_reads_no_more_than_it_holds(model: nn.Module) -> None:
    read = []

    def batches() -> Any:
        for step in range(100_000):
            read.append(step)
            yield _images(16, step)

    found = bnprobe.profile(model, batches(), block=2)
    assert found.blocks == 512
    assert all(len(layer.scores) == 512 for layer in found.layers)
    assert len(read) <= (384 + 1024) // 16 + 1


def test_a_profile_leaves_the_model_as_it_was(model: nn.Module) -> None:
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, random_state()
    model.train()
    bnprobe.profile(model, [_images(32, step) for step in range(8)])
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert random_state() == state


@pytest.mark.parametrize(
    ("kind", "batches", "error", "message"),
    [
        (None, 3, DataError, "gave 96 samples, and a profile in blocks of 8 needs at least 193"),
        ("untracked", 8, NothingToProbeError, "it keeps no running statistics"),
        ("none", 8, NothingToProbeError, "no Batch Normalization layer"),
    ],
)
def test_what_cannot_be_profiled(
    model: nn.Module, kind: str | None, batches: int, error: type[BnprobeError], message: str
) -> None:
    norm = {"untracked": nn.BatchNorm2d(3, track_running_stats=False), "none": nn.ReLU()}.get(kind or "")
    with pytest.raises(error, match=message):
        bnprobe.profile(norm or model, [_images(32, step) for step in range(batches)])


def test_a_layer_that_sees_other_rows_than_samples_is_left_out() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.parts = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.parts(torch.cat(self.whole(x).chunk(2, dim=2)))

    found = bnprobe.profile(Halves().eval(), [_images(32, step) for step in range(8)])
    assert [layer.name for layer in found.layers] == ["whole"]
    assert [(layer.name, layer.reason) for layer in found.skipped] == [
        ("parts", "it does not see one row for each sample")
    ]


# --- The monitor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 1.0,
        lambda x: 0.5 * x,
        lambda x: x + 0.7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
        lambda x: x.flip(3) * torch.tensor([1.0, 0.3, 1.0])[:, None, None],
    ],
    ids=["brighter", "less contrast", "noise", "one colour"],
)
def test_a_shift_is_found_soon_after_it_begins(
    model: nn.Module, profile: Profile, change: Callable[[Tensor], Tensor]
) -> None:
    monitor = _watch(model, profile, change)
    assert monitor.alarm
    assert monitor.samples - 320 <= 160
    report = monitor.summary()
    assert report.alarm == monitor.samples
    assert not report.ok
    moved = [layer for layer in monitor.layers if layer.moved]
    assert moved
    assert all(layer.since is not None and layer.since <= report.samples - 280 for layer in moved)
    assert "Alarm after" in str(report)


def test_it_says_which_channels_moved_and_how_far() -> None:
    """The layer sees the images themselves: one channel moves by 1.5 standard deviations of the images' means."""
    norm = nn.BatchNorm2d(3).eval()
    profile = bnprobe.profile(norm, [_images(32, step) for step in range(48)])
    monitor = _watch(norm, profile, lambda x: x + 1.5 * torch.tensor([0.0, 1.0, 0.0])[:, None, None])
    with monitor:
        for step in range(60):
            norm(_images(16, 4_000 + step) + 1.5 * torch.tensor([0.0, 1.0, 0.0])[:, None, None])
    (layer,) = monitor.layers
    assert [layer.channels[0].channel, layer.moved] == [1, True]
    spread = (1 + 1 / 64) ** 0.5  # of the mean of an image with brightness of its own
    assert layer.channels[0].position == pytest.approx(1.5 / spread, abs=0.35)
    assert layer.position == pytest.approx(1.5 / spread / 3**0.5, abs=0.2)
    assert abs(layer.channels[-1].position) < 0.3


def test_a_healthy_stream_is_let_pass_and_its_memory_is_bounded(model: nn.Module, profile: Profile) -> None:
    monitor = bnprobe.ShiftMonitor(model, profile, every=1, samples=64)
    with monitor, torch.inference_mode():
        for step in range(300):
            model(_images(64, 5_000 + step))
    assert not monitor.alarm
    assert monitor.samples == 19_200
    assert monitor.summary().ok
    assert len(monitor._drift._test._kept) == MOST_KEPT


def test_it_looks_at_every_so_manieth_batch_and_few_of_its_samples(model: nn.Module, profile: Profile) -> None:
    with bnprobe.ShiftMonitor(model, profile, every=4, samples=5) as monitor:
        for step in range(10):
            model(_images(16, step))
            assert not model.get_submodule("first.1")._forward_pre_hooks  # between looks, and after them
    assert (monitor.batches, monitor.samples) == (10, 15)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_looks_space_themselves_so_that_they_cost_little(
    model: nn.Module, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds are those of a clock that only says what the test wants: passes take 1, and looks 2, but one takes 50."""
    now, looked = [0.0], []
    for module in ("bnprobe.monitor.shift", "bnprobe.measure.drift"):
        monkeypatch.setattr(f"{module}.perf_counter", lambda: now[0])
    take = LayerInputs._take

    def slow(inputs: LayerInputs, layer: Any, x: Any) -> None:
        now[0] += (50.0 if monitor.batches == looks[5] else 2.0) / 4  # four calls of layers
        take(inputs, layer, x)
        looked.append(monitor.batches)

    monkeypatch.setattr(LayerInputs, "_take", slow)

    def forward(*_: object) -> None:
        now[0] += 1.0

    apart = math.ceil(2 / _SHARE)
    looks = [1, 9, 17, *(17 + apart * number for number in range(1, 8))]  # the second look is the first that counts
    handle = model.get_submodule("mix").register_forward_pre_hook(forward)
    with bnprobe.ShiftMonitor(model, profile) as monitor:
        for step in range(looks[-1]):
            model(_images(8, step))
    handle.remove()
    assert sorted(set(looked)) == looks
    assert 2 / apart <= _SHARE


def test_which_batches_are_looked_at_does_not_depend_on_what_is_in_them(
    model: nn.Module, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that counts how often it is read."""
    ticks = itertools.count()
    for module in ("bnprobe.monitor.shift", "bnprobe.measure.drift"):
        monkeypatch.setattr(f"{module}.perf_counter", lambda: float(next(ticks)))
    samples = []
    for shift in (0.0, 3.0, math.nan):
        with bnprobe.ShiftMonitor(model, profile, on_alarm=lambda monitor: None) as monitor:
            for step in range(200):
                model(_images(8, step) + shift)
                samples.append(monitor.samples)
    assert samples[:200] == samples[200:400] == samples[400:]


def test_a_batch_between_looks_costs_no_operator(model: nn.Module, profile: Profile) -> None:
    images = _images(16, 0)
    with torch.no_grad(), Operators() as plain:
        model(images)
    with torch.no_grad(), bnprobe.ShiftMonitor(model, profile) as monitor:
        model(images)
        with Operators() as between:
            for _ in range(7):
                model(images)
        with Operators() as look:
            model(images)
    assert between.found == Counter({each: 7 * number for each, number in plain.found.items()})
    assert monitor.samples == 16
    # Eight for each of four calls of layers, of which four compute, and the rest for all of them together.
    assert look.found.total() - plain.found.total() <= 4 * 8 + 28


def test_outputs_and_the_random_state_are_bit_identical(model: nn.Module, profile: Profile) -> None:
    batches = [_images(size, size) for size in (1, 3, 16, 64)]
    expected, before = [model(batch) for batch in batches], random_state()[1:]  # Python's: checks of types draw there
    with bnprobe.ShiftMonitor(model, profile, every=1):
        found = [model(batch) for batch in batches]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert random_state()[1:] == before


def test_single_samples_make_blocks(model: nn.Module, profile: Profile) -> None:
    monitor = bnprobe.ShiftMonitor(model, profile, every=1, on_alarm=lambda monitor: None)
    with monitor:
        for step in range(200):
            if not monitor.alarm:
                model(_images(1, 6_000 + step) + 1.5)
    assert monitor.alarm
    assert monitor.samples % 8 == 0


def test_an_alarm_is_raised_once_and_stays_until_reset(model: nn.Module, profile: Profile) -> None:
    raised: list[Any] = []
    monitor = _watch(model, profile, lambda x: x + 2, on_alarm=raised.append)
    with monitor:
        model(_images(16, 1))
    assert raised == [monitor]
    assert monitor.alarm
    monitor.reset()
    assert (monitor.alarm, monitor.samples, monitor.batches) == (False, 0, 0)
    with monitor:
        _serve(model, 2.0)
    assert raised == [monitor, monitor]


def test_an_alarm_is_a_warning_that_names_layers(model: nn.Module, profile: Profile) -> None:
    with bnprobe.ShiftMonitor(model, profile, every=1), pytest.warns(UserWarning, match=r"its profile, in first\.1"):
        _serve(model, 2.0)


def _serve(model: nn.Module, shift: float) -> None:
    for step in range(20):
        model(_images(16, step) + shift)


def test_training_and_batches_that_cannot_be_judged_are_left_out(model: nn.Module, profile: Profile) -> None:
    with bnprobe.ShiftMonitor(model, profile, every=1) as monitor:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.train()
        with pytest.warns(UserWarning, match="in train mode"):
            model(_images(16, 1))
        model(_images(16, 1))  # it is said once: warnings are errors here
        model.load_state_dict(state)
        model.eval()
        assert monitor.batches == 0
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 5, 8, 8))
        model.get_submodule("shared").train()
        model(_images(16, 1))
        model.load_state_dict(state)
        model.eval()
        assert (monitor.batches, monitor.left_out, monitor.samples) == (2, 2, 0)
        model(_images(16, 1))
    assert monitor.samples == 8
    assert "2 batches left out" in str(monitor.summary())


def test_a_nan_is_a_shift_and_no_error(model: nn.Module, profile: Profile) -> None:
    monitor = _watch(model, profile, lambda x: x * torch.nan)
    assert monitor.alarm


@pytest.mark.parametrize(
    "failing", ["bnprobe.monitor.shift.count_samples_of_call", "bnprobe.measure.drift.Healthy.scores"]
)
def test_whatever_fails_the_model_goes_on(
    model: nn.Module, profile: Profile, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("none left")

    expected = model(_images(16, 0))
    with bnprobe.ShiftMonitor(model, profile, every=1) as monitor:
        monkeypatch.setattr(failing, fail)
        with pytest.warns(UserWarning, match="the model goes on: MemoryError: none left"):
            found = model(_images(16, 0))
        assert torch.equal(found, expected)
        assert not model._forward_pre_hooks
        monkeypatch.undo()
        assert torch.equal(model(_images(16, 0)), expected)
        before = monitor.samples
        monitor.start()
        model(_images(16, 1))
        assert monitor.samples == before + 8
    assert not model.get_submodule("shared")._forward_pre_hooks


def test_an_error_of_the_model_stays_what_it_is_and_its_batch_is_not_judged(
    model: nn.Module, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that raises behind the last layer; torch then iterates over the hooks, which may not change."""

    def fail(*_: object) -> None:
        raise ValueError("the user's own")

    handle = model.get_submodule("last.3").register_forward_hook(fail)
    with bnprobe.ShiftMonitor(model, profile, every=1, on_alarm=lambda monitor: monitor.stop()) as monitor:
        with pytest.raises(ValueError, match="the user's own"):
            model(_images(16, 0))
        with monkeypatch.context() as broken:
            broken.setattr("bnprobe.measure.drift.Healthy.scores", fail)
            with pytest.raises(ValueError, match="the user's own"):
                model(_images(16, 0))
        assert (monitor.batches, monitor.left_out, monitor.samples) == (2, 2, 0)
        handle.remove()
        try:
            fail()
        except ValueError:
            model(_images(16, 1))  # which did not raise
        assert monitor.samples == 8


def test_threads_do_not_disturb_each_other(model: nn.Module, profile: Profile) -> None:
    with bnprobe.ShiftMonitor(model, profile, every=1) as monitor:

        def serve(first: int) -> None:
            for step in range(30):
                model(_images(8, first + step))

        threads = [threading.Thread(target=serve, args=(100 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert monitor.left_out == 0
    assert monitor.samples % 8 == 0
    assert monitor.samples > 0


@pytest.mark.parametrize("settings", [{"every": 0}, {"samples": 0}, {"alpha": 1.0}, {"on_alarm": "stop"}])
def test_arguments_that_cannot_work_are_refused(model: nn.Module, profile: Profile, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        bnprobe.ShiftMonitor(model, profile, **settings)


def test_other_models_and_weights_are_refused(model: nn.Module, profile: Profile) -> None:
    with pytest.raises(UsageError, match="which this model does not have"):
        bnprobe.ShiftMonitor(nn.BatchNorm2d(3), profile)
    with pytest.raises(UsageError, match="running statistics are not those"):
        bnprobe.ShiftMonitor(Net().eval(), profile)
    with pytest.raises(UsageError, match="compiled"):
        bnprobe.ShiftMonitor(torch.compile(model, backend="eager"), profile)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="DataParallel"):
        bnprobe.ShiftMonitor(nn.DataParallel(model), profile)
    with pytest.raises(UsageError, match="does not exist"):
        bnprobe.ShiftMonitor(model, "nowhere.json")


def test_a_model_that_is_compiled_behind_its_back_is_not_seen_and_said(model: nn.Module, profile: Profile) -> None:
    torch.compiler.reset()
    with bnprobe.ShiftMonitor(model, profile, every=1) as monitor:
        torch.compile(model, backend="eager")(_images(16, 0))
    assert monitor.samples == 0
    assert "without torch.compile" in " ".join(str(monitor.summary()).split())
    torch.compiler.reset()


def test_a_file_will_do(model: nn.Module, profile: Profile, tmp_path: Path) -> None:
    replace(profile, notes=()).save(tmp_path / "profile.json")
    with bnprobe.ShiftMonitor(model, tmp_path / "profile.json", every=1) as monitor:
        model(_images(16, 0))
    assert monitor.samples == 8
