"""The optimizer that the spec names: found, made, or refused with the key to mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnprobe.config.spec import OptimizerSpec
from bnprobe.errors import ModelError, UsageError, UserCodeError
from bnprobe.loading.model import UserModule, resolve
from bnprobe.loading.optimizer import load_optimizer

SOURCE = """
import torch

class Mine(torch.optim.SGD):
    def __init__(self, params, speed):
        super().__init__(params, lr=speed)

def make_optimizer(params, lr=0.5):
    if lr < 0:
        raise ValueError("lr below 0")
    return torch.optim.AdamW(params, lr=lr)

def make_nothing(params):
    return None

constant = 3
"""


@pytest.fixture
def near(tmp_path: Path) -> UserModule:
    (tmp_path / "model.py").write_text(SOURCE)
    return resolve(str(tmp_path / "model.py"))[0]


def spec(target: str, **args: Any) -> OptimizerSpec:
    return OptimizerSpec(target=target, args=args)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize("target", ["AdamW", "torch.optim.AdamW"])
def test_a_class_of_torch(target: str) -> None:
    factory = load_optimizer(spec(target, lr=0.3, betas=[0.5, 0.9]))
    made = factory(parameters())
    assert type(made) is torch.optim.AdamW
    assert made.defaults["lr"] == 0.3
    assert factory.name == "torch.optim.AdamW"


def test_the_default_is_sgd() -> None:
    assert type(load_optimizer(OptimizerSpec())(parameters())) is torch.optim.SGD


def test_a_matrix_optimizer_is_no_mistake() -> None:
    made = load_optimizer(spec("Muon", lr=0.1))([nn.Parameter(torch.zeros(2, 2))])
    assert type(made).__name__ == "Muon"


def test_the_users_own(near: UserModule, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    mine = load_optimizer(spec(f"{path}:Mine", speed=2.0), near)(parameters())
    assert (type(mine).__name__, mine.defaults["lr"]) == ("Mine", 2.0)
    assert load_optimizer(spec("make_optimizer", lr=0.25), near)(parameters()).defaults["lr"] == 0.25
    assert load_optimizer(spec(f"{path}:make_optimizer"))(parameters()).defaults["lr"] == 0.5


def test_a_class_of_a_package() -> None:
    assert type(load_optimizer(spec("torch.optim.adam:Adam"))(parameters())) is torch.optim.Adam


@pytest.mark.parametrize("target", ["sdg", "torch.optim.SDG", "Optimizer"])
def test_an_unknown_name_gives_the_nearest(target: str) -> None:
    with pytest.raises(UsageError, match=r"train\.optimizer\.target: there is no optimizer") as caught:
        load_optimizer(spec(target))
    assert target == "Optimizer" or "nearest name in torch.optim is SGD." in str(caught.value)


def test_an_unknown_name_beside_a_model_file(near: UserModule) -> None:
    with pytest.raises(UsageError, match=r'"make_optimiser" in torch\.optim or .*model\.py'):
        load_optimizer(spec("make_optimiser"), near)


def test_a_symbol_that_is_not_there(near: UserModule) -> None:
    with pytest.raises(ModelError, match=r'Did you mean "make_optimizer"'):
        load_optimizer(spec(f"{near.name}:make_optimiser"), near)


def test_a_file_without_a_symbol(near: UserModule) -> None:
    with pytest.raises(UsageError, match=r"name a class or function of .*:make_optimizer"):
        load_optimizer(spec(near.name), near)


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        (
            "SGD",
            {"learning_rate": 0.1},
            r"torch\.optim\.SGD\(params, lr, .*unexpected keyword argument 'learning_rate'",
        ),
        ("SGD", {"lr": -1.0}, r"torch\.optim\.SGD rejects these arguments: Invalid learning rate: -1\.0"),
        ("SGD", {"lr": "1e-3"}, r"YAML reads lr: 1e-3 as text, not as a number; write 0\.001\.$"),
        ("SGD", {"lr": "1e-7"}, r"write 1\.0e-07\.$"),
        ("SGD", {"lr": "fast"}, r"torch\.optim\.SGD rejects these arguments: .*'str'.*\.$"),
        ("LBFGS", {}, r"needs a closure"),
    ],
)
def test_arguments_that_torch_refuses(target: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_optimizer(spec(target, **args))
    assert str(caught.value).startswith("train.optimizer.")


def test_arguments_of_the_users_class(near: UserModule) -> None:
    with pytest.raises(UsageError, match=r"train\.optimizer\.args: .*Mine\(params, speed\) .*'speed'"):
        load_optimizer(spec("Mine"), near)
    with pytest.raises(UserCodeError, match=r"lr below 0"):
        load_optimizer(spec("make_optimizer", lr=-1.0), near)(parameters())


def test_what_makes_no_optimizer(near: UserModule) -> None:
    with pytest.raises(UsageError, match=r"make_nothing returned None, not an optimizer"):
        load_optimizer(spec("make_nothing"), near)(parameters())
    with pytest.raises(UsageError, match=r"constant of .* is an int, not a class or function"):
        load_optimizer(spec("constant"), near)
