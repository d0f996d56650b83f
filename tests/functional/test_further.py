"""``bnprobe scan --what-if``, ``--train-steps`` and ``--gradients``: what they print and write, and what they lack."""

from __future__ import annotations

from typing import Any

import pytest

import bnprobe
from bnprobe.records import Report
from bnprobe.report import render
from bnprobe.report.json import load_as
from functional.command import CLEAN, FINDINGS, MODEL, REPOSITORY, Result, Workspace

SAMPLES = REPOSITORY / "sample_configs"
BATCH2 = SAMPLES / "digits" / "batch2.yaml"
JSON = ("--format", "json")
LOSS = "\n\ndef loss(model, batch):\n    return model(batch[0]).square().mean()\n"
CHECKPOINTED = (
    MODEL.replace("import torch\n", "import torch\nfrom torch.utils.checkpoint import checkpoint\n", 1).replace(
        "self.head(self.bn(x)", "self.head(checkpoint(self.bn, x, use_reentrant=False)"
    )
    + LOSS
)


def test_what_if_tries_the_free_remedies_on_held_out_images(workspace: Workspace) -> None:
    report = workspace.run("scan", SAMPLES / "volumes" / "batch1.yaml", "--what-if", *JSON).report(FINDINGS)
    found = {remedy["name"]: remedy for remedy in report["remedies"]}
    assert set(found) > {
        "recalibrated",
        "evaluation statistics",
        "instance statistics",
        "batch statistics, batches of 4",
    }
    halved = {remedy["name"]: remedy["images"] for remedy in report["remedies"] if remedy["images"] != 32}
    weighed = {"instance renorm", "example weighing"}
    assert halved == dict.fromkeys(weighed, 16)  # the others choose; of the rest all, at each batch size
    weighing = found["example weighing"]
    assert weighing["control"]["metric"] + 0.2 < weighing["after"]["metric"]
    instance = found["instance statistics"]  # of one volume: what the network was trained with
    assert instance["after"]["loss"] < 0.5 * instance["before"]["loss"]
    assert instance["after"]["metric"] > instance["before"]["metric"] + 0.2
    assert found["recalibrated"]["after"]["loss"] > instance["after"]["loss"] + 0.2
    assert [measured for measured in report["scan"]["passes"] if measured["name"] == "what-if"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A scan that trains a copy of the digits network and looks at its gradients, as JSON."""
    workspace = Workspace(tmp_path_factory.mktemp("trained"))
    return workspace.run("scan", BATCH2, "--train-steps", "8", "--gradients", *JSON)


def test_training_steps_show_how_the_statistics_move(trained: Result) -> None:
    assert trained.code == FINDINGS
    printed = render(load_as(Report, trained.stdout))
    assert "Updated once per step and call, at the configured rate, in all 9 layers." in " ".join(printed.split())
    assert "BN301" not in printed  # passed, no longer skipped


def test_gradients_are_measured(trained: Result) -> None:
    report = trained.report(FINDINGS)
    noise = {layer["name"]: layer["backward"]["equivalent_batch_size"] for layer in report["layers"]}
    assert noise["blocks.2.bn2"] == min(noise.values()) < 10
    angle = report["summary"]["gradient_angle"]
    assert (0 < angle["cosine"] < 1, angle["batches"]) == (True, 32)
    assert [found["cause"] for found in report["diagnoses"]] == ["small_batch", "backward_noise"]


def test_statistics_that_are_updated_twice_per_step(workspace: Workspace) -> None:
    workspace.write("model.py", CHECKPOINTED)
    report = workspace.scan("--train-steps", "4", *JSON).report(CLEAN)
    updates = report["layers"][0]["updates"]
    assert (updates["per_step"], updates["repeated"]) == (2, 1)
    assert updates["rate"] == pytest.approx(0.19, rel=1e-3)
    assert "double_update" in [found["cause"] for found in report["diagnoses"]]
    assert "BN301" in workspace.scan("--train-steps", "4").stdout


def test_the_optimizer_of_the_spec_trains(workspace: Workspace) -> None:
    made = "\n\ndef make(parameters, lr):\n    print('made', lr)\n    return torch.optim.SGD(parameters, lr)\n"
    workspace.write("model.py", MODEL + LOSS + made)
    spec = "model: model.py\ndata: {batch_size: 2}\nscan: {train_steps: 2}\n"
    workspace.write("spec.yaml", spec + "train: {optimizer: {target: 'model.py:make', args: {lr: 0.25}}}\n")
    assert "made 0.25\n" in workspace.run("scan", "spec.yaml").stderr
    workspace.write("spec.yaml", spec + "train: {optimizer: {target: SDG}}\n")
    assert 'there is no optimizer "SDG"' in workspace.run("scan", "spec.yaml").error()
    workspace.write("spec.yaml", spec + "train: {optimizer: {target: SGD, args: {lr: 1e-3}}}\n")
    assert "write 0.001" in workspace.run("scan", "spec.yaml").error()


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        (["--train-steps", "2"], MODEL, "--train-steps needs a loss: give loss(model, batch) in the model file, or"),
        (["--gradients"], MODEL, "--gradients needs a loss: give loss(model, batch) in the model file, or"),
        (
            ["--what-if"],
            MODEL,
            "--what-if needs a loss or a metric: give loss(model, batch) or",
        ),
        (["--what-if"], MODEL + LOSS, "--what-if needs held-out data"),
    ],
    ids=["train-steps", "gradients", "what-if", "what-if-data"],
)
def test_what_is_missing_is_said_before_anything_is_measured(
    workspace: Workspace, option: list[str], text: str, said: str
) -> None:
    workspace.write("model.py", text)
    assert workspace.scan(*option).error().startswith(said)


def test_the_python_call_takes_the_same(workspace: Workspace) -> None:
    """As in docs/python.md."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    rows = TensorDataset(torch.randn(128, 4, generator=torch.Generator().manual_seed(0)))
    loader, held_out = DataLoader(rows, 2), DataLoader(rows, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made: list[float] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(0.1)
        return torch.optim.Adam(parameters, lr=0.1)

    report = bnprobe.scan(
        model,
        loader,
        batch_size=2,
        evaluation=held_out,
        loss=lambda network, batch: network(batch[0]).square().mean(),
        optimizer=optimizer,
        what_if=True,
        train_steps=8,
        gradients=True,
    )
    assert made == [0.1]
    assert report.diagnoses[0].cause == "small_batch"
    assert report.layers[0].updates is not None
    assert report.layers[0].backward is not None
    assert {remedy.name for remedy in report.remedies} >= {"recalibrated", "batch statistics"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
