"""The line where the user's code builds a module."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from torch import nn

from bnprobe.config.spec import ModelSpec, Spec
from bnprobe.loading.model import load_model
from bnprobe.loading.places import built_at, recorded_places
from bnprobe.measure.origins import by_name, origin

SOURCE = """\
from torch import nn
from torch.nn import functional as F


class AlwaysBatch(nn.BatchNorm1d):
    def __init__(self, channels):
        super().__init__(
            channels)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=True)


def block():
    return nn.Sequential(nn.ReLU(), AlwaysBatch(2))  # in a function


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first = norm(2)
        self.second = norm(2)
        self.third = block()
        layers = []
        for _ in range(2):
            layers.append(nn.ReLU())
            layers.append(nn.BatchNorm1d(2))  # in a loop
        self.rest = nn.Sequential(*layers)


def untracked(channels):
    return nn.BatchNorm1d(channels, track_running_stats=False)


def load_model():
    net = Net(untracked)
    net.second = AlwaysBatch(2)  # put in later
    return net
"""

LINES = SOURCE.splitlines()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("first", "    return nn.BatchNorm1d(channels, track_running_stats=False)"),
        ("second", "    net.second = AlwaysBatch(2)  # put in later"),
        ("third.1", "    return nn.Sequential(nn.ReLU(), AlwaysBatch(2))  # in a function"),
        ("rest.1", "            layers.append(nn.BatchNorm1d(2))  # in a loop"),
        ("rest.3", "            layers.append(nn.BatchNorm1d(2))  # in a loop"),
    ],
)
def test_the_line_is_the_one_that_builds_the_layer(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(SOURCE)
    model = load_model(Spec(model=ModelSpec(target="net.py"))).model
    assert origin(by_name(model), name) == f"net.py:{LINES.index(text) + 1}"
    # Of a copy nothing was recorded.
    assert built_at(copy.deepcopy(model).get_submodule(name)) is None


def test_nothing_is_recorded_outside_and_torch_is_as_it_was() -> None:
    original = nn.Module.__init__
    with recorded_places():
        within = nn.ReLU()
    assert nn.Module.__init__ is original
    place = built_at(within)
    assert place is not None
    assert place[0].name == "test_places.py"
    assert built_at(nn.ReLU()) is None
