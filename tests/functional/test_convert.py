"""``bnprobe convert``: plan, repair, proof, and what stops it."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from functional.command import CLEAN, ERROR, FINDINGS, NOTHING, REPOSITORY, SHIFTED, Result, Workspace
from functional.processes import launch_installed, run_on_a_full_disk, start

SORTED = REPOSITORY / "sample_configs" / "digits" / "sorted.yaml"
JSON = ("--format", "json")
REPAIRABLE = (
    SHIFTED
    + """

def load_data(batch_size):
    labels = (images().mean((1, 2, 3)) > SHIFT).long()
    return DataLoader(TensorDataset(images(), labels), batch_size=batch_size, shuffle=True)


def load_eval_data(batch_size):
    return load_data(batch_size)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def metric(model, batch):
    return (model(batch[0]).argmax(1) == batch[1]).float().mean()
"""
)
"""A model whose only BN layer does not fit its data, and all that fine-tuning needs."""

TARGET = ("model.py", "--batch-size", "4")
SHORT = ("--finetune", "--steps", "10")
ACCURACY = ("--goal", "max")
"""Of a network that has learned nothing, the loss may contradict the accuracy."""


@pytest.fixture
def repairable(workspace: Workspace) -> Workspace:
    workspace.write("model.py", REPAIRABLE)
    return workspace


def files(workspace: Workspace) -> set[str]:
    return {path.name for path in workspace.folder.iterdir()} - {"model.py", "__pycache__"}


def read(workspace: Workspace, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((workspace.folder / name).read_text(encoding="utf-8"))
    return found


def arms(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in record["proof"]["arms"]}


def test_a_dry_run_says_what_would_change_and_changes_nothing(repairable: Workspace) -> None:
    found = repairable.run("convert", *TARGET, "--dry-run")
    assert found.code == CLEAN
    assert "1 of 1 normalization layer would become batch-renorm" in " ".join(found.stdout.split())
    assert re.search(r"flagged: n_eq [\d.]+, below 32", found.stdout)
    assert files(repairable) == set()


def test_the_plan_for_given_layers_needs_no_data(workspace: Workspace) -> None:
    workspace.write("model.py", REPAIRABLE.replace("def load_data", "def other_data"))
    plan = json.loads(
        workspace.run("convert", "model.py", "--layers", "b*", "--to", "frozen", "--dry-run", *JSON).stdout
    )
    assert [(change["name"], change["to"]) for change in plan["changes"]] == [("bn", "FrozenBatchNorm2d")]


def test_check_fails_where_a_layer_needs_repair(repairable: Workspace) -> None:
    found = repairable.run("convert", *TARGET, "--check")
    assert found.code == FINDINGS
    assert "flagged" in found.stdout
    repairable.write("model.py", REPAIRABLE.replace("SHIFT = 3.0", "SHIFT = 0.0"))
    assert repairable.run("convert", *TARGET, "--check").code == CLEAN
    assert files(repairable) == set()


def test_nothing_to_repair_writes_nothing(workspace: Workspace) -> None:
    workspace.write("model.py", REPAIRABLE.replace("SHIFT = 3.0", "SHIFT = 0.0"))
    found = workspace.run("convert", *TARGET, "-o", "out.safetensors")
    assert (found.code, found.stdout) == (CLEAN, "")
    assert "No layer needs repair" in found.stderr
    assert files(workspace) == set()


def test_an_error_that_no_conversion_mends_is_not_called_sound(workspace: Workspace) -> None:
    noisy = REPAIRABLE.replace("SHIFT = 3.0", "SHIFT = 0.0").replace(
        "self.bn(x)", "self.bn(x + 0.2 * torch.randn(x.shape))"
    )
    assert noisy.count("torch.randn(x.shape)") == 1
    workspace.write("model.py", noisy)
    found = workspace.run("convert", *TARGET, "-o", "out.safetensors").error()
    assert "No layer is flagged, and converting layers is not what mends the error" in found
    assert "(BN213)" in found
    assert "name them with --layers" in found
    assert files(workspace) == set()


def test_a_repair_is_proved_beside_its_controls(repairable: Workspace) -> None:
    found = repairable.run("convert", *TARGET, *SHORT, *ACCURACY, "--seeds", "2", "-o", "out.safetensors")
    assert found.code == CLEAN
    names = {f"out.{suffix}" for suffix in ("safetensors", "record.json", "before.json", "after.json", "log.csv")}
    assert files(repairable) == names
    record = read(repairable, "out.record.json")
    control = ["BN fine-tuned", "BN recalibrated after"]
    assert list(arms(record)) == ["as is", "recalibrated", "batch-renorm untrained", *control, "batch-renorm"]
    assert [len(arm["runs"]) for arm in arms(record).values()] == [1, 1, 1, 2, 2, 2]
    assert (record["flagged_before"], record["flagged_after"]) == (1, 0)
    assert record["seeds"] == [0, 1]
    gains = [
        ours["score"]["metric"] - control["score"]["metric"]
        for ours, control in zip(
            arms(record)["batch-renorm"]["runs"], arms(record)[record["proof"]["control"]]["runs"], strict=True
        )
    ]
    assert record["proof"]["gain"]["mean"] == pytest.approx(sum(gains) / 2)
    log = (repairable.folder / "out.log.csv").read_text().splitlines()
    assert len(log) == 1 + 2 * 2 * 10
    verified = repairable.run("verify", "out.before.json", "out.after.json")
    assert verified.code == CLEAN


def test_repaired_weights_load_strictly_into_plain_bn_and_give_the_proved_outputs(repairable: Workspace) -> None:
    assert repairable.run("convert", *TARGET, *SHORT, "-o", "out.safetensors").code == CLEAN
    users: dict[str, Any] = {}
    exec(REPAIRABLE, users)
    net = users["load_model"]()
    net.load_state_dict(load_file(repairable.folder / "out.safetensors"), strict=True)
    images, labels = users["load_data"](64).dataset.tensors
    accuracy = float((net.eval()(images).argmax(1) == labels).float().mean())
    rescan = repairable.run("scan", *TARGET, "--checkpoint", "out.safetensors", *JSON)
    score = json.loads(rescan.stdout)["summary"]["output"]["metric"]["eval"]
    record = read(repairable, "out.record.json")
    assert score == pytest.approx(arms(record)["batch-renorm"]["runs"][0]["score"]["metric"], abs=0.2)
    assert accuracy == pytest.approx(score, abs=1e-6)


def test_without_training_the_model_as_loaded_is_the_baseline(repairable: Workspace) -> None:
    found = repairable.run("convert", *TARGET, *ACCURACY, "--to", "group-norm", "-o", "out.safetensors", *JSON)
    assert found.code == CLEAN
    record = json.loads(found.stdout)
    assert list(arms(record)) == ["as is", "recalibrated", "group-norm"]
    assert (record["proof"]["control"], record["proof"]["conclusion"]) == ("as is", "same")
    assert record["flagged_after"] == 0  # no BN layer is left
    assert not record["plan"]["deploys"]
    assert set(load_file(repairable.folder / "out.safetensors")) == {"bn.weight", "bn.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("to", ["frozen", "sync", "gated"])
def test_other_targets_deploy_as_plain_bn(repairable: Workspace, to: str) -> None:
    assert repairable.run("convert", *TARGET, *SHORT, "--to", to, "-o", "out.safetensors").code == CLEAN
    assert repairable.run("scan", *TARGET, "--checkpoint", "out.safetensors").code in (CLEAN, FINDINGS)
    assert read(repairable, "out.record.json")["flagged_after"] == 0


def test_ghosts_deploy_as_plain_bn_where_batches_are_larger(repairable: Workspace) -> None:
    found = repairable.run("convert", *TARGET, *SHORT, "--to", "ghost", "-o", "out.safetensors")
    assert found.error().startswith(
        "ghost with virtual_batch_size 32 is plain BN in batches of 4: give less than 4 with --virtual-batch-size"
        " (repair.virtual_batch_size), or choose another target"
    )
    never = repairable.folder / "model.py"
    text = never.read_text()
    never.write_text(text + "\n\ndef forward(model, batch):\n    raise RuntimeError('nothing is to be run')\n")
    assert (
        "is plain BN in batches of 4"
        in repairable.run("convert", *TARGET, "--to", "ghost", "-o", "o.safetensors").error()
    )
    never.write_text(text)
    small = repairable.run("convert", *TARGET, "--to", "ghost", "--virtual-batch-size", "2", "--dry-run")
    assert small.code == CLEAN
    ghosts = "repair: {to: ghost, virtual_batch_size: 2}"
    repairable.write("spec.yaml", f"model: model.py\ndata: {{batch_size: 4}}\n{ghosts}\n")
    assert repairable.run("convert", "spec.yaml", *SHORT, "-o", "out.safetensors").code == CLEAN
    assert repairable.run("scan", *TARGET, "--checkpoint", "out.safetensors").code in (CLEAN, FINDINGS)
    record = read(repairable, "out.record.json")
    assert record["plan"]["changes"][0]["to"] == "GhostBatchNorm2d"
    assert record["settings"]["repair"]["virtual_batch_size"] == 2


def test_auto_picks_by_the_batches_set_apart(repairable: Workspace) -> None:
    found = repairable.run(
        "convert", *TARGET, "--finetune", "--steps", "20", "--to", "auto", "-o", "out.safetensors", *JSON
    )
    record = json.loads(found.stdout)
    note = next(note for note in record["notes"] if note.startswith("--to auto chose"))
    assert record["plan"]["to"] in note
    for name in ("batch-renorm", "frozen", "group-norm", "gated"):
        assert f"{name} " in note
    assert "ghost" not in note  # plain BN in batches of 4


def test_layers_of_a_saved_report(repairable: Workspace) -> None:
    repairable.run("scan", *TARGET, *JSON, "--output", "report.json")
    found = repairable.run("convert", *TARGET, "--report", "report.json", "--dry-run", *JSON)
    plan = json.loads(found.stdout)
    assert [change["name"] for change in plan["changes"]] == ["bn"]
    assert plan["source"] == "report.json"
    other = repairable.run("convert", SORTED, "--report", "report.json", "--dry-run")
    assert "another model" in other.error()


def test_requirements_decide_the_exit_code(repairable: Workspace) -> None:
    held = ("--require", "flagged==0", "--require", "loss<10")
    assert repairable.run("convert", *TARGET, *SHORT, *held, "-o", "out.safetensors").code == CLEAN
    found = repairable.run("convert", *TARGET, *SHORT, "--require", "metric>1", "--force", "-o", "out.safetensors")
    assert found.code == FINDINGS
    results = read(repairable, "out.record.json")["requirements"]
    assert [(result["text"], result["held"]) for result in results] == [("metric>1", False)]


def test_training_that_diverges_is_said_and_keeps_the_last_good_weights(repairable: Workspace) -> None:
    found = repairable.run("convert", *TARGET, *SHORT, "--lr", "1e30", "-o", "out.safetensors", "--force")
    assert found.code == FINDINGS
    run = arms(read(repairable, "out.record.json"))["batch-renorm"]["runs"][0]
    assert run["ending"] == "diverged"
    assert re.search(r"step \d+", run["note"])
    assert all(torch.isfinite(value).all() for value in load_file(repairable.folder / "out.safetensors").values())


def test_outputs_are_not_replaced_without_force(repairable: Workspace) -> None:
    before = repairable.write("out.record.json", "mine")
    message = repairable.run("convert", *TARGET, "-o", "out.safetensors").error()
    assert "out.record.json already exists" in message
    assert before.read_text() == "mine"
    assert repairable.run("convert", *TARGET, "-o", "out.safetensors", "--force").code == CLEAN
    assert read(repairable, "out.record.json")["action"] == "convert"


# ---- what is the user's


BOARD = """
import pathlib, sys, types


class SummaryWriter:
    def __init__(self, folder, purge_step=None, filename_suffix=""):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        self.file = pathlib.Path(folder, "events.out.tfevents.1.host" + filename_suffix).open("a")

    def add_scalar(self, name, value, step):
        print(name, value, step, file=self.file)

    def close(self):
        self.file.close()


sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=SummaryWriter)
pathlib.Path("loaded").touch()
"""
"""Stands for TensorBoard in a model file, and tells that the model was loaded."""
FORCED = ("-o", "out.safetensors", "--force")
FINETUNED = ("convert", *TARGET, *SHORT, *FORCED)


@pytest.fixture
def boarded(repairable: Workspace) -> Workspace:
    """A workspace in which TensorBoard seems to be installed."""
    repairable.write("model.py", REPAIRABLE + BOARD)
    repairable.write("installed/tensorboard.py", "")
    return repairable


def run_boarded(workspace: Workspace, *arguments: str) -> Result:
    """Run the command with TensorBoard."""
    with mock.patch.object(sys, "path", [str(workspace.folder / "installed"), *sys.path]):
        try:
            return workspace.run(*arguments)
        finally:
            sys.modules.pop("torch.utils.tensorboard", None)


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("resume", [(), ("--resume",)])
@pytest.mark.parametrize("name", ["out.log/mine.txt", "out.log", "out.state/mine.txt", "out.state"])
def test_files_of_the_user_are_refused_before_anything_runs(
    boarded: Workspace, name: str, resume: tuple[str, ...], force: tuple[str, ...]
) -> None:
    mine = boarded.write(name, "mine")
    message = run_boarded(boarded, "convert", *TARGET, *SHORT, "-o", "out.safetensors", *resume, *force).error()
    assert message == f"{name.split('/')[0]} was not made by bnprobe: move it, or give another -o."
    assert mine.read_text() == "mine"
    assert not (boarded.folder / "loaded").exists()


@pytest.mark.parametrize("command", ["convert", "recalibrate"])
def test_without_training_the_names_of_training_are_nobodys_business(boarded: Workspace, command: str) -> None:
    mine = [boarded.write(name, "mine") for name in ("out.log/mine.txt", "out.log.csv", "out.state/mine.txt")]
    assert run_boarded(boarded, command, *TARGET, *FORCED).code == CLEAN
    assert [path.read_text() for path in mine] == ["mine"] * 3


def test_without_tensorboard_its_name_is_free(repairable: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    mine = repairable.write("out.log", "bnprobe convert > out.log")
    assert repairable.run(*FINETUNED).code == CLEAN
    assert mine.read_text() == "bnprobe convert > out.log"


def test_what_the_user_adds_to_the_folders_survives(boarded: Workspace) -> None:
    assert run_boarded(boarded, *FINETUNED).code == CLEAN
    log, state = boarded.folder / "out.log", boarded.folder / "out.state"
    events = sorted(log.glob("*/events*"))
    assert [path.parent.name for path in events] == ["BN-fine-tuned-seed-0", "batch-renorm-seed-0"]
    assert not state.exists()
    whole = events[0].read_text()
    message = run_boarded(boarded, "convert", *TARGET, *SHORT, "-o", "out.safetensors").error()
    assert message.startswith("out.log already exists")

    notes = boarded.write("out.log/notes.txt", "mine")
    theirs = boarded.write("out.log/batch-renorm-seed-0/events.out.tfevents.9.host", "mine")
    adds = "    pathlib.Path('out.state').exists() and pathlib.Path('out.state/notes.txt').write_text('mine')\n"
    boarded.write("model.py", REPAIRABLE.replace("    return (model", f"{adds}    return (model") + BOARD)
    found = run_boarded(boarded, *FINETUNED)
    assert found.code == CLEAN
    assert "out.state was kept because it contains files that bnprobe did not write." in found.stderr
    assert notes.read_text() == theirs.read_text() == "mine"
    assert [path.name for path in state.iterdir()] == ["notes.txt"]
    assert events[0].read_text() == whole


def test_what_appears_during_training_is_not_replaced(repairable: Workspace) -> None:
    adds = "    pathlib.Path('out.state').exists() and pathlib.Path('out.safetensors').write_text('mine')\n"
    repairable.write(
        "model.py", REPAIRABLE.replace("    return (model", f"{adds}    return (model") + "\nimport pathlib\n"
    )
    found = repairable.run("convert", *TARGET, *SHORT, "-o", "out.safetensors")
    assert found.code == ERROR
    assert "out.safetensors already exists" in found.stderr
    assert (repairable.folder / "out.safetensors").read_text() == "mine"
    assert "out.safetensors already exists" in repairable.run(*FINETUNED[:-1], "--resume").error()
    assert repairable.run(*FINETUNED, "--resume").code == CLEAN
    assert not (repairable.folder / "out.state").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give -o FILE"),
        (["-o", "missing/out.safetensors"], "missing of -o does not exist"),
        (["--check", "-o", "out.safetensors"], "--output has no effect with it"),
        (["-o", "out.safetensors", "--require", "metric"], 'as in "metric>=0.97"'),
        (["-o", "out.safetensors", "--require", "metrics>=1"], "the nearest is metric"),
        (["-o", "out.safetensors", "--layers", "bn", "--report", "none.json"], "give one"),
        (["--check", "--force"], "--force has no effect with it"),
        (["-o", "out.safetensors", "--layers", "bm"], 'nearest name is "bn"'),
        (["-o", "out.pt"], "a name that ends in .safetensors"),
        (["-o", "out.safetensors", "--require", "gain>0"], "add --finetune"),
        (["-o", "out.safetensors", "--resume"], "add --finetune"),
        (["-o", "out.safetensors", "--steps", "5"], "--steps has an effect only with --finetune"),
        (["-o", "out.safetensors", "--to", "auto"], "add --finetune"),
        (["-o", "out.safetensors", "--to", "frozen", "--groups", "4"], "--groups 4 has no effect on frozen"),
        (["--dry-run", "--blend", "1"], "--blend 1.0 has no effect on batch-renorm"),
        (["-o", "out.safetensors", "--to", "gated", "--blend", "2"], "at most 1.0 for --blend"),
        (["-o", "out.safetensors", "--seeds", "0"], "at least 1 for --seeds"),
        (["-o", "out.safetensors", *SHORT, "--epochs", "2"], "give one"),
        (["-o", "out.safetensors", "--report", "none.json"], "none.json does not exist"),
        (["-o", "out.safetensors", "--report", "model.py"], "not a JSON report"),
    ],
)
def test_what_cannot_be_done_is_said(repairable: Workspace, arguments: list[str], expected: str) -> None:
    assert expected in repairable.run("convert", *TARGET, *arguments).error()
    assert files(repairable) == set()


@pytest.mark.parametrize(
    ("change", "spec", "expected"),
    [
        (("def loss", "def other"), "", "needs a training loss"),
        (("def load_eval_data", "def other"), "", "held-out data"),
        (None, "train: {optimizer: {target: Addam}}", 'no optimizer "Addam"'),
        (None, "train: {optimizer: {target: SGD, args: {lr: 0.1, speed: 3}}}", "speed"),
        (None, "train: {schedule: {target: StepLRs}}", "StepLR"),
        (("return nn.functional.cross_entropy(model(batch[0]), batch[1])", "return 1.0"), "", "tensor of one number"),
        (("return nn.functional.cross_entropy(model(batch[0]), batch[1])", "raise KeyError(3)"), "", "KeyError"),
    ],
)
def test_what_fine_tuning_lacks_is_said(
    repairable: Workspace, change: tuple[str, str] | None, spec: str, expected: str
) -> None:
    if change:
        repairable.write("model.py", REPAIRABLE.replace(*change))
    repairable.write("spec.yaml", f"model: model.py\ndata: {{batch_size: 4}}\n{spec}\n")
    message = repairable.run("convert", "spec.yaml", *SHORT, "-o", "out.safetensors").error()
    assert expected in message
    assert not (repairable.folder / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("def metric", "def other"), "it needs metric(model, batch)"),
        (("return Net()", "return nn.DataParallel(Net())"), "wrapped"),
    ],
)
def test_what_can_only_fail_is_refused_before_training(
    repairable: Workspace, change: tuple[str, str], expected: str
) -> None:
    repairable.write("model.py", REPAIRABLE.replace(*change))
    arguments = (*TARGET, *SHORT, "--require", "metric>0.5", "-o", "out.safetensors")
    assert expected in repairable.run("convert", *arguments).error()
    assert files(repairable) == set()


def test_a_wrapped_model_has_no_plan(repairable: Workspace) -> None:
    repairable.write("model.py", REPAIRABLE.replace("return Net()", "return nn.DataParallel(Net())"))
    for which in ((), ("--layers", "*")):
        assert "wrapped model" in repairable.run("convert", *TARGET, *which, "--check").error()


def test_few_held_out_samples_are_noted(repairable: Workspace) -> None:
    few = REPAIRABLE.replace("return load_data(batch_size)", "return list(load_data(batch_size))[:1]")
    repairable.write("model.py", few)
    assert repairable.run("convert", *TARGET, *SHORT, "-o", "out.safetensors").code == CLEAN
    notes = " ".join(read(repairable, "out.record.json")["notes"])
    assert "only one held-out batch" in notes
    assert "4 held-out samples are too few for a reliable comparison" in notes


def test_a_full_disk_leaves_nothing_half_written(repairable: Workspace) -> None:
    """No file may grow beyond a few kilobytes: the reports are larger."""
    result = run_on_a_full_disk(repairable, "convert", *TARGET, "-o", "out.safetensors", largest_file=4096)
    assert "could not be written" in result.error()
    assert files(repairable) == set()


STALLING = """
import pathlib
import time

score = loss


def loss(model, batch):
    end = time.monotonic() + 120
    while pathlib.Path("stall").exists() and any(pathlib.Path("cut.state").glob("batch-renorm*")):
        assert time.monotonic() < end
        time.sleep(0.02)
    return score(model, batch)
"""
"""A model file whose training goes no further than its first saved state, until a file is taken away."""


def test_a_killed_run_goes_on_to_the_same_files(repairable: Workspace) -> None:
    repairable.write("model.py", REPAIRABLE + STALLING)
    arguments = ("convert", *TARGET, "--finetune", "--steps", "60")
    assert repairable.run(*arguments, "-o", "whole.safetensors").code == CLEAN
    state, stall = repairable.folder / "cut.state", repairable.write("stall", "")
    process = start(repairable, *arguments, "-o", "cut.safetensors")
    wait_for(lambda: any(state.glob("batch-renorm*")) or process.poll() is not None)
    process.kill()
    process.communicate()
    assert state.is_dir()
    message = repairable.run(*arguments, "-o", "cut.safetensors").error()
    assert "--resume" in message
    stall.unlink()
    assert repairable.run(*arguments, "-o", "cut.safetensors", "--resume").code == CLEAN
    assert not state.exists()
    for name in ("safetensors", "log.csv"):
        whole, cut = (repairable.folder / f"{stem}.{name}" for stem in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()


def test_sigterm_saves_and_another_run_cannot_take_the_state(repairable: Workspace) -> None:
    arguments = ("convert", *TARGET, "--finetune", "-o", "out.safetensors")
    process = start(repairable, *arguments, "--steps", "100000")
    log = repairable.folder / "out.state" / "log.csv"
    wait_for(lambda: (log.exists() and log.stat().st_size > 500) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == NOTHING
    assert re.search(r"stopped by SIGTERM after step \d+ of 100000", stderr)
    assert "run the same command with --resume" in stderr
    message = repairable.run(*arguments, "--steps", "100", "--resume").error()
    assert "train.steps was 100000 and is now 100" in message


def test_two_processes_agree_with_one_on_the_same_global_batch(repairable: Workspace) -> None:
    same = ("--finetune", "--steps", "6", "--to", "sync", "--layers", "*")
    arguments = ("convert", "model.py", *same, "--batch-size")
    both = launch_installed(repairable, 2, *arguments, "2", "-o", "two.safetensors").results()
    assert [result.code for result in both] == [CLEAN, CLEAN]
    assert both[1].stdout == both[1].stderr == ""
    assert repairable.run(*arguments, "4", "-o", "one.safetensors").code == CLEAN
    weights = [load_file(repairable.folder / f"{name}.safetensors") for name in ("one", "two")]
    for name in weights[0].keys() - {"bn.num_batches_tracked"}:  # recalibration counts micro-batches
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)
    scores = [arms(read(repairable, f"{name}.record.json"))["sync"]["runs"][0]["score"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def wait_for(condition: Any, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_ctrl_c_in_a_scan_converts_nothing(repairable: Workspace) -> None:
    """A scan takes Ctrl-C for a wish to see what there is; a repair must not go on with that."""
    stalling = (
        REPAIRABLE.replace("def load_data", "def _unused", 1)
        + """

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 400

    def __getitem__(self, index):
        import pathlib, time
        if index > 200:
            pathlib.Path("begun").touch()
            time.sleep(0.2)
        return images()[index % 64], 0


def load_data(batch_size):
    return DataLoader(Slow(), batch_size=batch_size)
"""
    )
    repairable.write("model.py", stalling)
    process = start(repairable, "convert", *TARGET, "--batches", "100", "-o", "out.safetensors")
    wait_for(lambda: (repairable.folder / "begun").exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (NOTHING, "")
    assert stderr.strip() == "bnprobe: error: Interrupted."
    assert files(repairable) == {"begun"}


def test_layers_that_cannot_be_converted_are_no_success(repairable: Workspace) -> None:
    other = "class Odd(nn.BatchNorm2d):\n    def forward(self, x):\n        return 2 * super().forward(x)\n\n\n"
    source = REPAIRABLE.replace("class Net", f"{other}class Net").replace("nn.BatchNorm2d(2)", "Odd(2)")
    repairable.write("model.py", source)
    message = repairable.run("convert", *TARGET, "-o", "out.safetensors").error()
    assert message.startswith("No layer can be converted to batch-renorm: bn (Odd)")
    assert repairable.run("convert", *TARGET, "--check").code == FINDINGS


def test_state_that_is_no_tensor_is_left_out_and_named(repairable: Workspace) -> None:
    extra = "    get_extra_state = lambda self: {'calls': 3}\n    set_extra_state = lambda self, state: None\n\n"
    source = REPAIRABLE.replace("    def forward(self, x):", f"{extra}    def forward(self, x):", 1)
    repairable.write("model.py", source)
    assert repairable.run("convert", *TARGET, *SHORT, "-o", "out.safetensors").code == CLEAN
    notes = read(repairable, "out.record.json")["notes"]
    assert any("that are not tensors" in note and "_extra_state" in note for note in notes)


def test_another_loss_cannot_go_on_with_a_state(repairable: Workspace) -> None:
    arguments = ("convert", *TARGET, "--finetune", "--steps", "100000", "--layers", "*", "-o", "out.safetensors")
    process = start(repairable, *arguments)
    log = repairable.folder / "out.state" / "log.csv"
    wait_for(lambda: (log.exists() and log.stat().st_size > 500) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    repairable.write("model.py", REPAIRABLE.replace("cross_entropy(", "multi_margin_loss("))
    message = repairable.run(*arguments, "--resume").error()
    assert "different repair: code was " in message


def test_a_smaller_metric_can_be_better(repairable: Workspace) -> None:
    repairable.write("model.py", REPAIRABLE.replace("== batch[1]).float()", "!= batch[1]).float()"))
    found = repairable.run("convert", *TARGET, *SHORT, "--goal", "min", "-o", "out.safetensors", *JSON)
    record = json.loads(found.stdout)
    assert record["settings"]["repair"]["goal"] == "min"
    ours, control = (arms(record)[name]["metric"]["mean"] for name in ("batch-renorm", record["proof"]["control"]))
    assert record["proof"]["gain"]["mean"] == pytest.approx(control - ours)


def test_weights_that_plain_bn_must_not_load_are_refused_there(repairable: Workspace) -> None:
    made = repairable.run("convert", *TARGET, "--to", "instance-renorm", "--blend", "0.75", "-o", "out.safetensors")
    assert made.code == CLEAN
    message = repairable.run("scan", *TARGET, "--checkpoint", "out.safetensors").error()
    assert "converted to instance-renorm, but bn is BatchNorm2d in this model" in message
    assert 'bnprobe.convert(model, [...], to="instance-renorm", blend=0.75)' in message


def test_weights_that_a_layer_with_other_settings_must_not_load_are_refused_there(repairable: Workspace) -> None:
    made = repairable.run("convert", *TARGET, "--to", "example-weighing", "--blend", "0.75", "-o", "out.safetensors")
    assert made.code == CLEAN
    for blend, code in ((0.5, ERROR), (0.75, CLEAN)):
        call = f'bnprobe.convert(Net(), to="example-weighing", blend={blend})'
        repairable.write("model.py", "import bnprobe\n" + REPAIRABLE.replace("return Net()", f"return {call}"))
        options = ("--checkpoint", "out.safetensors", "--to", "torch-export", "-o", f"net-{blend}.pt2")
        found = repairable.run("export", *TARGET, *options)
        assert found.code == code, found.stderr
        assert ("bn has blend 0.5 in this model and 0.75 in the file" in found.stderr) == (code == ERROR)


def test_the_error_exit_code_is_two(repairable: Workspace) -> None:
    assert repairable.run("convert", "none.py", "--check").code == ERROR
    assert not list(Path(repairable.folder).glob("*.state"))


FITTED = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def data(seed, count):
    chance = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(count, 6, generator=chance) + 2
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 4).long())


def load_model():
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2))


def load_data(batch_size=32):
    return DataLoader(data(0, 1024), batch_size, shuffle=True)


def load_eval_data(batch_size=32):
    return DataLoader(data(1, 512), batch_size)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def metric(model, batch):
    return (model(batch[0]).argmax(1) == batch[1]).float().mean()
"""
"""A small network on rows of numbers."""


@cache
def trained(statistics_from: int | None) -> dict[str, torch.Tensor]:
    """Weights of a training in eval mode with the statistics of its first so many steps; None: in train mode."""
    names: dict[str, Any] = {}
    exec(FITTED, names)
    torch.manual_seed(0)
    model = names["load_model"]()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model.train()
    for step in range(400):
        if step == statistics_from:
            model.eval()
        for batch in [next(iter(names["load_data"]()))]:
            optimizer.zero_grad()
            names["loss"](model, batch).backward()
            optimizer.step()
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def fitted(workspace: Workspace, statistics_from: int | None = None) -> None:
    """Write the network and its ``trained`` weights."""
    workspace.write("model.py", FITTED)
    torch.save(trained(statistics_from), workspace.folder / "w.pt")


TRAINED = ("model.py", "--checkpoint", "w.pt", "--batch-size", "32", "-o", "out.safetensors")


def test_weights_trained_in_eval_mode_are_frozen_with_the_statistics_that_they_belong_to(workspace: Workspace) -> None:
    fitted(workspace, statistics_from=3)
    found = workspace.run("convert", *TRAINED, "--to", "frozen", *JSON)
    assert found.code == CLEAN
    record = json.loads(found.stdout)
    before = torch.load(workspace.folder / "w.pt")
    weights = load_file(workspace.folder / "out.safetensors")
    assert all(torch.equal(weights[name], before[name]) for name in ("1.running_mean", "1.running_var"))
    assert (record["recalibrated"], record["proof"]["surely_worse"]) == ([], False)
    assert any("not recalibrated first, because as loaded they score better" in note for note in record["notes"])
    scores = {name: arm["metric"]["mean"] for name, arm in arms(record).items()}
    assert scores["frozen"] == scores["as is"] > scores["recalibrated"] + 0.05


def test_weights_trained_in_train_mode_are_frozen_with_recalibrated_statistics(workspace: Workspace) -> None:
    fitted(workspace)
    found = workspace.run("convert", *TRAINED, "--to", "frozen", "--layers", "*", *JSON)
    assert found.code == CLEAN
    assert json.loads(found.stdout)["recalibrated"] == ["1"]


def test_weights_that_score_worse_than_as_loaded_are_not_written_without_force(workspace: Workspace) -> None:
    fitted(workspace)
    command = ("convert", *TRAINED, "--to", "group-norm", "--layers", "*")
    found = workspace.run(*command)
    assert found.code == FINDINGS
    assert files(workspace) == {"w.pt"}
    said = " ".join(found.stdout.split())
    assert "Nothing was written: the repaired model scores worse than the model as loaded, metric 0." in said
    assert "Training may help (--finetune). --force writes the others all the same." in said
    assert "No weights were written." in said
    forced = workspace.run(*command, "--force")
    assert forced.code == CLEAN
    assert "Written because of --force: the repaired model scores worse" in " ".join(forced.stdout.split())
    assert "out.safetensors" in files(workspace)


DOMAINS = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import bnprobe


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 16)
        self.bn = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.bn(self.body(x)).relu())


def data(seed, count):
    # Batches of 16 of one camera each; the second shifts and stretches what it sees.
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 4, generator=generator), torch.randint(0, 2, (count,), generator=generator)
    x[:, 0] += 3.0 * y - 1.5
    camera = torch.arange(count) // 16 % 2
    x = torch.where(camera[:, None] == 1, 10 + 5 * x, x)
    return TensorDataset(x, y, camera)


def load_data(batch_size):
    return DataLoader(data(0, 512), batch_size)


def load_eval_data(batch_size):
    return DataLoader(data(1, 256), batch_size)


def load_model():
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(5):
        for x, y, _ in load_data(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net


def forward(model, batch):
    with bnprobe.nn.domain(batch[2]):
        return model(batch[0])


def loss(model, batch):
    return nn.functional.cross_entropy(forward(model, batch), batch[1])


def metric(model, batch):
    return float((forward(model, batch).argmax(1) == batch[1]).float().mean())
"""
PER_DOMAIN = ("model.py", "--batch-size", "16", "--layers", "*", "--to", "per-domain", "-o", "out.safetensors")


def test_statistics_per_domain_mend_a_model_of_two_domains(workspace: Workspace) -> None:
    workspace.write("model.py", DOMAINS)
    assert workspace.run("convert", *PER_DOMAIN, "--goal", "max").code == CLEAN
    record = read(workspace, "out.record.json")
    assert record["plan"]["changes"][0]["to"] == "DomainBatchNorm1d"
    assert not record["plan"]["deploys"]
    assert record["flagged_after"] is None  # a scan does not measure the layer
    assert record["proof"]["conclusion"] == "better"
    scores = {name: arm["metric"]["mean"] for name, arm in arms(record).items()}
    assert scores["per-domain"] > scores["recalibrated"] + 0.15
    weights = load_file(workspace.folder / "out.safetensors")
    assert (weights["bn.domain_mean"][0] - weights["bn.domain_mean"][1]).abs().max() > 1


@pytest.mark.parametrize("selected", [("--layers", "*"), ()])
def test_a_model_file_that_names_no_domain_is_told_before_the_scan(workspace: Workspace, selected: list[str]) -> None:
    silent = DOMAINS.replace("with bnprobe.nn.domain(batch[2]):", "if open('calls', 'a').write('x'):")
    workspace.write("model.py", silent)
    size = ("--batch-size", "16")
    found = workspace.run("convert", "model.py", *size, *selected, "--to", "per-domain", "-o", "out.safetensors")
    assert "per-domain: forward(model, batch) cannot run the converted model." in found.error()
    assert len((workspace.folder / "calls").read_text()) <= 4


def test_a_model_file_that_names_no_domain_is_told_before_training(workspace: Workspace) -> None:
    workspace.write(
        "model.py", DOMAINS.replace("bnprobe.nn.domain(batch[2])", "__import__('contextlib').nullcontext()")
    )
    found = workspace.run("convert", *PER_DOMAIN, *SHORT)
    assert "per-domain: forward(model, batch) cannot run the converted model." in found.error()
    assert "with bnprobe.nn.domain(index):" in found.error()
    workspace.write("model.py", DOMAINS.replace("domain(batch[2])", "domain(batch[2] + 1)"))
    assert "has 2 domains, counted from 0, but was asked for 2" in workspace.run("convert", *PER_DOMAIN, *SHORT).error()


CONVOLVED = REPAIRABLE.replace("self.bn(x)", "self.bn(self.conv(x))").replace(
    "        self.bn = ", "        self.conv = nn.Conv2d(2, 2, 3)\n        self.bn = "
)
CROSS = ("convert", *TARGET, *SHORT, *ACCURACY, "--to", "cross-iteration", "--window", "4", "--burn-in", "2")


def test_layers_that_follow_their_convolution_deploy_as_plain_bn(workspace: Workspace) -> None:
    workspace.write("model.py", CONVOLVED)
    found = workspace.run(*CROSS, "-o", "out.safetensors")
    assert found.code == CLEAN, found.stderr
    record = read(workspace, "out.record.json")
    assert record["plan"]["changes"][0]["to"] == "CrossIterationBatchNorm2d"
    assert record["plan"]["deploys"]
    assert record["flagged_after"] is None  # a scan does not measure the layer
    repair = record["settings"]["repair"]
    assert (repair["window"], repair["burn_in"]) == (4, 2)
    users: dict[str, Any] = {}
    exec(CONVOLVED, users)
    net = users["load_model"]()
    weights = load_file(workspace.folder / "out.safetensors")
    before = net.state_dict()["conv.weight"].clone()
    net.load_state_dict(weights, strict=True)
    assert not torch.equal(net.conv.weight, before)
    spec = "model: model.py\ndata: {batch_size: 4}\nrepair: {to: cross-iteration, window: 4, burn_in: 2, goal: max}\n"
    workspace.write("spec.yaml", spec)
    assert workspace.run("convert", "spec.yaml", *SHORT, "-o", "again.safetensors").code == CLEAN
    again = load_file(workspace.folder / "again.safetensors")
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_layers_without_a_convolution_before_are_refused_with_the_reason(repairable: Workspace) -> None:
    message = repairable.run(*CROSS, "-o", "out.safetensors").error()
    assert "No layer can be converted to cross-iteration: bn (BatchNorm2d) normalizes an input of the model" in message
    for option, to in (("--burn-in", "mabn"), ("--window", "ghost"), ("--blend", "cross-iteration")):
        message = repairable.run("convert", *TARGET, "--to", to, option, "1", "--dry-run").error()
        assert f"{option} 1" in message
        assert f"has no effect on {to}" in message
