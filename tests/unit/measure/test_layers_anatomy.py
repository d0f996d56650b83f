"""What a layer is set to and holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bnprobe.errors import UserCodeError
from bnprobe.measure.layers import anatomy, find_layers
from bnprobe.rules.facts import Anatomy
from support.fingerprint import fingerprint


def anatomies(model: nn.Module) -> dict[str, Anatomy]:
    found = anatomy(find_layers(model, lambda *names: True), model)
    return {layer.name: layer for layer in found}


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_new_layer() -> None:
    found = anatomies(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0.5, momentum=0.2)))["1"]
    assert found == Anatomy(
        name="1",
        location=None,
        kind="BatchNorm1d",
        channels=4,
        eps=0.5,
        momentum=0.2,
        batches_tracked=0,
        has_running_statistics=True,
        trains_statistics=True,
        trains_affine=True,
        affine_moved=False,
        untouched=True,
        non_finite=0,
        negative=0,
        dead=0,
        median_variance=1.0,
    )


def test_what_the_buffers_hold_is_counted() -> None:
    layer = nn.BatchNorm1d(6, eps=0.01)
    layer.running_mean.copy_(torch.tensor([0.0, torch.nan, 0, 0, 0, 0]))
    layer.running_var.copy_(torch.tensor([1.0, torch.inf, -2.0, 0.0, 0.009, 0.01]))
    found = anatomies(nn.Sequential(layer))["0"]
    assert (found.untouched, found.non_finite, found.negative, found.dead) == (False, 2, 1, 2)
    assert found.median_variance is None


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.BatchNorm1d(2), (True, True, True)),
        (nn.BatchNorm1d(2, affine=False), (True, True, None)),
        (nn.BatchNorm1d(2, track_running_stats=False), (False, False, True)),
        (nn.BatchNorm1d(2).requires_grad_(False), (True, True, False)),
    ],
)
def test_what_is_trained(layer: nn.Module, expected: tuple[bool, bool, bool | None]) -> None:
    found = anatomies(nn.Sequential(layer))["0"]
    assert (found.has_running_statistics, found.trains_statistics, found.trains_affine) == expected


class Frozen(nn.Module):
    """Keeps one layer in eval mode whenever it is trained, and freezes its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.BatchNorm1d(2)
        self.free = nn.BatchNorm1d(2)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.kept.eval().requires_grad_(False)
        return self


def test_flags_are_those_of_training_whatever_they_are_now() -> None:
    model = Frozen().eval()
    model.kept.requires_grad_(True)
    before = fingerprint(model)
    found = anatomies(model)
    assert fingerprint(model) == before
    assert (found["kept"].trains_statistics, found["kept"].trains_affine) == (False, False)
    assert (found["free"].trains_statistics, found["free"].trains_affine) == (True, True)


def test_what_the_user_froze_beside_a_root_in_train_mode_stays_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).train()
    model[1].eval()
    found = anatomies(model)
    assert [layer.trains_statistics for layer in found.values()] == [True, False]
    assert [layer.training for layer in model] == [True, False]


class Broken(nn.Sequential):
    def train(self, mode: bool = True) -> nn.Module:
        self[0].training = mode
        raise RuntimeError("no training here")


def test_flags_come_back_when_train_raises() -> None:
    model = Broken(nn.BatchNorm1d(2))
    model[0].training = False
    model.training = False
    with pytest.raises(UserCodeError, match="no training here"):
        anatomies(model)
    assert [module.training for module in model.modules()] == [False, False]


def test_random_layers_count_where_they_are_active_and_defined_before() -> None:
    shared = nn.Dropout(0.5)
    model = nn.Sequential(
        nn.BatchNorm2d(2),
        nn.Sequential(nn.Dropout2d(0.1), nn.Dropout(0.0), DropPath(0.2), DropPath(0.0)),
        nn.BatchNorm2d(2),
        shared,
        shared,
        nn.AlphaDropout(0.3),
        nn.BatchNorm2d(2),
    )
    found = anatomies(model)
    assert [layer.dropouts_before for layer in found.values()] == [
        (),
        ("1.0", "1.2"),
        ("1.0", "1.2", "3", "5"),
    ]


def test_a_layer_that_is_the_model() -> None:
    found = anatomies(nn.BatchNorm1d(3))
    assert found["(root)"].location is None
