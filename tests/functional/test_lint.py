"""``bnprobe lint``: findings about the model alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import bnprobe
from bnprobe.rules import RULES
from functional.command import CLEAN, ERROR, FINDINGS, MODEL, NOTHING, Workspace

RULES_OF_MODELS = sum(rule.needs == "model" for rule in RULES)
FAULTY = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1 = nn.BatchNorm1d(4, momentum=0.99)
        self.drop = nn.Dropout(0.5)
        self.bn2 = nn.BatchNorm1d(4, momentum=0.99)


def load_model():
    net = Net()
    for layer in (net.bn1, net.bn2):
        layer.running_mean.fill_(0.5)
    net.bn2.running_var[1] = float("nan")
    return net


def load_data(batch_size):
    raise RuntimeError("a lint reads no data")
"""

REPORT = f"""\
model.py:10: BN103 error bn2: The running statistics of its 4 channels contain 1 NaN or Inf value.
    fix: Recalibrate the running statistics on training data (bnprobe recalibrate), or load an earlier checkpoint; \
then find what overflowed.
model.py:8: BN101 warning 2 of 2 layers: momentum is close to 1 or 0, so the running statistics are no average over \
batches. For example bn1: momentum=0.99 is the weight of the newest batch, so the running statistics average over \
about 1.02 batches. Did you mean 0.01?
    model.py:8: bn1
    model.py:10: bn2
    fix: Use 1 - momentum: in PyTorch, momentum is the weight of the new batch. Then recalibrate the running \
statistics on training data (bnprobe recalibrate).
model.py:10: BN107 info bn2: Random layers that are active in training only come before it: drop.
    fix: Move dropout behind the last BN layer, or recalibrate the running statistics with dropout off.
1 error and 1 warning and 1 remark in 2 layers of model.py:load_model ({RULES_OF_MODELS} rules).
"""


@pytest.fixture
def faulty(workspace: Workspace) -> Workspace:
    workspace.write("model.py", FAULTY)
    return workspace


def test_each_finding_is_said_once_with_its_lines(faulty: Workspace) -> None:
    found = faulty.run("lint", "model.py")
    assert (found.code, found.stdout, found.stderr) == (FINDINGS, REPORT, "")


def test_rules_are_selected_and_ignored(faulty: Workspace) -> None:
    found = faulty.run("lint", "model.py", "--select", "BN101,BN103", "--select", "bn107", "--ignore", "BN10")
    assert found.code == ERROR  # nothing is left
    found = faulty.run("lint", "model.py", "--select", "BN101,BN103", "--ignore", "BN101")
    assert found.stdout.splitlines()[-1] == "1 error in 2 layers of model.py:load_model (1 rule)."
    found = faulty.run("lint", "model.py", "--select", "BN104")
    assert (found.code, found.stdout) == (CLEAN, "Nothing found in 2 layers of model.py:load_model (1 rule).\n")


def test_exit_zero_hides_the_findings_code_only(faulty: Workspace) -> None:
    found = faulty.run("lint", "model.py", "--exit-zero")
    assert (found.code, found.stdout) == (CLEAN, REPORT)
    assert faulty.run("lint", "model.py", "--exit-zero", "--select", "BN999").code == ERROR


def test_json_holds_the_verdicts_and_diagnoses_of_a_scan(faulty: Workspace) -> None:
    report = faulty.run("lint", "model.py", "--format", "json").report(FINDINGS)
    assert list(report)[:3] == ["schema_version", "tool", "model"]
    assert (report["schema_version"], report["model"], report["layers"]) == (1, "model.py:load_model", 2)
    assert [(found["rule"], found["layers"]) for found in report["diagnoses"]] == [
        ("BN103", ["bn2"]),
        ("BN101", ["bn1", "bn2"]),
        ("BN107", ["bn2"]),
    ]
    assert len(report["verdicts"]) == 2 * RULES_OF_MODELS
    assert {verdict["location"] for verdict in report["verdicts"]} == {"model.py:8", "model.py:10"}


def test_the_report_goes_to_a_file(faulty: Workspace) -> None:
    found = faulty.run("lint", "model.py", "--format", "json", "--output", "lint.json")
    counts = f"1 error and 1 warning and 1 remark in 2 layers of model.py:load_model ({RULES_OF_MODELS} rules)"
    assert (found.code, found.stderr) == (FINDINGS, "Report written to lint.json.\n")
    assert found.stdout.endswith(f"{counts}.\n")
    assert json.loads((faulty.folder / "lint.json").read_text())["layers"] == 2


def test_a_spec_can_exempt_layers_with_a_reason(faulty: Workspace) -> None:
    faulty.write(
        "spec.yaml",
        "model: model.py\nrules:\n  ignore: [BN107]\n  exempt:\n"
        "    - {layers: 'bn*', rules: [BN101], reason: ported on purpose}\n",
    )
    report = faulty.run("lint", "spec.yaml", "--format", "json").report(FINDINGS)
    assert [found["rule"] for found in report["diagnoses"]] == ["BN103"]
    reasons = {verdict["reason"] for verdict in report["verdicts"] if verdict["rule"] == "BN101"}
    assert reasons == {"ported on purpose"}


def test_a_model_that_was_not_trained_yet_is_no_finding(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    found = workspace.run("lint", "model.py")
    assert found.code == CLEAN
    assert found.stdout.startswith("model.py:14: BN102 info bn: ")
    assert found.stdout.endswith(f"1 remark in 1 layer of model.py:load_model ({RULES_OF_MODELS} rules).\n")


BLOCKS = """
import torch
from torch import nn
from torch.nn import functional as F


class StochasticDepth(nn.Module):  # the p, and when it is active, are torchvision's
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        keep = torch.rand(len(x), 1, 1, 1) >= self.p if self.training else 1.0
        return x * keep


class Block(nn.Module):
    def __init__(self, momentum):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4, momentum=momentum)
        self.stochastic_depth = StochasticDepth(0.2)

    def forward(self, x):
        return x + self.stochastic_depth(F.relu(self.bn(self.conv(x))))


def trained(momentum=0.1, kept=True):
    net = nn.Sequential(Block(momentum), Block(momentum))
    for block in net:
        with torch.no_grad():
            block.bn.weight.uniform_(0.5, 1.5)
        if kept:
            block.bn.running_mean.normal_()
            block.bn.num_batches_tracked.fill_(500)
    return net


def stock():
    return trained()


def held():
    return trained(momentum=0.0)


def without_buffers():
    return trained(kept=False)
"""


@pytest.mark.parametrize(
    ("symbol", "code", "rules"),
    [
        ("stock", CLEAN, {"BN107": "info"}),
        ("held", FINDINGS, {"BN101": "warning", "BN107": "info"}),
        ("without_buffers", FINDINGS, {"BN102": "error", "BN107": "info"}),
    ],
)
def test_trained_networks_as_libraries_ship_them_pass_and_those_without_their_statistics_do_not(
    workspace: Workspace, symbol: str, code: int, rules: dict[str, str]
) -> None:
    workspace.write("model.py", BLOCKS)
    report = workspace.run("lint", f"model.py:{symbol}", "--format", "json").report(code)
    assert {found["rule"]: found["severity"] for found in report["diagnoses"]} == rules


def test_a_checkpoint_is_loaded_first(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    users: dict[str, Any] = {}
    exec(MODEL, users)
    net = users["load_model"]()
    net.bn.running_mean += 1
    torch.save(net.state_dict(), workspace.folder / "w.pt")
    found = workspace.run("lint", "model.py", "--checkpoint", "w.pt")
    assert (found.code, found.stdout) == (
        CLEAN,
        f"Nothing found in 1 layer of model.py:load_model ({RULES_OF_MODELS} rules).\n",
    )


def test_which_weights_were_judged_is_said(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    users: dict[str, Any] = {}
    exec(MODEL, users)
    state = users["load_model"]().state_dict()
    torch.save({"net": state, "ema": state}, workspace.folder / "w.pt")
    options = ("lint", "model.py", "--checkpoint", "w.pt")
    assert 'note: The weights were taken from the key "net" of w.pt.\n' in workspace.run(*options).stdout
    assert "ema" in workspace.run(*options, "--format", "json").report(CLEAN)["notes"][1]


def test_a_wrong_code_is_said_before_anything_is_loaded(workspace: Workspace) -> None:
    workspace.write("model.py", "raise RuntimeError('loaded')")
    assert workspace.run("lint", "model.py", "--select", "BN21,BN9").error() == (
        'There is no rule "BN9", and no code begins with it; the nearest code is BN209. `bnprobe explain` lists all'
        " rules."
    )
    assert "can judge a model without data" in workspace.run("lint", "model.py", "--select", "BN2").error()


def test_a_model_without_norms_cannot_be_judged(workspace: Workspace) -> None:
    workspace.write("model.py", "from torch import nn\nmodel = nn.Linear(2, 2)\n")
    said = workspace.run("lint", "model.py").error(NOTHING)
    assert said == (
        "Linear has no Batch Normalization layer of a class that lint knows. lint does not run the model; bnprobe scan"
        " does, and finds norms by what they do."
    )


OWN_NORM = """
class Scaling(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("power", torch.ones(2))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.average, self.power, training=self.training)
"""


def test_what_only_a_scan_can_see_is_said(workspace: Workspace) -> None:
    begin = f"import torch\nfrom torch import nn\n{OWN_NORM}\n"
    reason = "1 (Scaling): its buffers average and power may be running statistics"
    workspace.write("model.py", begin + "model = nn.Sequential(nn.Linear(2, 2), Scaling(), Scaling())\n")
    said = workspace.run("lint", "model.py").error(NOTHING)
    assert said.startswith(f"lint can judge no layer of Sequential. The first is {reason} (1 more like it).")
    workspace.write("model.py", begin + "model = nn.Sequential(nn.BatchNorm1d(2), Scaling())\n")
    assert f"not judged: {reason}\n" in workspace.run("lint", "model.py").stdout


def test_what_cannot_be_judged_has_a_reason(workspace: Workspace) -> None:
    workspace.write(
        "model.py",
        "from torch import nn\nclass MyNorm(nn.Module): pass\nmodel = nn.Sequential(nn.BatchNorm1d(2), MyNorm())\n",
    )
    found = workspace.run("lint", "model.py")
    assert "not judged: 1 (MyNorm): unknown norm-like module MyNorm\n" in found.stdout


UNDONE = """\
import bnprobe
import torch
from torch import nn


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))


def converted():
    return bnprobe.convert(plain(), ["1"], to="per-domain")


def synchronized():
    return nn.SyncBatchNorm.convert_sync_batchnorm(plain())
"""


def test_weights_of_converted_layers_in_a_model_without_them(workspace: Workspace) -> None:
    workspace.write("model.py", UNDONE)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    models = {"plain": plain, "converted": bnprobe.convert(plain, ["1"], to="per-domain")}
    for name, model in models.items():
        torch.save(model.state_dict(), workspace.folder / f"{name}.pt")
    for name in ("synchronized", "converted"):
        workspace.write(f"{name}.yaml", f"model: {{target: 'model.py:{name}'}}\ncheckpoint: {{strict: false}}\n")
    found = workspace.run("lint", "synchronized.yaml", "--checkpoint", "converted.pt", "--select", "BN108")
    assert found.code == FINDINGS
    assert (
        "BN108 error 1: The checkpoint has tensors of a layer converted to per-domain, but the layer is SyncBatchNorm:"
        " it gives other outputs."
    ) in found.stdout
    assert workspace.run("lint", "converted.yaml", "--checkpoint", "converted.pt", "--select", "BN108").code == CLEAN
    error = workspace.run("lint", "model.py:synchronized", "--checkpoint", "converted.pt").error()
    assert "1 was converted to per-domain where the file was saved, and is not in this model. Convert it" in error
    error = workspace.run("lint", "converted.yaml", "--checkpoint", "plain.pt").error()
    assert "Missing (3): 1.domain_mean, 1.domain_var, 1.domain_batches." in error
    assert "1 is converted to per-domain in the model, and was not where the file was saved" in error
    assert "load the file before you convert." in error
