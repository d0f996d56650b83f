"""``bnprobe scan`` says why: the cause named first, rules that are left out and why, exit codes."""

from __future__ import annotations

from typing import Any

import pytest

from functional.command import CLEAN, FINDINGS, MODEL, REPOSITORY, SHIFTED, Workspace

SAMPLES = REPOSITORY / "sample_configs"
JSON = ("--format", "json")
TRAINED = MODEL.replace(
    "return Net()",
    "net = Net()\n    net.bn.num_batches_tracked.fill_(500)\n    net.bn.running_mean.add_(1e-4)\n    return net",
)
"""As MODEL, but not as new: nothing at all is found."""
TENSORFLOW = TRAINED.replace("nn.BatchNorm2d(2)", "nn.BatchNorm2d(2, momentum=0.99)")
OTHERS = """

def {head}:
    return DataLoader(TensorDataset(images() + {shift}), batch_size=batch_size)
"""
"""Evaluation images that are not those of the training."""


def _causes(report: dict[str, Any]) -> list[str]:
    return [diagnosis["cause"] for diagnosis in report["diagnoses"]]


@pytest.mark.parametrize(
    ("text", "code", "causes"),
    [
        (TRAINED, CLEAN, []),
        (TENSORFLOW, CLEAN, ["momentum_convention"]),  # a warning
        (SHIFTED, FINDINGS, ["never_trained"]),
    ],
    ids=["clean", "warning", "flagged"],
)
def test_exit_codes(workspace: Workspace, text: str, code: int, causes: list[str]) -> None:
    workspace.write("model.py", text)
    report = workspace.scan(*JSON).report(code)
    assert (_causes(report), report["summary"]["flagged"]) == (causes, int(code == FINDINGS))


def test_an_error_without_a_flagged_layer_is_a_finding(workspace: Workspace) -> None:
    workspace.write("model.py", TRAINED + OTHERS.format(head="load_eval_data(batch_size)", shift=2))
    report = workspace.scan(*JSON).report(FINDINGS)
    assert report["summary"]["flagged"] == 0
    assert [(found["cause"], found["severity"]) for found in report["diagnoses"]] == [("data_shift", "error")]
    printed = workspace.scan("--exit-zero")
    assert printed.code == CLEAN
    assert "BN206): 1 of 1 layer" in printed.stdout


def test_rules_are_selected_and_ignored(workspace: Workspace) -> None:
    sample = SAMPLES / "gan" / "spec.yaml"
    report = workspace.run("scan", sample, "--select", "BN2,BN101", "--ignore", "BN207", *JSON).report(CLEAN)
    rules = {verdict["rule"] for verdict in report["verdicts"]}
    assert rules == {"BN101", *(f"BN2{number:02}" for number in range(1, 17) if number != 7)}
    assert "shared_domains" not in _causes(report)
    wrong = workspace.run("scan", sample, "--select", "BN27")
    assert wrong.error() == (
        'There is no rule "BN27", and no code begins with it; the nearest code is BN207. `bnprobe explain` lists all'
        " rules."
    )


def test_an_exempted_layer_is_skipped_with_the_reason_given(workspace: Workspace) -> None:
    workspace.write("model.py", TENSORFLOW)
    workspace.write(
        "spec.yaml",
        "model: model.py\ndata: {batch_size: 2}\n"
        "rules: {exempt: [{layers: 'b*', rules: [BN1], reason: ported on purpose}]}\n",
    )
    report = workspace.run("scan", "spec.yaml", *JSON).report(CLEAN)
    assert report["diagnoses"] == []
    skipped = {found["rule"]: found["reason"] for found in report["verdicts"] if found["layer"] == "bn"}
    assert skipped["BN101"] == skipped["BN107"] == "ported on purpose"


def test_a_flagged_layer_that_the_user_accepts_does_not_fail_the_scan(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    spec = "model: model.py\ndata: {batch_size: 2}\n"
    workspace.write("spec.yaml", spec + "rules: {exempt: [{layers: bn, rules: [BN], reason: known}]}\n")
    assert workspace.run("scan", "spec.yaml", *JSON).report(CLEAN)["summary"]["flagged"] == 1
    assert workspace.scan("--ignore", "BN", *JSON).report(CLEAN)["summary"]["flagged"] == 1
    assert workspace.scan("--ignore", "BN3", *JSON).report(FINDINGS)["summary"]["flagged"] == 1


def test_an_exemption_needs_a_reason(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    workspace.write("spec.yaml", "model: model.py\nrules: {exempt: [{layers: 'b*', rules: [BN1]}]}\n")
    assert "reason is missing" in workspace.run("scan", "spec.yaml").error()
    assert "say why these rules should not apply to these layers" in workspace.run("scan", "spec.yaml").error()


def test_evaluation_data_of_the_spec(workspace: Workspace) -> None:
    workspace.write("model.py", TRAINED)
    workspace.write("held_out.py", MODEL + OTHERS.format(head="others(batch_size, shift)", shift="shift"))
    spec = "model: model.py\ndata: {batch_size: 2}\n"
    workspace.write("spec.yaml", spec)
    without = workspace.run("scan", "spec.yaml", *JSON).report(CLEAN)
    assert without["layers"][0]["shares"]["data_shift"] is None
    workspace.write("spec.yaml", spec + "eval_data: {target: 'held_out.py:others', args: {shift: 2}, batches: 8}\n")
    report = workspace.run("scan", "spec.yaml", *JSON).report(FINDINGS)
    assert _causes(report) == ["data_shift"]
    assert report["layers"][0]["shares"]["data_shift"] > 1
    passes = {found["name"]: found["images"] for found in report["scan"]["passes"]}
    assert passes["held-out data"] == 16
