"""The command that a scan prints last runs as it is printed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from functional.command import CLEAN, FINDINGS, MODEL, SHIFTED, Workspace

LOSS = "\n\ndef loss(model, batch):\n    return model(batch[0]).square().mean()\n"
HELD_OUT = """

def load_eval_data(batch_size):
    return DataLoader(TensorDataset(images() + 1), batch_size=batch_size)
"""
SORTED = """

def load_data(batch_size):
    rising = images() + torch.linspace(-2, 2, IMAGES)[:, None, None, None]
    return DataLoader(TensorDataset(rising), batch_size=batch_size)
"""
MIXED = MODEL.replace("self.head(self.bn(x)", "self.head(self.bn(x + 0.1 * x.flip(0))")
"""Every sample gets a part of another one: micro-batches cannot run together."""

CASES = {
    "clean": (MODEL, 2),
    "stale statistics": (SHIFTED, 2),
    "stale statistics, scored": (SHIFTED + LOSS, 2),
    "other data, without a loss": (MODEL + HELD_OUT, 2),
    "other data, with a loss": (MODEL + HELD_OUT + LOSS, 2),
    "small batches": (MODEL.replace("8, 8", "1, 1"), 2),
    "small batches that are mixed": (MIXED.replace("8, 8", "1, 1"), 2),
    "sorted": (MODEL + SORTED, 4),
    "one sample per batch": (MODEL, 1),
    "no statistics": (MODEL.replace("BatchNorm2d(2)", "BatchNorm2d(2, track_running_stats=False)"), 2),
}


TRAINED = "\n\ndef load_model(width=0):\n    net = Net()\n    net.bn.weight.data.fill_(2.0)\n    return net\n"
"""A network whose weights are not those of a new one: what is wrong with it is more than a remark."""

REPAIRS = {
    "stale statistics": (SHIFTED + TRAINED, 2, "recalibrate model.py --batch-size 2 -o recalibrated.safetensors"),
    "a new network": (SHIFTED, 2, "recalibrate model.py --batch-size 2 -o recalibrated.safetensors"),
    "no statistics": (CASES["no statistics"][0], 2, "recalibrate model.py --batch-size 2 -o recalibrated.safetensors"),
    "one sample per batch": (  # the spec asks for a short training; no statistics are better than others
        (MODEL + TRAINED + LOSS + HELD_OUT)
        .replace(".square().mean()", ".square().mean() * 0 + 1")
        .replace("8, 8", "2, 2")
        .replace("images() + 1", "images()")
        .replace("fill_(2.0)", "fill_(2.0)\n    net.bn.running_mean.fill_(0.01)"),
        1,
        "convert spec.yaml --batch-size 1 --to frozen --finetune -o repaired.safetensors",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_next_command_runs_as_printed(workspace: Workspace, case: str) -> None:
    text, size = CASES[case]
    workspace.write("model.py", text)
    found = workspace.run("scan", "model.py", "--batch-size", str(size))
    assert found.code in (CLEAN, FINDINGS)
    command = printed(found.stdout)
    assert command[0] == "bnprobe"
    assert workspace.run(*command[1:]).code in (CLEAN, FINDINGS)


@pytest.mark.parametrize("case", REPAIRS)
def test_the_next_command_does_what_the_first_remedy_says(workspace: Workspace, case: str) -> None:
    text, size, expected = REPAIRS[case]
    workspace.write("model.py", text)
    workspace.write("spec.yaml", "model: {target: model.py}\ntrain: {steps: 4}\n")
    target = shlex.split(expected)[1]
    command = printed(workspace.run("scan", target, "--batch-size", str(size), "--all").stdout)
    assert command == ["bnprobe", *shlex.split(expected)]
    assert workspace.run(*command[1:]).code in (CLEAN, FINDINGS)
    assert (workspace.folder / command[-1]).exists()


def test_the_next_command_loads_the_same_weights_and_arguments(workspace: Workspace) -> None:
    workspace.write("my model.py", SHIFTED + TRAINED)
    made = (
        "import runpy, torch; torch.save({'ema': runpy.run_path('my model.py')['load_model']().state_dict()}, 'all.pt')"
    )
    subprocess.run([sys.executable, "-c", made], cwd=workspace.folder, check=True)
    given = ("--checkpoint", "all.pt", "--key=ema", "--model-arg", "width=3", "--batch-size", "2", "--seed", "1")
    found = workspace.run("scan", *given, "my model.py", "--batches", "8", "--exit-zero", "--select", "BN102,BN203")
    command = printed(found.stdout)
    assert command == ["bnprobe", "recalibrate", *given, "my model.py", "-o", "all-recalibrated.safetensors"]
    assert workspace.run(*command[1:]).code == CLEAN
    assert (workspace.folder / "all-recalibrated.safetensors").exists()


def test_the_commands_after_a_repair_run_as_printed(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED + TRAINED)
    found = workspace.run("recalibrate", "model.py", "--batch-size", "2", "-o", "out.safetensors")
    commands = printed(found.stdout), printed(found.stdout[: found.stdout.rindex("To export")])
    assert [command[1] for command in commands] == ["export", "verify"]
    assert [workspace.run(*command[1:]).code for command in commands] == [CLEAN, CLEAN]


def printed(text: str) -> list[str]:
    """The words of the command at the end of a report."""
    lines = text.rstrip().splitlines()
    start = max(number for number, line in enumerate(lines) if line.startswith("    bnprobe "))
    return shlex.split("\n".join(lines[start:]).replace("\\\n", " "))


def test_statistics_of_micro_batches_are_those_that_a_scan_tries(workspace: Workspace) -> None:
    """Sorted samples: what lies between batches is much of the variance, and an average leaves it out."""
    workspace.write("model.py", MODEL + SORTED + LOSS + HELD_OUT)
    where = ("model.py", "--batch-size", "4")
    report = json.loads(workspace.run("scan", *where, "--what-if", "--format", "json").stdout)
    row = next(each for each in report["remedies"] if each["name"] == "micro-batch statistics, averaged")
    how = ("--path", "micro-batch-averaged", "--batches", str(report["scan"]["batches"]))
    workspace.run("recalibrate", *where, *how, "-o", "out.safetensors", "--force")
    arms = json.loads((workspace.folder / "out.record.json").read_text())["proof"]["arms"]
    scores = {arm["name"]: arm["runs"][0]["score"]["loss"] for arm in arms}
    assert scores["as is"] == pytest.approx(row["before"]["loss"], rel=1e-5)
    assert scores["recalibrated"] == pytest.approx(row["after"]["loss"], rel=1e-3)
    assert scores["recalibrated"] != pytest.approx(scores["as is"], rel=1e-2)


KINDS = '''\
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnprobe


class Net(nn.Module):
    """A perfect network gives what it gets, whatever the camera makes of it."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(2, affine=False)

    def forward(self, x):
        seen = []
        for camera, values in enumerate((x, 4 - 3 * x)):
            with bnprobe.nn.domain(camera):
                seen.append(self.bn(values))
        return seen


def load_model():
    net = Net()
    net.bn.running_mean.fill_(2.0)
    net.bn.running_var.fill_(9.0)
    return net


def images(seed):
    chance = torch.Generator().manual_seed(seed)
    each = torch.randn(120, 2, 1, 1, generator=chance) * 0.8
    return torch.randn(120, 2, 4, 4, generator=chance) * 0.6 + each


def load_data(batch_size):
    return DataLoader(TensorDataset(images(0)), batch_size, shuffle=True)


def load_eval_data(batch_size):
    return DataLoader(TensorDataset(images(1)), batch_size)


def loss(model, batch):
    one, other = model(batch[0])
    return (one - batch[0]).square().mean() + (other + batch[0]).square().mean()
'''
EACH = (
    KINDS.replace("(one - batch[0])", "(one - own(batch[0]))").replace("(other + batch[0])", "(other + own(batch[0]))")
    + """

def own(x):
    return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)
"""
)


@pytest.mark.parametrize(("text", "to"), [(KINDS, "per-domain"), (EACH, "instance-renorm")])
def test_the_command_of_a_conversion_gives_the_figure_that_the_scan_gave(
    workspace: Workspace, text: str, to: str
) -> None:
    """Where both take statistics of the same samples: a scan takes them of 512, the command of more."""
    workspace.write("model.py", text)
    found = workspace.run("scan", "model.py", "--batch-size", "8", "--seed", "3", "--all")
    command = printed(found.stdout)
    assert command[command.index("--to") + 1] == to
    assert workspace.run(*command[1:]).code == CLEAN
    report = json.loads((workspace.folder / "repaired.before.json").read_text())
    record = json.loads((workspace.folder / "repaired.record.json").read_text())
    name = {"per-domain": "statistics per call"}.get(to, to.replace("-", " "))
    row = next(each for each in report["remedies"] if each["name"] == name)
    losses = {arm["name"]: arm["runs"][0]["score"]["loss"] for arm in record["proof"]["arms"]}
    assert record["proof"]["images_proving"] == row["images"] == 64
    assert losses["as is"] == pytest.approx(row["before"]["loss"], rel=1e-4)
    assert losses[to] == pytest.approx(row["after"]["loss"], rel=1e-4)
    assert losses[to] < 0.5 * losses["as is"]
