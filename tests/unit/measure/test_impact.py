"""What swapping one layer's statistics changes: estimate, exact figure and a plain copy of the model agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnprobe.measure import impact as impact_module
from bnprobe.measure.batch import join, tensors_of
from bnprobe.measure.forward_pass import Pass
from bnprobe.measure.impact import Impacts
from bnprobe.measure.physical_batch import Batching
from bnprobe.measure.session import UserFunctions
from support.fingerprint import fingerprint
from support.networks import (
    Dense,
    Flat,
    Gan,
    InvertedBottleneck,
    MinibatchStd,
    Residual,
    Siamese,
    UNet,
    Video,
    images,
    unsettled,
)
from support.running import REAL, first_input, moderately_off, running, twin_of


def gan_batches(count: int, size: int) -> list[dict[str, Tensor]]:
    pairs = zip(images(count, size, 3, 3, 3), images(count, size, 5, seed=3), strict=True)
    return [{"real": real, "noise": noise} for real, noise in pairs]


Forward = Callable[[nn.Module, Any], Any]

SHAPES: dict[str, tuple[Callable[[], nn.Module], list[Any], Forward | None]] = {
    "flat": (Flat, images(8, 8, 6), None),
    "1d": (lambda: Residual(1), images(8, 8, 3, 12), None),
    "residual": (Residual, images(8, 8, 3, 6, 6), None),
    "3d": (lambda: Residual(3), images(8, 8, 3, 4, 4, 4), None),
    "dense": (Dense, images(8, 8, 3, 6, 6), None),
    "inverted bottleneck": (InvertedBottleneck, images(8, 8, 3, 6, 6), None),
    "u-net": (UNet, images(8, 8, 3, 8, 8), None),
    "video, clip by clip": (lambda: Video(False), images(8, 8, 5, 3, 4, 4), None),
    "video, frame by frame": (lambda: Video(True), images(8, 8, 5, 3, 4, 4), None),
    "siamese, two calls": (lambda: Siamese(False), images(8, 8, 2, 3, 6, 6), None),
    "siamese, one batch": (lambda: Siamese(True), images(8, 8, 2, 3, 6, 6), None),
    "gan": (Gan, gan_batches(8, 8), Gan.step),
    "mixes images": (MinibatchStd, images(8, 8, 3, 6, 6), None),
}


def by_hand(model: nn.Module, batches: Sequence[Any], forward: Forward | None, *layers: int) -> float:
    """Real micro-batches, a plain copy whose layers are in train mode."""
    plain, swapped = twin_of(model), twin_of(model, *layers)
    change = norm = 0.0
    with torch.no_grad():
        for batch in batches:
            pair = [tensors_of((forward or first_input)(twin, batch)) for twin in (plain, swapped)]
            for one, other in zip(*pair, strict=True):
                change += float((one - other).double().square().sum())
                norm += float(one.double().square().sum())
    return (change / norm) ** 0.5


@pytest.mark.parametrize("name", SHAPES)
def test_the_exact_figure_is_that_of_a_copy_with_one_layer_in_train_mode(name: str) -> None:
    make, batches, forward = SHAPES[name]
    model = unsettled(make())
    with running(model, batches, 8, UserFunctions(forward)) as (session, emulation):
        assert emulation.trusted == (name != "mixes images")
        found = Impacts(session, batches, Batching(8, emulation, 3)).of_each()
        together = Impacts(session, batches, Batching(8, emulation, 3)).together(frozenset(found))
    for index, impact in found.items():
        assert impact.exact == pytest.approx(by_hand(model, batches, forward, index), rel=1e-4)
    assert together == pytest.approx(by_hand(model, batches, forward, *found), rel=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_agrees_with_the_exact_figure(name: str) -> None:
    make, batches, forward = SHAPES[name]
    # Batches of 8 values, as of a norm behind global pooling, are no moderate mismatch: r is 1 give or take a quarter.
    batches = [join(list(pair)) for pair in zip(batches[::2], batches[1::2], strict=True)]
    model = moderately_off(unsettled(make()), batches, forward)
    with running(model, batches, 16, UserFunctions(forward)) as (session, emulation):
        found = Impacts(session, batches, Batching(16, emulation, 2)).of_each()
    assert len(found) > 1
    for impact in found.values():
        assert impact.exact is not None
        assert impact.exact > 0.01
        assert impact.estimate == pytest.approx(impact.exact, rel=0.25)


class Linear(nn.Module):
    """Nothing bends: to first order is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


def test_without_nonlinearities_only_the_random_vectors_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = unsettled(Linear()), images(8, 8, 3, 6, 6)
    monkeypatch.setattr(impact_module, "_PRODUCTS", 64 * 5)
    with running(model, batches, 8) as (session, emulation):
        found = Impacts(session, batches, Batching(8, emulation, 8)).of_each()
        for impact in found.values():  # as many vectors as outputs: the whole of the output
            assert impact.estimate == pytest.approx(impact.exact, rel=1e-4)
        monkeypatch.setattr(impact_module, "_PRODUCTS", 8 * 400)
        monkeypatch.setattr(impact_module, "_MOST_DRAWS", 400)
        apart = Impacts(session, batches, Batching(8, REAL, 8)).of_each()
    for impact in apart.values():
        assert impact.estimate == pytest.approx(impact.exact, rel=0.05)


@pytest.mark.parametrize("size", [(), (7,), (7, 1), (7, 3), (7, 2, 5)])
def test_random_vectors_have_the_identity_as_covariance(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    stream = impact_module._directions(torch.zeros(size, dtype=torch.float64), 4, generator)
    drawn = torch.stack([next(stream).flatten() for _ in range(8000)])
    torch.testing.assert_close(drawn.T @ drawn / 8000, torch.eye(drawn.shape[1]).double(), rtol=0, atol=0.06)


@pytest.mark.parametrize("emulate", [True, False])
def test_the_loss_of_real_micro_batches(emulate: bool) -> None:
    """A loss that asks the model for something else gets the swapped layer too."""
    model = unsettled(Flat())
    labels = torch.randint(0, 3, (8, 8), generator=torch.Generator().manual_seed(1))
    batches = list(zip(images(8, 8, 6), labels, strict=True))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]).exp() + model(batch[0] + 1).std()

    def mean(*layers: int) -> float:
        twin = twin_of(model, *layers)
        with torch.no_grad():
            return sum(float(loss(twin, batch)) for batch in batches) / len(batches)

    with running(model, batches, 8, UserFunctions(loss=loss)) as (session, emulation):
        found = Impacts(session, batches, Batching(8, emulation if emulate else REAL, 4)).of_each()
    for index, impact in found.items():
        assert impact.loss == pytest.approx(mean(index) - mean(), rel=1e-4)
        assert abs(impact.loss) > 1e-3


def test_only_the_worst_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impact_module, "WORST", 2)
    model, batches = unsettled(Dense()), images(8, 8, 3, 6, 6)
    with running(model, batches, 8) as (session, emulation):
        found = Impacts(session, batches, Batching(8, emulation, 4)).of_each()
    estimates = sorted((impact.estimate for impact in found.values()), reverse=True)
    assert [impact.exact is not None for impact in found.values()] == [
        impact.estimate >= estimates[1] for impact in found.values()
    ]
    assert all(impact.loss is None for impact in found.values())


class Ending(nn.Module):
    """Two layers, the first followed by an in-place activation, and a last step."""

    def __init__(self, last: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
        self.last = last

    def forward(self, x: Tensor) -> Any:
        return self.last(self.body(x).mean((2, 3)))


@torch.no_grad()
def _without_gradient(x: Tensor) -> Tensor:
    return x * 2


def _in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x * 2


UNREACHABLE: dict[str, Callable[[Tensor], Any]] = {
    "arg-max": lambda x: x.argmax(1).double(),
    "detached": lambda x: x.detach(),
    "no_grad": _without_gradient,
    "inference mode": _in_inference_mode,
    "numpy": lambda x: torch.from_numpy(x.numpy() * 2),
}


@pytest.mark.parametrize("name", UNREACHABLE)
def test_where_no_gradient_reaches_the_worst_mismatch_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impact_module, "WORST", 1)
    model, batches = unsettled(Ending(UNREACHABLE[name])), images(8, 8, 3, 6, 6)
    model.body[3].running_mean += 3
    with running(model, batches, 8) as (session, emulation):
        found = Impacts(session, batches, Batching(8, emulation, 4)).of_each()
    assert [impact.estimate for impact in found.values()] == [None, None]
    assert found[0].exact is None
    assert found[1].exact == pytest.approx(by_hand(model, batches, None, 1), rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_costs_the_estimate_at_worst(reentrant: bool) -> None:
    class Checkpointed(Ending):
        def forward(self, x: Tensor) -> Any:
            y = checkpoint(self.body, x, use_reentrant=reentrant)
            return y.mean((2, 3))

    model, batches = moderately_off(unsettled(Ending(lambda x: x)), images(8, 8, 3, 6, 6)), images(8, 8, 3, 6, 6)
    saving = Checkpointed(lambda x: x)
    saving.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: no input requires grad
        with running(saving, batches, 8) as (session, emulation):
            found = Impacts(session, batches, Batching(8, emulation, 4)).of_each()
    for index, impact in found.items():
        assert impact.exact == pytest.approx(by_hand(model, batches, None, index), rel=1e-4)
        assert impact.estimate is None or impact.estimate == pytest.approx(impact.exact, rel=0.25)


def test_a_nest_of_outputs_of_every_kind() -> None:
    def nest(x: Tensor) -> Any:
        return {"scores": x, "more": [x[:, :2] * 3, (x.argmax(1), None)]}

    plain, batches = moderately_off(unsettled(Ending(lambda x: x)), images(8, 8, 3, 6, 6)), images(8, 8, 3, 6, 6)
    nested = Ending(nest)
    nested.load_state_dict(plain.state_dict())
    for model in (plain, nested):
        with running(model, batches, 8) as (session, emulation):
            found = Impacts(session, batches, Batching(8, emulation, 4)).of_each()
        assert [impact.estimate for impact in found.values()] == [
            pytest.approx(impact.exact, rel=0.25) for impact in found.values()
        ]


def test_one_number_for_the_whole_batch() -> None:
    """Images do not have outputs of their own: their changes add up before they are squared."""
    model, batches = unsettled(Linear()), images(8, 8, 3, 6, 6)
    with running(model, batches, 8, UserFunctions(lambda model, batch: model(batch).mean())) as (session, _):
        found = Impacts(session, batches, Batching(8, REAL, 1)).of_each()
        together = Impacts(session, batches, Batching(8, replace(REAL, trusted=True), 8)).of_each()
    for impact in found.values():
        assert impact.estimate == pytest.approx(impact.exact, rel=0.25)
    for impact in together.values():
        assert impact.estimate == pytest.approx(impact.exact, rel=0.5)  # one number, few random vectors


class Aware(nn.Module):
    """A layer without running statistics between two with: images reach each other on the eval path."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


def test_a_layer_without_running_statistics_is_differentiated_through() -> None:
    batches = images(16, 4, 3, 6, 6)
    model = unsettled(Aware())
    for norm in (model.body[1], model.body[5]):
        norm.running_mean.fill_(0.1)
        norm.running_var.copy_(torch.linspace(0.3, 0.6, 4))
    with running(model, batches, 4) as (session, emulation):
        assert emulation.trusted
        found = Impacts(session, batches, Batching(4, emulation, 4), coupled=True).of_each()
    assert found.keys() == {0, 2}
    for index, impact in found.items():
        assert impact.exact == pytest.approx(by_hand(model, batches, None, index), rel=1e-4)
        assert impact.estimate == pytest.approx(impact.exact, rel=0.25)


def test_autocast() -> None:
    batches = images(8, 8, 3, 6, 6)
    model = moderately_off(unsettled(Residual()), batches)
    with running(model, batches, 8, autocast="bfloat16") as (session, emulation):
        half = Impacts(session, batches, Batching(8, emulation, 4)).of_each()
    for index, impact in half.items():
        assert impact.exact == pytest.approx(by_hand(model, batches, None, index), rel=0.1)
        assert impact.estimate == pytest.approx(impact.exact, rel=0.25)


@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_is_left_behind(frozen: bool) -> None:
    model, batches = unsettled(Ending(lambda x: x)).requires_grad_(not frozen).eval(), images(8, 8, 3, 6, 6)
    model.body[0].weight.grad = torch.ones_like(model.body[0].weight)
    with running(model, batches, 8) as (session, emulation):
        session.forward("eval", batches[0], Pass(8, 8))
        before = fingerprint(model)
        assert not torch.is_grad_enabled()
        found = Impacts(session, batches, Batching(8, emulation, 4)).of_each()
        Impacts(session, batches, Batching(8, emulation, 4)).together(frozenset({0}))
        assert fingerprint(model) == before
    assert found[0].estimate is not None


def test_few_images_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impact_module, "WORST", 1)
    seen: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> Any:
        seen.append(batch.shape[0])
        return model(batch)

    model, batches = unsettled(Flat()), images(40, 8, 6)
    with running(model, batches, 8, UserFunctions(forward)) as (session, emulation):
        seen.clear()
        impacts = Impacts(session, batches, Batching(8, emulation, 4))
        impacts.of_each()
        # With a graph, and with one swap: 64 images each.
        assert sum(seen) == 2 * 64
        seen.clear()
        impacts.together(frozenset({0, 1}))
        assert sum(seen) == 64
        seen.clear()
        monkeypatch.setattr(impact_module, "SAMPLES", 8)
        Impacts(session, batches, Batching(8, emulation, 4)).together(frozenset({0}))
        assert sum(seen) == 2 * 16


@pytest.mark.parametrize(("passes", "backward", "measured"), [(1, 2, 1), (4, 2, 1), (5, 3, 1), (6, 4, 1), (8, 4, 3)])
def test_the_passes_are_those_that_were_allowed(
    passes: int, backward: int, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 images, four backward passes are enough; at least two of them, and the worst layer, are measured."""
    gradients: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: gradients.append(1) or grad(*args, **kwargs))
    model, batches = unsettled(Dense()), images(8, 8, 3, 6, 6)
    with running(model, batches, 8) as (session, emulation):
        found = Impacts(session, batches, Batching(8, emulation, 16)).of_each(passes)
    assert len(gradients) == backward
    assert sum(impact.exact is not None for impact in found.values()) == measured


def test_no_memory_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a full GPU would fail; there is no other way to fill one here."""
    monkeypatch.setattr(impact_module, "WORST", 1)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, batches = unsettled(Flat()), images(8, 8, 6)
    monkeypatch.setattr(torch.autograd, "grad", full)
    with running(model, batches, 8) as (session, emulation):
        found = Impacts(session, batches, Batching(8, emulation, 4)).of_each()
    assert [impact.estimate for impact in found.values()] == [None, None]
    assert sum(impact.exact is not None for impact in found.values()) == 1


def test_an_output_that_overflows_has_no_impact() -> None:
    model, batches = unsettled(Ending(lambda x: x / 0)), images(8, 8, 3, 6, 6)
    with running(model, batches, 8) as (session, emulation):
        found = Impacts(session, batches, Batching(8, emulation, 4)).of_each()
        assert Impacts(session, batches, Batching(8, emulation, 4)).together(frozenset({0})) is None
    assert {(impact.estimate, impact.exact) for impact in found.values()} == {(None, None)}


def test_no_images() -> None:
    with running(unsettled(Flat()), images(2, 8, 6), 8) as (session, emulation):
        assert Impacts(session, [], Batching(8, emulation, 4)).of_each() == {}
        assert Impacts(session, [], Batching(8, emulation, 4)).together(frozenset({0})) is None


def test_no_output_to_compare() -> None:
    model, batches = unsettled(Ending(lambda x: None)), images(8, 8, 3, 6, 6)
    with running(model, batches, 8) as (session, emulation):
        found = Impacts(session, batches, Batching(8, emulation, 4)).of_each()
        assert Impacts(session, batches, Batching(8, emulation, 4)).together(frozenset({0})) is None
    assert {(impact.estimate, impact.exact) for impact in found.values()} == {(None, None)}
