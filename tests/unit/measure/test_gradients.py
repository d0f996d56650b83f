"""The backward pass against plain float64 references: its noise, and the angle of the two gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnprobe.errors import NonFiniteError, UsageError
from bnprobe.measure.gradients import measure_gradients
from bnprobe.measure.session import UserFunctions
from bnprobe.records import Backward, GradientAngle
from support.fingerprint import fingerprint
from support.networks import Residual, Siamese, images, unsettled
from support.running import session_of

DATA = images(5, 6, 3, 5, 5)


def net(dimensions: int = 2) -> Any:
    """The same network each time."""
    torch.manual_seed(0)
    return unsettled(Residual(dimensions))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def weighted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Its gradient of the output is the batch's second tensor."""
    return (model(batch[0]) * batch[1]).sum()


def run(
    model: nn.Module, data: Any = DATA, function: Any = loss, **options: Any
) -> tuple[dict[int, Backward], GradientAngle | None]:
    session = session_of(model, UserFunctions(loss=function), options.pop("autocast", None))
    session.held = options.pop("held", session.held)
    return measure_gradients(session, data, **options)


def angle_of(*args: Any, **kwargs: Any) -> GradientAngle:
    angle = run(*args, **kwargs)[1]
    assert angle is not None
    return angle


def pairs(batches: int, size: int, channels: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    draw = torch.randn(2, batches, size, channels, generator=generator, dtype=torch.float64)
    return list(zip(draw[0] * 3 + 1, draw[1] * 1e-3, strict=True))


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("affine", [True, False])
def test_independent_gradients_have_the_noise_of_the_batch(size: int, affine: bool) -> None:
    norm = nn.BatchNorm1d(300, affine=affine).double()
    model = nn.Sequential(nn.Linear(300, 300).double(), norm) if not affine else norm
    if not affine:
        model[0].weight.data = torch.eye(300).double()
    found = run(model, pairs(40, size, 300), weighted)[0][0]
    assert found.noise == pytest.approx(2 / size, rel=0.05)
    assert found.equivalent_batch_size == pytest.approx(size, rel=0.05)
    assert found.interval is not None
    assert found.interval[1] is not None
    assert found.interval[0] < found.noise < found.interval[1]


def slow_noise(model: Residual, data: list[Tensor], name: str) -> float:
    """E[g] and E[g * xhat] from autograd in float64, and their variances."""
    model = model.double().train()
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in data:
        kept: dict[str, Tensor] = {}

        def keep(module: nn.Module, inputs: Any, output: Tensor, kept: dict[str, Tensor] = kept) -> None:
            output.retain_grad()
            kept["x"], kept["y"] = inputs[0], output

        handle = model.get_submodule(name).register_forward_hook(keep)
        loss(model, batch.double()).backward()
        handle.remove()
        x, g = kept["x"].detach(), kept["y"].grad
        axes = [0, *range(2, x.dim())]
        centred = x - x.mean(axes, keepdim=True)
        xhat = centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()
        rows.append((g.mean(axes), (g * xhat).mean(axes), g.square().mean(axes)))
    one, other, square = (torch.stack(column) for column in zip(*rows, strict=True))
    return float(((one.var(0) + other.var(0)) / square.mean(0)).mean())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_noise_equals_the_definition(dimensions: int) -> None:
    data = images(5, 6, 3, *[5] * dimensions)
    found = run(net(dimensions), data)[0]
    for index, name in enumerate(("bn1", "bn2")):
        assert found[index].noise == pytest.approx(slow_noise(net(dimensions), data, name), rel=1e-4)


class Block(nn.Module):
    """A block that may be recomputed in the backward pass; its ReLU writes into BN's output."""

    def __init__(self, mode: bool | None) -> None:
        super().__init__()
        self.mode = mode
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(x) if self.mode is None else checkpoint(self.block, x, use_reentrant=self.mode)
        return y.mean((2, 3))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    torch.manual_seed(3)
    plain = Block(None)
    recomputed = Block(use_reentrant)
    recomputed.load_state_dict(plain.state_dict())
    (expected, angle), (found, other) = run(plain), run(recomputed)
    assert found[0].noise == pytest.approx(expected[0].noise, rel=1e-4)
    assert angle is not None
    assert other is not None
    assert other.cosine == pytest.approx(angle.cosine, abs=1e-5)
    assert other.mean_cosine == pytest.approx(angle.mean_cosine, abs=1e-5)


class ByHand(nn.Module):
    """Residual, with constants in place of batch statistics where given."""

    def __init__(self, model: Residual, constants: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.inner, self.constants = model, constants

    def norm(self, name: str, x: Tensor) -> Tensor:
        layer = self.inner.get_submodule(name)
        mean, variance = self.constants.get(name, (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)))
        shape = (1, -1, 1, 1)
        z = (x - mean.view(shape)) / (variance.view(shape) + layer.eps).sqrt()
        return z * layer.weight.view(shape) + layer.bias.view(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm("bn1", self.inner.stem(x)).relu()
        x = (x + self.norm("bn2", self.inner.conv(x))).relu()
        return self.inner.head(x.flatten(2).mean(2))


def slow_angle(constants: Callable[[Residual], dict[str, tuple[Tensor, Tensor]]]) -> tuple[float, float]:
    model = net().double()
    sides: list[list[Tensor]] = []
    for variant in (ByHand(model, {}), ByHand(model, constants(model))):
        side = []
        for batch in DATA:
            gradients = torch.autograd.grad(loss(variant, batch.double()), list(model.parameters()))
            side.append(torch.cat([gradient.flatten() for gradient in gradients]))
        sides.append(side)
    cosines = [F.cosine_similarity(a, b, 0).item() for a, b in zip(*sides, strict=True)]
    means = [torch.stack(side).mean(0) for side in sides]
    return sum(cosines) / len(cosines), F.cosine_similarity(means[0], means[1], 0).item()


def test_the_angle_with_the_population_of_the_same_batches() -> None:
    def pooled(model: Residual) -> dict[str, tuple[Tensor, Tensor]]:
        stems = [model.stem(batch.double()) for batch in DATA]
        inner = [model.conv(ByHand(model, {}).norm("bn1", stem).relu()) for stem in stems]
        seen = {"bn1": torch.cat(stems).detach(), "bn2": torch.cat(inner).detach()}
        return {name: (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) for name, x in seen.items()}

    angle = angle_of(net(), iter(DATA))
    assert (angle.cosine, angle.mean_cosine) == pytest.approx(slow_angle(pooled), abs=1e-4)
    assert angle.batches == len(DATA)
    assert angle.cosine < 0.999  # what is compared does differ


def test_more_values_bring_the_gradients_together() -> None:
    small, large = (angle_of(net(), images(4, size, 3, 5, 5)) for size in (2, 64))
    assert small.cosine < large.cosine


class Dropped(nn.Module):
    """Dropout, and a layer that the user keeps frozen: both gradients are the same, if dropout draws the same."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.body[2].eval()
        return self


def test_dropout_draws_the_same_for_both_gradients() -> None:
    backward, angle = run(Dropped(), images(3, 4, 6))
    assert backward == {}
    assert angle is not None
    assert angle.cosine == pytest.approx(1.0, abs=1e-9)


def test_frozen_by_the_caller() -> None:
    model = net()
    model.eval()
    assert set(run(model, held=[model.bn1])[0]) == {1}


def test_layers_called_twice_without_statistics_and_sparse_gradients() -> None:
    assert set(run(Siamese(together=False), images(4, 6, 2, 3, 6, 6))[0]) == {0, 1}
    assert set(run(Residual(track_running_stats=False))[0]) == {0, 1}
    assert set(run(Residual(track_running_stats=False, affine=False))[0]) == {0, 1}
    model = nn.Sequential(nn.Embedding(20, 6, sparse=True), nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 1))
    data = list(torch.randint(0, 20, (4, 8, 2)))
    assert angle_of(model, data).batches == 4


def test_frozen_parameters_are_left_out() -> None:
    assert run(Residual().requires_grad_(False)) == ({}, None)
    model = net()
    for part in (model.stem, model.bn1, model.conv):
        part.requires_grad_(False)
    backward, angle = run(model)
    assert set(backward) == {1}  # through the first no gradient passes
    assert angle is not None


def test_one_micro_batch_has_an_angle_but_no_noise() -> None:
    backward, angle = run(net(), DATA[:1])
    assert backward == {}
    assert angle is not None
    assert angle.cosine == pytest.approx(angle.mean_cosine)
    assert run(net(), []) == ({}, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    full, angle = run(net())
    half, other = run(net(), autocast=str(dtype).removeprefix("torch."))
    assert half[1].noise == pytest.approx(full[1].noise, rel=0.1)
    assert angle is not None
    assert other is not None
    assert other.mean_cosine == pytest.approx(angle.mean_cosine, abs=0.05)


def test_model_data_and_random_state_come_back() -> None:
    model = net()
    model.eval()
    model.bn2.train()
    data = [batch.clone() for batch in DATA]
    before = fingerprint(model)
    with torch.no_grad():
        run(model, data)
    with pytest.raises(NonFiniteError):
        run(model, data, lambda model, batch: loss(model, batch) * float("inf"))
    assert fingerprint(model) == before
    assert all(torch.equal(one, other) for one, other in zip(data, DATA, strict=True))


def test_a_gradient_that_is_not_finite_names_the_layer() -> None:
    def rooted(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) * 0).sqrt().sum()

    with pytest.raises(NonFiniteError, match=r"output of bn2 holds NaN or Inf in micro-batch 1 \(the first is 1\)"):
        run(net(), function=rooted)


@pytest.mark.cuda
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_cuda_equals_cpu(use_reentrant: bool | None) -> None:
    (here, angle), (there, other) = (
        measure_gradients(session_of(Block(use_reentrant), UserFunctions(loss=loss), device=device), DATA)
        for device in ("cpu", "cuda")
    )
    assert there[0].noise == pytest.approx(here[0].noise, rel=1e-2)
    assert angle is not None
    assert other is not None
    assert other.cosine == pytest.approx(angle.cosine, abs=1e-2)


def test_no_loss() -> None:
    with pytest.raises(UsageError, match=r"--gradients needs a loss"):
        run(Residual(), function=None)
