"""The plugin for pytest, run by pytest itself on the tests of a user."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from functional.command import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytest_plugins = ["pytester"]

MODEL = """
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.bn(x).relu().mean((2, 3))


def data(shift):
    images = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + shift
    return DataLoader(TensorDataset(images), batch_size=4, shuffle=True)


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def loader():
    return data(0.0)


@pytest.fixture
def shifted():
    return data(3.0)
"""


TESTS = """
import copy

import pytest
import torch
from bnprobe.pytest_plugin import assert_bn_healthy as check
from torch import nn


def test_function_healthy(model, loader):
    report = check(model, loader, num_batches=8)
    assert report.scan.batches == 8


def test_function_shifted(model, shifted, assert_bn_healthy):
    assert_bn_healthy(model, shifted, 2)


def test_function_untouched(model, loader, assert_bn_healthy):
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert_bn_healthy(model.train(), loader)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_function_without_a_layer(loader, assert_bn_healthy):
    assert_bn_healthy(nn.Sequential(nn.Flatten(), nn.Linear(128, 2)), loader)


@pytest.mark.bn_healthy
def test_marker_healthy(model):
    assert model.bn.num_features == 2


@pytest.mark.bn_healthy(loader="shifted", num_batches=8)
def test_marker_shifted():
    pass


@pytest.mark.bn_healthy(loader="shifted")
def test_marker_of_a_test_that_fails():
    assert False, "its own reason"


@pytest.mark.bn_healthy
class TestMarkerOfAClass:
    def test_one(self):
        pass


@pytest.mark.bn_healthy(loader="missing")
def test_marker_without_data():
    pass
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with a model and its fixtures, and the plugin found as it is where bnprobe is installed."""
    entry_points = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    info = pytester.mkdir("installed-1.0.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1.0\n")
    rows = "".join(f"{name} = {place}\n" for name, place in entry_points.items())
    (info / "entry_points.txt").write_text(f"[pytest11]\n{rows}")
    monkeypatch.syspath_prepend(pytester.path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(pytester.path), os.environ.get("PYTHONPATH")])))
    for name in ("CI", "BUILD_NUMBER"):  # there pytest prints the messages whole a second time, in its summary
        monkeypatch.delenv(name, raising=False)
    pytester.makeconftest(MODEL)
    pytester.makeini("[pytest]\naddopts = -rA -p no:cacheprovider --strict-markers\n")
    return pytester


def test_what_passes_and_what_fails_and_why(run: pytest.Pytester) -> None:
    """In a process of its own: what a run of pytester imports is forgotten, and torch cannot be imported twice."""
    run.makepyfile(TESTS)
    result = run.runpytest_subprocess(timeout=120)
    file = "test_what_passes_and_what_fails_and_why.py::"
    lines = [line.split(" - ")[0].replace(file, "") for line in result.outlines]
    words = (line.partition(" ") for line in lines)
    outcomes = {name: word for word, _, name in words if word in ("PASSED", "FAILED", "ERROR")}
    assert outcomes == {
        "test_function_healthy": "PASSED",
        "test_function_shifted": "FAILED",
        "test_function_untouched": "PASSED",
        "test_function_without_a_layer": "FAILED",
        "test_marker_healthy": "PASSED",
        "test_marker_shifted": "FAILED",
        "test_marker_of_a_test_that_fails": "FAILED",
        "TestMarkerOfAClass::test_one": "PASSED",
        "test_marker_without_data": "ERROR",
    }
    said = result.stdout.str()
    never = "running statistics never updated"
    flagged = f"Net: 1 of 1 layer flagged, 1 error: {never}.\n  BN102: {never}, bn: All running means are 0 and all"
    assert said.count(flagged) == 2
    assert "its own reason" in said
    assert "NothingToProbeError" in said
    assert "fixture 'missing' not found" in said


def test_what_is_wrong_with_a_marker_is_a_sentence(run: pytest.Pytester) -> None:
    run.makepyfile(
        """
        import pytest

        @pytest.mark.bn_healthy(batch_sise=2)
        def test_unknown(): pass

        @pytest.mark.bn_healthy(device="cdua")
        def test_device(): pass
        """
    )
    said = run.runpytest_subprocess(timeout=120).stdout.str()
    assert "bn_healthy: " in said
    assert "batch_sise" in said
    assert "The device 'cdua' cannot be used" in said
    assert "Traceback" not in said
    assert "pytest_plugin.py" not in said
    run.makepyfile("import pytest\n@pytest.mark.bn_healthy(model=3)\ndef test_it(): pass")
    refused = run.runpytest_subprocess(timeout=120)
    assert "bn_healthy takes names of fixtures, but got 3" in refused.stderr.str()


def test_the_marker_is_listed_and_the_plugin_imports_nothing_slow(run: pytest.Pytester) -> None:
    run.runpytest_inprocess("--markers").stdout.fnmatch_lines(["@pytest.mark.bn_healthy(model=*"])
    slow = "{'torch', 'numpy', 'rich', 'pydantic'}"
    code = f"import sys, bnprobe.pytest_plugin; sys.exit(bool({slow} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
