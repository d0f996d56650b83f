"""Recalibration against a slow float64 reference, against torch's own, and undone whenever anything fails."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import bnprobe
from bnprobe.config.spec import ScanSettings
from bnprobe.errors import (
    DataError,
    ModelError,
    NonFiniteError,
    NothingToProbeError,
    RepairError,
    UsageError,
    UserCodeError,
)
from bnprobe.loading.data import as_batch_source
from bnprobe.measure import population, reader
from bnprobe.measure.forward_pass import Pass
from bnprobe.measure.session import PathName, Session
from bnprobe.nn import BatchRenorm2d
from bnprobe.repairs.recalibration import recalibrate_loaded, repeated
from support.fingerprint import fingerprint
from support.networks import Dense, Flat, InvertedBottleneck, Residual, Siamese, UNet, Video, images, unsettled
from support.running import norms

SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "flat": (Flat, (6,)),
    "residual": (Residual, (3, 6, 6)),
    "dense": (Dense, (3, 6, 6)),
    "bottleneck": (InvertedBottleneck, (3, 4, 4)),
    "unet": (UNet, (3, 8, 8)),
    "video": (lambda: Video(interleaved=True), (5, 3, 4, 4)),
}


def data(count: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images that are sorted by brightness: batches of neighbours differ a lot."""
    flat = images(1, count, *shape)[0].to(dtype) + 0.5
    return flat + torch.linspace(-1, 1, count, dtype=dtype).reshape(-1, *[1] * len(shape))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=tolerance, atol=tolerance, msg=name)


class Seen:
    """Keeps what every BN layer is given; all calls of a layer together."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms(model)}
        for norm in norms(model):
            norm.register_forward_pre_hook(lambda module, args: self.inputs[module].append(args[0].transpose(0, 1)))

    def moments(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        values = torch.cat([x.flatten(1) for x in self.inputs[norm]], 1).double()
        return values.mean(1), values.var(1, correction=1)


def by_layer(model: nn.Module, whole: Tensor) -> dict[str, Tensor]:
    """The eval path, slow and obvious: everything in one batch, anew for each layer in the order of the calls."""
    twin = copy.deepcopy(model).eval()
    order: list[nn.Module] = []
    for norm in norms(twin):
        norm.register_forward_hook(lambda module, args, output: order.append(module))
    with torch.no_grad():
        twin(whole)
        for norm in dict.fromkeys(order):
            watched = copy.deepcopy(twin)
            seen = Seen(watched)
            watched(whole)
            mean, variance = seen.moments(norms(watched)[norms(twin).index(norm)])
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
    return statistics(twin)


def by_batch(model: nn.Module, batches: Sequence[Any]) -> dict[str, Tensor]:
    """The train path on these physical batches: what all of them showed to a layer, as one population."""
    twin = copy.deepcopy(model).eval()
    for norm in norms(twin):
        norm.train()
    seen = Seen(twin)
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    for norm in norms(twin):
        mean, variance = seen.moments(norm)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    return statistics(twin)


class Passes:
    """The user's ``forward``, which counts the samples that run through the model."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, model: nn.Module, batch: Tensor) -> Any:
        self.samples += batch.shape[0]
        return model(batch)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All the data never run as one physical batch."""
    monkeypatch.setattr(population, "LARGEST", 0)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
def test_every_batch_size_gives_the_same_on_the_eval_path(name: str, size: int) -> None:
    make, shape = SHAPES[name]
    model, whole = unsettled(make().double()), data(100, *shape)
    expected = by_layer(model, whole)
    assert bnprobe.recalibrate(model, list(whole.split(size)), path="eval") is model
    assert_close(statistics(model), expected, 1e-10)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.usefixtures("little_memory")
def test_layer_by_layer_it_is_the_same(name: str, size: int) -> None:
    make, shape = SHAPES[name]
    model, whole = unsettled(make().double()), data(100, *shape)
    expected = by_layer(model, whole)
    bnprobe.recalibrate(model, list(whole.split(size)), path="eval")
    assert_close(statistics(model), expected, 1e-10)


def passes(model: nn.Module, **options: Any) -> float:
    """Samples that ran on the eval path for each of 100 more samples in the data: without what is checked first."""
    found = []
    for count in (100, 200):
        forward = Passes()
        batches = list(data(count, 3, 6, 6).split(4))
        bnprobe.recalibrate(copy.deepcopy(model), batches, path="eval", forward=forward, **options)
        found.append(forward.samples)
    return (found[1] - found[0]) / 100


def test_one_pass_is_enough_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unsettled(Dense().double())
    assert passes(model) == 1
    monkeypatch.setattr(population, "LARGEST", 0)
    assert passes(model) == len(norms(model))


def test_large_data_is_not_held_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population, "KEPT_BYTES", 0)
    assert passes(unsettled(Residual().double())) == 2


def test_layers_that_are_not_asked_for_keep_what_they_normalize_with() -> None:
    model, whole = unsettled(Residual().double()), data(20, 3, 6, 6)
    expected = by_layer(model, whole)
    bnprobe.recalibrate(model, list(whole.split(4)), path="eval", layers=["bn1"])
    bnprobe.recalibrate(model, list(whole.split(4)), path="eval", layers=["bn2"])
    assert_close(statistics(model), expected, 1e-10)


def by_halves(model: nn.Module, batch: Tensor) -> Tensor:
    """Refuses more than 16 samples."""
    assert batch.shape[0] <= 16
    return model(batch)


def centred(model: nn.Module, batch: Tensor) -> Tensor:
    """The samples of a batch depend on each other."""
    return model(batch - batch.mean(0))


def out_of_memory(model: nn.Module, batch: Tensor) -> Tensor:
    if batch.shape[0] > 40:
        raise torch.OutOfMemoryError("not enough memory")
    return model(batch)


class WithoutStatistics(Residual):
    """Its first layer normalizes with its batch at inference, too."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(self.bn1.num_features, track_running_stats=False)


@pytest.mark.parametrize(
    ("make", "forward", "layers"),
    [
        (Residual, by_halves, ()),
        (Residual, centred, ()),
        (Residual, out_of_memory, ()),
        (WithoutStatistics, None, ("bn2",)),
    ],
    ids=["refuses", "mixes", "memory", "batch statistics"],
)
def test_what_cannot_run_at_once_runs_layer_by_layer(
    make: Any, forward: Any, layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for largest in (population.LARGEST, 0):
        monkeypatch.setattr(population, "LARGEST", largest)
        torch.manual_seed(0)
        model, whole = unsettled(make().double()), data(64, 3, 6, 6)
        bnprobe.recalibrate(model, list(whole.split(4)), path="eval", forward=forward, layers=layers)
        found.append(statistics(model))
    assert_close(*found, 0.0)


def test_a_single_batch_runs_at_once_whatever_its_samples_are_to_each_other() -> None:
    model, whole = unsettled(Residual().double()), data(20, 3, 6, 6)
    expected = by_layer(model, whole - whole.mean(0))
    bnprobe.recalibrate(model, [whole], path="eval", forward=centred)
    assert_close(statistics(model), expected, 1e-10)


def test_in_float32_every_batch_size_gives_the_same_up_to_rounding() -> None:
    whole = data(64, 3, 6, 6, dtype=torch.float32)
    model = unsettled(Residual())
    expected = by_layer(copy.deepcopy(model).double(), whole.double())
    for size in (1, 7, 64):
        twin = bnprobe.recalibrate(copy.deepcopy(model), list(whole.split(size)), path="eval")
        assert_close(statistics(twin), expected, 1e-5)


@pytest.mark.parametrize("name", ["flat", "residual", "dense", "bottleneck", "unet"])
@pytest.mark.parametrize("size", [5, 8])
def test_the_train_path_pools_one_large_batch(name: str, size: int) -> None:
    make, shape = SHAPES[name]
    model, whole = unsettled(make().double()), data(42, *shape)
    expected = by_batch(model, [whole])
    bnprobe.recalibrate(model, list(whole.split(size)))
    assert_close(statistics(model), expected, 1e-10)


def test_batches_that_cannot_be_mixed_normalize_as_they_are() -> None:
    """Partial ones too, weighed by what they hold: the first layer's statistics are those of all values."""
    model, whole = unsettled(Residual().double()), data(11, 3, 6, 6)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch - batch.mean(0))  # images of a batch depend on each other

    batches = list(whole.split(4))
    expected = by_batch(model, [batch - batch.mean(0) for batch in batches])
    bnprobe.recalibrate(model, batches, forward=forward)
    assert_close(statistics(model), expected, 1e-10)


def test_the_calls_of_a_shared_layer_are_one_population() -> None:
    pairs = images(1, 20, 2, 3, 6, 6)[0].double()
    for path in ("train", "eval"):
        model = unsettled(Siamese(together=False).double())
        together = unsettled(Siamese(together=True).double())
        together.load_state_dict(model.state_dict())
        bnprobe.recalibrate(model, [pairs[:10], pairs[10:]], path=path)
        expected = by_layer(together, pairs) if path == "eval" else by_batch(model, [pairs])
        assert_close(statistics(model), expected, 1e-10)
        assert int(model.norm.num_batches_tracked) == 4  # two batches, two calls


def test_the_samples_of_a_ragged_batch_are_what_the_user_says() -> None:
    """34 nodes and 50 edges of 4 graphs, which nothing in the batch shows."""
    batches = [{"nodes": data(34, 6), "edges": torch.zeros(2, 50, dtype=torch.float64)} for _ in range(3)]
    model, loader = Flat().double(), DataLoader(batches, batch_size=None)
    options: dict[str, Any] = {"forward": lambda model, batch: model(batch["nodes"]), "path": "eval"}
    with pytest.raises(DataError, match="def batch_size_of"):
        bnprobe.recalibrate(model, loader, **options)
    expected = copy.deepcopy(model)
    bnprobe.recalibrate(model, loader, **options, batch_size_of=lambda batch: 4)
    bnprobe.recalibrate(expected, [batch["nodes"] for batch in batches], path="eval")
    assert_close(statistics(model), statistics(expected), 1e-10)


@pytest.mark.parametrize("path", ["train", "eval"])
def test_batch_renorm_gets_the_statistics_of_batch_norm(path: Any) -> None:
    """However it would correct them with the running statistics that it has."""
    model, plain = (unsettled(Residual(norm=norm).double()) for norm in (BatchRenorm2d, nn.BatchNorm2d))
    for layer in norms(model):
        layer.r_max, layer.d_max = 3.0, 5.0
    plain.load_state_dict(model.state_dict())
    batches = list(data(20, 3, 6, 6).split(5))
    found = [statistics(bnprobe.recalibrate(each, batches, path=path)) for each in (model, plain)]
    assert_close(found[0], found[1], 1e-10)
    assert (model.bn1.r_max, model.bn1.d_max) == (3.0, 5.0)


class Recurrent(nn.Module):
    """One layer before and after another: what it sees depends on its own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.other(self.norm(x).tanh()) + 0.5 * x)


def test_a_layer_that_sees_its_own_output_ends_at_a_fixed_point() -> None:
    model, whole = unsettled(Recurrent().double()), data(30, 4)
    bnprobe.recalibrate(model, list(whole.split(7)), path="eval")
    model.eval()
    seen = Seen(model)
    model(whole)
    for norm in norms(model):
        mean, variance = seen.moments(norm)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-10, atol=1e-10)


class Overshooting(nn.Module):
    """The larger the running variance, by its cube the smaller what the layer is given in its second call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(10 * self.norm(x) ** 3)


def test_statistics_that_never_settle_are_given_up() -> None:
    model = unsettled(Overshooting().double())
    before = fingerprint(model)
    with pytest.raises(RepairError, match="did not converge in 50 rounds with path='eval', because norm is called"):
        bnprobe.recalibrate(model, [data(20, 2)], path="eval")
    assert fingerprint(model) == before


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.first(x)))


def fresh(model: nn.Module) -> nn.Module:
    """A copy as torch's update_bn is given it: in train mode."""
    return copy.deepcopy(model).train()


def test_dropout_is_off_and_torch_leaves_it_on() -> None:
    model, whole = Dropped().double(), data(400, 4)
    found = bnprobe.recalibrate(fresh(model), [whole])
    theirs = fresh(model)
    update_bn([whole], theirs)
    assert_close(statistics(found), by_batch(model, [whole]), 1e-10)
    assert theirs.second.running_var.mean() > 1.5 * found.second.running_var.mean()


def test_a_partial_batch_weighs_what_it_holds_and_not_as_a_whole_one() -> None:
    whole = data(9, 6)
    model, theirs = nn.BatchNorm1d(6).double(), nn.BatchNorm1d(6).double()
    bnprobe.recalibrate(model, [whole[:8], whole[8:]])
    torch.testing.assert_close(model.running_mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.running_var, whole.var(0), rtol=1e-12, atol=1e-12)
    update_bn([whole[:7], whole[7:]], theirs)
    torch.testing.assert_close(theirs.running_mean, (whole[:7].mean(0) + whole[7:].mean(0)) / 2)
    assert not torch.allclose(theirs.running_mean, whole.mean(0), atol=0.1)


def test_the_variance_between_batches_counts_and_torch_drops_it() -> None:
    halves = [data(20, 6), data(20, 6) + 10]
    model, theirs = nn.BatchNorm1d(6).double(), nn.BatchNorm1d(6).double()
    bnprobe.recalibrate(model, halves)
    update_bn(halves, theirs)
    torch.testing.assert_close(model.running_var, torch.cat(halves).var(0))
    assert (theirs.running_var < 0.2 * model.running_var).all()


def test_of_equal_batches_of_one_layer_torch_gives_the_same_mean() -> None:
    whole = data(24, 6)
    model, theirs = nn.BatchNorm1d(6).double(), nn.BatchNorm1d(6).double()
    bnprobe.recalibrate(model, list(whole.split(8)))
    update_bn(list(whole.split(8)), theirs)
    torch.testing.assert_close(model.running_mean, theirs.running_mean)


def test_far_from_zero_no_variance_cancels() -> None:
    whole = 1000 + 0.01 * torch.randn(64, 3, 8, 8)
    model = nn.BatchNorm2d(3)
    bnprobe.recalibrate(model, list(whole.split(7)))
    expected = whole.double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(model.running_var.double(), expected, rtol=1e-4, atol=0.0)


class HeldInTraining(Flat):
    """Keeps its second BN layer frozen in training."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.body[4].eval()
        return self


@pytest.mark.parametrize("path", ["train", "eval"])
def test_layers_that_training_leaves_alone_are_left_alone(path: Any) -> None:
    model = unsettled(HeldInTraining().double())
    frozen, theirs = copy.deepcopy(model.body[4].state_dict()), copy.deepcopy(model)
    bnprobe.recalibrate(model, list(data(40, 6).split(8)), path=path)
    assert all(torch.equal(value, frozen[name]) for name, value in model.body[4].state_dict().items())
    assert not torch.equal(model.body[1].running_mean, theirs.body[1].running_mean)
    update_bn(list(data(40, 6).split(8)), theirs)
    assert not torch.equal(theirs.body[4].running_mean, frozen["running_mean"])


@pytest.mark.parametrize("path", ["train", "eval"])
def test_layers_that_training_leaves_alone_are_recalibrated_where_they_are_asked_for(path: Any) -> None:
    model, batches = unsettled(HeldInTraining().double()), list(data(40, 6).split(8))
    usual = unsettled(Flat().double())
    usual.load_state_dict(model.state_dict())
    bnprobe.recalibrate(model, batches, path=path, include_frozen=True)
    bnprobe.recalibrate(usual, batches, path=path)
    assert all(torch.equal(value, usual.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_model_of_frozen_layers_alone_is_refused_unless_they_are_asked_for() -> None:
    class Held(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    model, whole = Held(6).double(), data(40, 6)
    with pytest.raises(RepairError, match="give include_frozen=True"):
        bnprobe.recalibrate(model, [whole])
    bnprobe.recalibrate(model, [whole], include_frozen=True)
    torch.testing.assert_close(model.running_mean, whole.mean(0))


def test_everything_but_the_statistics_stays_as_it_was() -> None:
    model = unsettled(Flat())
    model.body[1].momentum, model.body[4].momentum = None, 0.3
    model.body[4].eval()
    model.train().body[4].weight.requires_grad_(False)
    kept = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    bnprobe.recalibrate(model, list(data(40, 6, dtype=torch.float32).split(8)))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed == {f"body.{i}.{n}" for i in (1, 4) for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert [norm.momentum for norm in norms(model)] == [None, 0.3]
    assert model.training
    assert not model.body[4].weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cumulative_average_goes_on_from_the_batches_pooled() -> None:
    batches = list(data(32, 6).split(8))
    model = nn.BatchNorm1d(6, momentum=None).double()
    bnprobe.recalibrate(model, batches[:3])
    assert int(model.num_batches_tracked) == 3
    model.train()(batches[3])
    torch.testing.assert_close(model.running_mean, torch.cat(batches).mean(0))


def test_layers_are_chosen_by_name() -> None:
    model, whole = unsettled(Residual().double()), data(20, 3, 6, 6)
    before, expected = statistics(model), by_batch(model, [whole])
    bnprobe.recalibrate(model, [whole], layers=["bn2"])
    found = statistics(model)
    assert torch.equal(found["bn1.running_mean"], before["bn1.running_mean"])
    torch.testing.assert_close(found["bn2.running_mean"], expected["bn2.running_mean"])
    with pytest.raises(UsageError, match=r'"bn3" matches no BN layer of the model; the nearest name is "bn[12]"'):
        bnprobe.recalibrate(model, [whole], layers=["bn3"])


@pytest.mark.parametrize("path", ["train", "eval"])
def test_layers_without_running_statistics_are_given_some(path: Any) -> None:
    """Those of a model that keeps them, which from then on has the same outputs at inference."""
    torch.manual_seed(0)
    without = Flat(track_running_stats=False).double()
    usual, whole = Flat().double(), data(20, 6)
    usual.load_state_dict(without.state_dict(), strict=False)
    for model in (without, usual):
        bnprobe.recalibrate(model, list(whole.split(5)), path=path)
    assert without.state_dict().keys() == usual.state_dict().keys()
    assert_close(statistics(without), statistics(usual), 0)
    assert all(norm.track_running_stats for norm in norms(without))
    torch.testing.assert_close(without.eval()(whole), usual.eval()(whole), rtol=0, atol=0)


def test_layers_that_could_not_be_given_statistics_are_as_they_were() -> None:
    model = Residual(track_running_stats=False)
    before = fingerprint(model)
    with pytest.raises(NothingToProbeError, match="was called while 8 samples ran"):
        bnprobe.recalibrate(model, [data(8, 3, 6, 6)], forward=lambda model, batch: batch)
    assert fingerprint(model) == before
    assert [norm.running_mean for norm in norms(model)] == [None, None]
    assert not any(norm.track_running_stats for norm in norms(model))


def test_only_layers_that_were_asked_for_are_given_statistics() -> None:
    model = Residual(track_running_stats=False).double()
    bnprobe.recalibrate(model, [data(8, 3, 6, 6)], layers=["bn2"])
    assert (model.bn1.running_mean is None, model.bn2.running_mean is None) == (True, False)


def test_no_layer_to_recalibrate_is_said() -> None:
    with pytest.raises(NothingToProbeError, match="has no Batch Normalization layer"):
        bnprobe.recalibrate(nn.Linear(2, 2), [torch.zeros(2, 2)])
    with pytest.raises(NothingToProbeError, match=r"None of the layers .* was called while 8 samples ran"):
        bnprobe.recalibrate(Flat(), [data(8, 6)], forward=lambda model, batch: batch)
    with pytest.raises(UsageError, match='Unknown path "test"'):
        bnprobe.recalibrate(Flat(), [data(8, 6)], path="test")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match='path="auto" scores the paths on held-out data, which only the command'):
        bnprobe.recalibrate(Flat(), [data(8, 6)], path="auto")  # type: ignore[arg-type]


# ---- reading the data


class Counting(TensorDataset):
    def __init__(self, whole: Tensor) -> None:
        super().__init__(whole)
        self.read = 0

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.read += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(("largest", "kept", "read"), [(2**31, 0, 20), (0, 2**30, 20), (0, 0, 40)])
def test_data_that_fit_into_memory_are_read_once_and_others_once_for_every_layer(
    largest: int, kept: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(population, "LARGEST", largest)
    monkeypatch.setattr(reader, "KEPT_BYTES", kept)
    whole = data(20, 3, 6, 6)
    dataset, model = Counting(whole), unsettled(Residual().double())
    expected = by_layer(model, whole)
    bnprobe.recalibrate(model, DataLoader(dataset, batch_size=6, shuffle=True), path="eval")
    assert_close(statistics(model), expected, 1e-10)
    assert dataset.read == read


@pytest.mark.parametrize(("kept", "read"), [(2**30, 20), (0, 40)])
def test_several_models_are_recalibrated_on_one_reading(kept: int, read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "KEPT_BYTES", kept)
    dataset, settings = Counting(data(20, 3, 6, 6)), ScanSettings()
    source = as_batch_source(DataLoader(dataset, batch_size=6, shuffle=True))
    batches = repeated(source, settings)
    twin = unsettled(Residual().double())
    models = [copy.deepcopy(twin) for _ in range(2)]
    for model in models:
        recalibrate_loaded(model, source, settings=settings, batches=batches)
    assert dataset.read == read
    recalibrate_loaded(twin, source, settings=settings)
    for model in models:
        assert_close(statistics(model), statistics(twin), 0.0)


@pytest.mark.usefixtures("little_memory")
def test_large_data_that_can_be_read_only_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "KEPT_BYTES", 0)
    model = unsettled(Residual().double())
    before = fingerprint(model)
    with pytest.raises(DataError, match="gave 20 samples in 3 batches, and 0 in 0 when it was read again"):
        bnprobe.recalibrate(model, iter(data(20, 3, 6, 6).split(8)), path="eval")
    assert fingerprint(model) == before
    bnprobe.recalibrate(model, iter(data(20, 3, 6, 6).split(8)))  # the train path reads once


def test_a_loader_is_rebuilt_and_drawn_from_all_over() -> None:
    """Of sorted data a few batches must not be those of its beginning."""
    whole = torch.arange(1000.0).reshape(-1, 1)
    model = nn.BatchNorm1d(1)
    loader = DataLoader(TensorDataset(whole), batch_size=50)
    bnprobe.recalibrate(model, loader, batch_size=2, num_batches=100, path="eval")
    assert int(model.num_batches_tracked) == 100
    assert 400 < float(model.running_mean) < 600


@pytest.mark.parametrize(("count", "large"), [(37, 4), (1249, 32), (9, 256), (8, 9)])
def test_no_physical_batch_is_left_with_an_image_or_two(
    count: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These would normalize with each other alone: with one image a layer of (N, C) gives its bias."""
    monkeypatch.setattr(population, "LARGE", large)
    sizes: list[int] = []  # of what normalized together
    run = Session.forward

    def forward(session: Session, path: PathName, batch: Any, pass_: Pass) -> Any:
        sizes.extend([pass_.batch_size] * (pass_.samples // pass_.batch_size))
        return run(session, path, batch, pass_)

    monkeypatch.setattr(Session, "forward", forward)
    model, whole = nn.BatchNorm1d(1).double(), torch.arange(float(count)).double().reshape(-1, 1)
    bnprobe.recalibrate(model, list(whole.split(3)))
    torch.testing.assert_close(model.running_mean, whole.mean(0))
    torch.testing.assert_close(model.running_var, whole.var(0))
    physical: list[int] = []
    while sum(physical) < count:  # what ran before is the self-check
        physical.append(sizes.pop())
    assert sum(physical) == count
    assert max(physical) - min(physical) <= 1
    assert large / 2 <= max(physical) <= large or max(physical) == count


def test_data_that_ends_early_is_enough() -> None:
    model, whole = nn.BatchNorm1d(6).double(), data(20, 6)
    with pytest.warns(UserWarning, match="The data ended after 3 of the 10 requested batches"):
        bnprobe.recalibrate(model, list(whole.split(8)), num_batches=10)
    torch.testing.assert_close(model.running_mean, whole.mean(0))


def test_a_loaded_model_gives_the_names_of_its_layers() -> None:
    source = as_batch_source(list(data(20, 3, 6, 6, dtype=torch.float32).split(4)), 4)
    seen: list[tuple[int, int]] = []
    found = recalibrate_loaded(Residual(), source, path="eval", progress=lambda done, of: seen.append((done, of)))
    assert found.layers == ("bn1", "bn2")
    assert seen[-1] == (5, 5)


def test_wrapped_models_and_subclasses() -> None:
    model, whole = unsettled(Residual().double()), data(20, 3, 6, 6)
    expected = by_batch(model, [whole])
    wrapped = nn.DataParallel(model)
    assert bnprobe.recalibrate(wrapped, [whole]) is wrapped
    assert_close(statistics(model), expected, 1e-10)


@pytest.mark.parametrize("path", ["train", "eval"])
def test_batches_of_no_image_are_left_out(path: Any) -> None:
    whole = data(20, 3, 6, 6)
    model = unsettled(Residual().double())
    twin = copy.deepcopy(model)
    empty = whole[:0]
    bnprobe.recalibrate(model, [empty, whole[:10], empty, whole[10:], empty], path=path, num_batches=2)
    bnprobe.recalibrate(twin, [whole[:10], whole[10:]], path=path)
    assert_close(statistics(model), statistics(twin), 1e-12)
    assert int(model.bn1.num_batches_tracked) == 2


def test_the_number_of_a_bad_batch_counts_the_empty_ones() -> None:
    with pytest.raises(DataError, match="Micro-batch 3 "):
        bnprobe.recalibrate(nn.BatchNorm1d(6), [torch.zeros(0, 6), torch.ones(2, 6), torch.full((2, 6), torch.nan)])


def test_two_values_per_channel_are_enough() -> None:
    model = nn.BatchNorm1d(3).double()
    bnprobe.recalibrate(model, [torch.zeros(1, 3).double(), torch.ones(1, 3).double()])
    torch.testing.assert_close(model.running_var, torch.full((3,), 0.5).double())


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = Flat()
    with pytest.raises(ModelError, match=r"body\.1\.running_mean is on the meta device, where tensors have no values"):
        bnprobe.recalibrate(model, [data(8, 6)])


# ---- undone if anything fails


def raising(batches: Sequence[Tensor], error: BaseException) -> Iterator[Tensor]:
    yield from batches
    raise error


def interrupting(model: nn.Module, batch: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGINT)
    return model(batch)


def failing(model: nn.Module, batch: Tensor) -> Tensor:
    model(batch)
    raise ValueError("no labels")


BATCHES = list(data(20, 6, dtype=torch.float32).split(5))
NOT_A_NUMBER = [*BATCHES[:3], torch.full((5, 6), torch.nan)]
ENORMOUS = [torch.full((5, 6), 3e38), *BATCHES]


@pytest.mark.parametrize("path", ["train", "eval"])
@pytest.mark.parametrize(
    ("batches", "forward", "error", "said"),
    [
        (lambda: raising(BATCHES, OSError("disk gone")), None, UserCodeError, "OSError while drawing batch 5"),
        (lambda: BATCHES, failing, UserCodeError, "ValueError while calling forward"),
        (lambda: BATCHES, interrupting, KeyboardInterrupt, "^$"),
        (lambda: NOT_A_NUMBER, None, DataError, "Micro-batch 4"),
        (lambda: ENORMOUS, None, NonFiniteError, r"new statistics of body\.1 are NaN or Inf"),
        (lambda: iter(()), None, DataError, "contains no non-empty batch"),
        (lambda: [BATCHES[0][:0]] * 2, None, DataError, "contains no non-empty batch"),
        (lambda: [BATCHES[0][:1]], None, RepairError, r"two values per channel, but body\.1 received only one"),
    ],
    ids=["loader", "model", "Ctrl-C", "NaN", "overflow", "empty", "no image", "one value"],
)
def test_whatever_fails_the_model_is_as_it_was(path: Any, batches: Any, forward: Any, error: Any, said: str) -> None:
    model = unsettled(Flat()).train()
    model.body[1].momentum = 0.01
    before = fingerprint(model)
    with pytest.raises(error, match=said):
        bnprobe.recalibrate(model, batches(), path=path, forward=forward)
    assert fingerprint(model) == before


def test_torch_loses_the_momentum_where_the_loader_raises() -> None:
    model = Flat()
    with pytest.raises(OSError, match="disk gone"):
        update_bn(raising(BATCHES, OSError("disk gone")), model)
    assert [norm.momentum for norm in norms(model)] == [None, None]


@pytest.mark.parametrize("averaged", [False, True])
def test_micro_batches_normalize_as_in_training(averaged: bool) -> None:
    """Two layers, so that the second one sees what the first one makes of each batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    batches = [torch.randn(size, 3).double() * scale + scale for size, scale in ((4, 1.0), (4, 3.0), (2, 0.5))]
    twin = copy.deepcopy(model)
    bnprobe.recalibrate(model, batches, path="micro-batch-averaged" if averaged else "micro-batch-pooled")
    with torch.no_grad():
        for norm, seen in ((0, batches), (2, [twin[1](twin[0].train()(batch)) for batch in batches])):
            everything = torch.cat(seen)
            torch.testing.assert_close(model[norm].running_mean, everything.mean(0))
            variance = everything.var(0)
            if averaged:
                variance = sum(len(batch) * batch.var(0, correction=0) for batch in seen) / len(everything)
            torch.testing.assert_close(model[norm].running_var, variance)


@pytest.mark.parametrize("path", ["micro-batch-pooled", "micro-batch-averaged"])
def test_micro_batches_of_one_value_per_channel_are_refused(path: Any) -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4)), list(torch.randn(5, 1, 3))
    before = fingerprint(model)
    with pytest.raises(RepairError, match=r"^0 gets a single value per channel in every batch"):
        bnprobe.recalibrate(model, batches, path=path)
    assert fingerprint(model) == before
