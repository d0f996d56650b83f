"""Layers that training leaves in eval mode: stale statistics are found and mended, those of a pretrained part stay."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from functional.command import CLEAN, FINDINGS, Workspace
from functional.test_convert import FITTED, TRAINED, fitted, trained

HELD = (
    FITTED
    + """

class Held(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def load_model():
    return Held(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2))
"""
)
"""The network, whose own train() keeps its BN layer in eval mode."""

OTHER_DATA = (
    HELD
    + """

def data(seed, count):
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=chance) - 1
    return TensorDataset(x, (x[:, 0] + x[:, 2] > -2).long())
"""
)
"""Another task, for which the network is fine-tuned."""

WITH_FROZEN = "recalibrated with frozen layers"
SCAN = ("scan", *TRAINED[:-2])


def stale() -> dict[str, torch.Tensor]:
    """Weights of the training with the statistics that the first layer had before it."""
    names: dict[str, Any] = {}
    exec(FITTED, names)
    torch.manual_seed(0)
    first = names["load_model"]()[0](names["data"](0, 1024).tensors[0]).detach()
    return {**trained(None), "1.running_mean": first.mean(0), "1.running_var": first.var(0)}


def tuned(frozen_weights: bool) -> dict[str, torch.Tensor]:
    """The trained network with a head for the other task, trained on its features with their own statistics."""
    names: dict[str, Any] = {}
    exec(OTHER_DATA, names)
    model = names["load_model"]()
    model.load_state_dict(trained(None))
    model.train()
    optimizer = torch.optim.Adam(model[3].parameters() if frozen_weights else model.parameters(), 0.01)
    for _ in range(5):
        for batch in names["load_data"]():
            optimizer.zero_grad()
            names["loss"](model, batch).backward()
            optimizer.step()
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def errors(report: dict[str, Any]) -> list[str]:
    return [each["cause"] for each in report["diagnoses"] if each["severity"] == "error"]


def test_stale_statistics_of_a_frozen_layer_are_an_error_that_the_printed_command_mends(workspace: Workspace) -> None:
    workspace.write("model.py", HELD)
    torch.save(stale(), workspace.folder / "w.pt")
    report = workspace.run(*SCAN, "--format", "json").report(FINDINGS)
    assert errors(report) == ["lag"]
    assert report["summary"]["flagged"] == 0
    [remedy] = report["remedies"]
    assert (remedy["name"], remedy["layers"]) == (WITH_FROZEN, ["1"])
    told = workspace.run(*SCAN).stdout
    command = told[told.index("bnprobe recalibrate model.py") :].replace("\\\n", " ").split()
    assert "--include-frozen" in command
    done = workspace.run(*command[1:])
    assert done.code == CLEAN
    mended = load_file(workspace.folder / command[-1])
    fit = trained(None)
    assert all(torch.equal(mended[name], fit[name]) for name in fit if name.startswith(("0.", "3.", "1.w", "1.b")))
    record = json.loads((workspace.folder / command[-1]).with_suffix(".record.json").read_text())
    assert record["recalibrated"] == ["1"]
    assert record["proof"]["conclusion"] == "better"
    after = workspace.run("scan", "model.py", "--checkpoint", command[-1], "--batch-size", "32", "--format", "json")
    assert errors(after.report(CLEAN)) == []


def test_without_the_option_frozen_layers_are_refused_and_it_is_named(workspace: Workspace) -> None:
    workspace.write("model.py", HELD)
    torch.save(stale(), workspace.folder / "w.pt")
    assert "1 is in eval mode also in training. To recalibrate such layers, give --include-frozen." in workspace.run(
        "recalibrate", *TRAINED
    ).error(2)


@pytest.mark.parametrize("frozen_weights", [True, False])
def test_a_frozen_pretrained_part_with_a_tuned_head_is_no_error(workspace: Workspace, frozen_weights: bool) -> None:
    """Its statistics are far from those of the new data, but the head belongs to them."""
    freeze = "        self[:2].requires_grad_(False)\n" if frozen_weights else ""
    workspace.write("model.py", OTHER_DATA.replace("        return self\n", freeze + "        return self\n"))
    torch.save(tuned(frozen_weights), workspace.folder / "w.pt")
    report = workspace.run(*SCAN, "--format", "json").report(CLEAN)
    [layer], [remedy] = report["layers"], report["remedies"]
    assert layer["eval"]["mismatch"] > 0.3
    assert remedy["name"] == WITH_FROZEN
    assert remedy["after"]["metric"] < remedy["before"]["metric"] - 0.02
    assert errors(report) == []
    assert "lag" not in [each["cause"] for each in report["diagnoses"]]


def test_weights_trained_with_fixed_statistics_are_no_error(workspace: Workspace) -> None:
    fitted(workspace, statistics_from=3)
    workspace.write("model.py", HELD)
    report = workspace.run(*SCAN, "--format", "json").report(CLEAN)
    [found] = report["diagnoses"]
    assert (found["rule"], found["severity"]) == ("BN105", "warning")
    assert found["remedy"].startswith("Keep the running statistics as they are: on held-out data the metric is")


def test_a_healthy_frozen_layer_gets_no_error(workspace: Workspace) -> None:
    fitted(workspace)
    workspace.write("model.py", HELD)
    report = workspace.run(*SCAN, "--format", "json").report(CLEAN)
    assert [each["severity"] for each in report["diagnoses"]] == ["info"]
