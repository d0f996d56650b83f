"""``bnprobe recalibrate``: statistics of the data, everything proved and written beside the weights, or nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bnprobe.measure import population
from functional.command import CLEAN, ERROR, FINDINGS, MODEL, NOTHING, SHIFTED, TIMEOUT, Result, Workspace
from functional.processes import run_on_a_full_disk, start
from functional.test_convert import FITTED, TRAINED, fitted

SCORED = (
    SHIFTED
    + """

def load_eval_data(batch_size):
    return DataLoader(TensorDataset(images()), batch_size=batch_size)


def loss(model, batch):
    return model.bn(batch[0]).square().mean()
"""
)
FILES = {"out.safetensors", "out.record.json", "out.before.json", "out.after.json"}


@pytest.fixture
def shifted(workspace: Workspace) -> Workspace:
    workspace.write("model.py", SCORED)
    return workspace


def recalibrate(workspace: Workspace, *options: str | Path) -> Result:
    return workspace.run("recalibrate", "model.py", "--batch-size", "2", "-o", "out.safetensors", *options)


def written(workspace: Workspace) -> set[str]:
    return {path.name for path in workspace.folder.iterdir() if path.name.startswith(("out.", ".out"))}


def record(workspace: Workspace) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((workspace.folder / "out.record.json").read_text())
    return found


def images() -> torch.Tensor:
    return torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 3


OWN_NORM = (
    SHIFTED
    + """

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("power", torch.ones(2))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.average, self.power, training=self.training)


class OwnNet(Net):
    def __init__(self):
        super().__init__()
        self.bn = Own()


def load_model():
    return OwnNet()
"""
)


def test_a_model_whose_only_norms_are_found_by_running_it(workspace: Workspace) -> None:
    workspace.write("model.py", OWN_NORM)
    assert recalibrate(workspace).code in (CLEAN, FINDINGS)
    torch.testing.assert_close(load_file(workspace.folder / "out.safetensors")["bn.average"], images().mean((0, 2, 3)))


TWO_NORMS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.conv, self.last = nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.last(self.conv(self.bn(x))).mean((2, 3))
"""


def test_the_eval_path_says_in_how_many_passes_it_ran(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.write("model.py", SCORED + TWO_NORMS)
    told = [" ".join(recalibrate(workspace, "--path", "eval").stdout.split())]
    monkeypatch.setattr(population, "LARGEST", 0)
    told.append(" ".join(recalibrate(workspace, "--path", "eval", "--force").stdout.split()))
    assert "(eval path: in one pass, with the new statistics of earlier layers in every layer)" in told[0]
    assert "(eval path: in 2 passes, with the new statistics of earlier layers in every layer)" in told[1]


@pytest.mark.parametrize("path", ["train", "eval"])
def test_a_model_with_statistics_of_other_data_is_mended(shifted: Workspace, path: str) -> None:
    found = recalibrate(shifted, "--path", path)
    assert found.code == CLEAN
    assert written(shifted) == FILES
    weights = load_file(shifted.folder / "out.safetensors")
    values = images().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(weights["bn.running_mean"].double(), values.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights["bn.running_var"].double(), values.var(1), rtol=1e-6, atol=1e-6)
    assert int(weights["bn.num_batches_tracked"]) == 32
    assert "Flagged layers: 1 → 0." in found.stdout
    assert "The statistics are those of 64 samples in 32 batches" in " ".join(found.stdout.split())


@pytest.mark.parametrize("asked", [False, True])
def test_other_remedies_are_tried_only_where_the_spec_asks_for_that(shifted: Workspace, asked: bool) -> None:
    """In the scans before and after; the statistics that are written are compared with those as loaded in any case."""
    shifted.write(
        "spec.yaml", f"model: model.py\ndata: {{batch_size: 2}}\nscan: {{what_if: {'true' if asked else 'null'}}}\n"
    )
    assert shifted.run("recalibrate", "spec.yaml", "-o", "out.safetensors").code == CLEAN
    for name in ("before", "after"):
        report = json.loads((shifted.folder / f"out.{name}.json").read_text())
        assert bool(report["remedies"]) == asked
    assert record(shifted)["proof"]["conclusion"] == "better"


def test_the_weights_load_strictly_into_the_users_model(shifted: Workspace) -> None:
    assert recalibrate(shifted).code == CLEAN
    names: dict[str, Any] = {}
    exec(MODEL, names)
    model = names["load_model"]()
    model.load_state_dict(load_file(shifted.folder / "out.safetensors"), strict=True)
    again = shifted.run("scan", "model.py", "--batch-size", "2", "--checkpoint", "out.safetensors")
    assert again.code == CLEAN


def test_the_record_says_what_was_done_and_what_it_gave(shifted: Workspace) -> None:
    assert recalibrate(shifted).code == CLEAN
    found = record(shifted)
    assert (found["action"], found["recalibrated"], found["plan"]) == ("recalibrate", ["bn"], None)
    assert (found["flagged_before"], found["flagged_after"]) == (1, 0)
    assert found["command"] == "bnprobe recalibrate model.py --batch-size 2 -o out.safetensors"
    assert found["weights"] == "out.safetensors"
    proof = found["proof"]
    assert (proof["measure"], proof["control"], proof["conclusion"]) == ("loss", "as is", "better")
    before, after = (arm["loss"]["mean"] for arm in proof["arms"])
    assert before == pytest.approx(10, rel=0.05)
    assert after == pytest.approx(1, rel=0.01)
    assert proof["gain"]["mean"] == pytest.approx(before - after)
    assert proof["images_proving"] == 64


def test_the_two_scans_are_verified(shifted: Workspace) -> None:
    assert recalibrate(shifted).code == CLEAN
    found = shifted.run("verify", "out.before.json", "out.after.json")
    assert found.code == CLEAN
    assert "1 of 1 layer flagged before, none after" in found.stdout


def test_json_is_the_record(shifted: Workspace) -> None:
    found = recalibrate(shifted, "--format", "json")
    assert found.code == CLEAN
    assert json.loads(found.stdout) == record(shifted)


@pytest.mark.parametrize(("options", "code"), [((), FINDINGS), (("--exit-zero",), CLEAN)])
def test_layers_that_are_still_flagged_are_findings(shifted: Workspace, options: tuple[str, ...], code: int) -> None:
    shifted.write("model.py", SHIFTED)  # without a loss it is not known to do no harm
    found = recalibrate(shifted, "--threshold", "1000000", *options)
    assert found.code == code
    assert "still flagged" in found.stdout
    assert written(shifted) == FILES


def test_a_few_batches_of_all_data(shifted: Workspace) -> None:
    assert recalibrate(shifted, "--batches", "5", "--max-batches", "16").code == CLEAN
    assert int(load_file(shifted.folder / "out.safetensors")["bn.num_batches_tracked"]) == 5


def test_statistics_that_are_not_numbers_are_mended(shifted: Workspace) -> None:
    shifted.write(
        "model.py",
        SCORED.replace("return Net()", "net = Net()\n    net.bn.running_mean.fill_(float('nan'))\n    return net"),
    )
    found = recalibrate(shifted)
    assert found.code == CLEAN
    assert written(shifted) == FILES
    assert (record(shifted)["flagged_before"], record(shifted)["flagged_after"]) == (1, 0)


# ---- outputs


def test_existing_files_are_kept_without_force(shifted: Workspace) -> None:
    shifted.write("model.py", SCORED + "\nimport pathlib\npathlib.Path('loaded').touch()\n")
    shifted.write("out.after.json", "old")
    message = recalibrate(shifted).error()
    assert message == "out.after.json already exists; give another -o, or --force to overwrite."
    assert not (shifted.folder / "loaded").exists()
    assert recalibrate(shifted, "--force").code == CLEAN
    assert json.loads((shifted.folder / "out.after.json").read_text())["summary"]["flagged"] == 0


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("no/out.safetensors", "The folder no of -o does not exist; create it first."),
        (".", "-o . is a folder; give a file in it."),
        pytest.param(
            "locked/out.safetensors",
            "The folder locked of -o cannot be written to.",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere"),
        ),
    ],
)
def test_a_bad_output_is_known_before_anything_runs(shifted: Workspace, output: str, said: str) -> None:
    shifted.write("model.py", "raise RuntimeError('loaded')")
    (shifted.folder / "locked").mkdir(mode=0o555)
    found = shifted.run("recalibrate", "model.py", "--batch-size", "2", "-o", output)
    assert found.error() == said


def test_a_disk_that_is_full_leaves_what_was_there(shifted: Workspace) -> None:
    shifted.write("out.record.json", "old")
    arguments = ("recalibrate", "model.py", "--batch-size", "2", "-o", "out.safetensors", "--force")
    found = run_on_a_full_disk(shifted, *arguments, largest_file=4096)  # the reports are larger, the weights are not
    assert "could not be written: File too large. No file was changed." in found.error()
    assert written(shifted) == {"out.record.json"}
    assert (shifted.folder / "out.record.json").read_text() == "old"


# ---- bad input: nothing is written


@pytest.mark.parametrize(
    ("changes", "options", "code", "said"),
    [
        ("", ("--layers", "nb"), ERROR, 'The glob "nb" matches no BN layer of the model; the nearest name is "bn".'),
        ("", ("--batches", "0"), ERROR, "Invalid value for '--batches'"),
        ("", ("--path", "test"), ERROR, "'test' is not one of 'auto', 'train', 'eval'"),
        ("", ("--select", "BN999"), ERROR, "BN999"),
        ("", ("--checkpoint", "none.pt"), ERROR, "The checkpoint none.pt does not exist."),
        ("", ("--device", "cuda:99"), ERROR, "The device 'cuda:99' cannot be used"),
        (
            "\ndef load_data(batch_size):\n    yield images()[:2]\n    raise OSError('disk gone')\n",
            (),
            ERROR,
            "OSError while drawing batch 2",
        ),
        ("\ndef images():\n    return torch.full((64, 2, 8, 8), torch.nan)\n", (), ERROR, "holds NaN or Inf"),
        ("\ndef load_data(batch_size):\n    return []\n", (), ERROR, "load_data of model.py is empty"),
        ("\nNet.train = lambda self, mode=True: nn.Module.train(self, False)\n", (), ERROR, "No layer can be recalib"),
        ("\ndef load_model():\n    return nn.Linear(2, 2)\n", (), NOTHING, "has no Batch Normalization layer"),
    ],
)
def test_bad_input(shifted: Workspace, changes: str, options: tuple[str, ...], code: int, said: str) -> None:
    shifted.write("model.py", SCORED + changes)
    found = recalibrate(shifted, *options)
    assert found.code == code
    assert said in " ".join(found.stderr.replace("│", " ").split())
    assert "Traceback" not in found.stderr
    assert found.stdout == ""
    assert written(shifted) == set()


def test_made_up_data_is_refused(workspace: Workspace) -> None:
    workspace.write("bnprobe.yaml", "model: {target: model.py}\ndata: {input_shape: [2, 8, 8], batch_size: 2}\n")
    workspace.write("model.py", MODEL.replace("def load_data", "def unused"))
    found = workspace.run("recalibrate", "bnprobe.yaml", "-o", "out.safetensors")
    assert found.error().startswith("Recalibration needs real data")
    assert written(workspace) == set()


READ_ONCE = """
import pathlib
import time

CALLS = []


def load_data(batch_size):
    CALLS.append(batch_size)
    return reading(len(CALLS), batch_size)


def reading(call, batch_size):
    yield from images().split(batch_size)
    if call == STALLING:
        pathlib.Path("stalled").touch()
        time.sleep(600)


def load_eval_data(batch_size):
    return list(images().split(batch_size))


def loss(model, batch):
    return model.bn(batch).square().mean()

"""


def test_data_that_can_be_read_only_once_is_loaded_anew(shifted: Workspace) -> None:
    shifted.write("model.py", SCORED + READ_ONCE + "STALLING = 0\n")
    assert recalibrate(shifted).code == CLEAN
    assert int(load_file(shifted.folder / "out.safetensors")["bn.num_batches_tracked"]) == 32


def test_ctrl_c_while_recalibrating_writes_nothing(shifted: Workspace) -> None:
    """The data is loaded for the first scan, and then for the statistics."""
    shifted.write("model.py", SCORED + READ_ONCE + "STALLING = 2\n")
    run = start(shifted, "recalibrate", "model.py", "--batch-size", "2", "-o", "out.safetensors")
    try:
        end = time.monotonic() + TIMEOUT
        while not (shifted.folder / "stalled").exists():
            assert run.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        stdout, stderr = run.communicate(timeout=TIMEOUT)
    finally:
        run.kill()
    assert (run.returncode, stdout) == (NOTHING, "")
    assert stderr.strip() == "bnprobe: error: Interrupted."
    assert written(shifted) == set()


# ---- what reports advise, carried out


def test_statistics_that_score_worse_than_those_as_loaded_are_not_written_without_force(workspace: Workspace) -> None:
    """Weights that were trained in eval mode belong to the running statistics that they have."""
    fitted(workspace, statistics_from=3)
    found = workspace.run("recalibrate", *TRAINED)
    assert found.code == FINDINGS
    assert written(workspace) == set()
    said = " ".join(found.stdout.split())
    assert "The recalibrated model is worse than the model as it is." in said
    assert "Nothing was written: the recalibrated model scores worse than the model as loaded, metric 0." in said
    assert "repaired" not in said
    assert "Nothing was written" in found.stderr
    forced = workspace.run("recalibrate", *TRAINED, "--force")
    assert "Written because of --force" in " ".join(forced.stdout.split())
    assert record(workspace)["proof"]["surely_worse"] is True


def test_without_held_out_data_training_data_decides(workspace: Workspace) -> None:
    fitted(workspace, statistics_from=3)
    workspace.write("model.py", FITTED.replace("def load_eval_data", "def unused"))
    found = workspace.run("recalibrate", *TRAINED, "--format", "json")
    assert (found.code, written(workspace)) == (FINDINGS, set())
    proof = json.loads(found.stdout)["proof"]
    assert (proof["scored_on"], proof["images_proving"], proof["surely_worse"]) == ("training", 1024, True)


def test_a_checkpoint_of_parameters_alone_gets_statistics(workspace: Workspace) -> None:
    fitted(workspace)
    whole = torch.load(workspace.folder / "w.pt")
    parameters = {name: value for name, value in whole.items() if "running" not in name and "tracked" not in name}
    torch.save(parameters, workspace.folder / "w.pt")
    scan = workspace.run("scan", *TRAINED[:-2]).error()
    assert "compute them from training data with `bnprobe recalibrate`, which accepts this file" in scan
    found = workspace.run("recalibrate", *TRAINED, "--format", "json")
    assert found.code == CLEAN
    made = json.loads(found.stdout)
    assert any("w.pt holds parameters alone: the running statistics of 1 layer" in note for note in made["notes"])
    assert made["proof"]["conclusion"] == "better"
    weights = load_file(workspace.folder / "out.safetensors")
    assert weights.keys() == whole.keys()
    names: dict[str, Any] = {}
    exec(FITTED, names)
    seen = torch.nn.functional.linear(names["data"](0, 1024).tensors[0], whole["0.weight"], whole["0.bias"])
    torch.testing.assert_close(weights["1.running_mean"], seen.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights["1.running_var"], seen.var(0), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_that_lacks_one_of_the_two_statistics_is_refused(workspace: Workspace) -> None:
    fitted(workspace)
    whole = torch.load(workspace.folder / "w.pt")
    torch.save({name: value for name, value in whole.items() if name != "1.running_var"}, workspace.folder / "w.pt")
    assert "Missing (1): 1.running_var." in workspace.run("recalibrate", *TRAINED).error()


def test_layers_without_running_statistics_get_some_and_the_line_to_change_is_named(workspace: Workspace) -> None:
    """What is written is accepted by the other commands as it is, and by the model once the line is changed."""
    fitted(workspace)
    without = FITTED.replace("nn.BatchNorm1d(24)", "nn.BatchNorm1d(24, track_running_stats=False)")
    line = 1 + without[: without.index("track_running_stats")].count("\n")
    workspace.write("model.py", without)
    whole = torch.load(workspace.folder / "w.pt")
    torch.save(
        {name: value for name, value in whole.items() if "run" not in name and "num" not in name},
        workspace.folder / "w.pt",
    )
    found = workspace.run("recalibrate", *TRAINED)
    assert found.code == CLEAN
    said = " ".join(found.stdout.split())
    assert f"remove track_running_stats=False in model.py:{line} (or make it True), and they load." in said
    assert "bnprobe's own commands accept the file as it is (--checkpoint)" in said
    accepted = ("model.py", "--checkpoint", "out.safetensors", "--batch-size", "32")
    assert workspace.run("scan", *accepted).code == CLEAN
    assert (
        workspace.run("convert", *accepted, "--to", "frozen", "--layers", "*", "-o", "frozen.safetensors").code == CLEAN
    )
    assert workspace.run("verify", "out.before.json", "out.after.json").code == CLEAN
    names: dict[str, Any] = {}
    exec(without, names)
    weights = load_file(workspace.folder / "out.safetensors")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        names["load_model"]().load_state_dict(weights)
    exec(FITTED, names)
    names["load_model"]().load_state_dict(weights)


VARYING = """
import torch
from torch import nn


def samples(seed, count):
    chance = torch.Generator().manual_seed(seed)
    for _ in range(count):
        size = int(torch.randint(4, 12, (1,), generator=chance))
        x = torch.randn(1, 3, size, size, generator=chance) + 2
        yield x, (x.mean() > 2).float().reshape(1)


class Loaded(torch.utils.data.Dataset):
    def __init__(self, seed, count):
        self.items = [(x[0], y[0]) for x, y in samples(seed, count)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def load_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1), nn.Flatten(0))


def load_data(batch_size=1):
    return torch.utils.data.DataLoader(Loaded(0, 40), batch_size)


def load_eval_data(batch_size=1):
    return torch.utils.data.DataLoader(Loaded(1, 24), batch_size)


def loss(model, batch):
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])
"""


@pytest.mark.parametrize("command", ["recalibrate", "convert"])
def test_samples_of_different_sizes_are_taken_as_the_loader_gives_them(workspace: Workspace, command: str) -> None:
    workspace.write("model.py", VARYING)
    options = ["--to", "frozen", "--layers", "*"] if command == "convert" else []
    found = workspace.run(
        command, "model.py", "--batch-size", "1", "-o", "out.safetensors", *options, "--format", "json"
    )
    assert found.code in (CLEAN, FINDINGS)
    made = json.loads(found.stdout)
    assert made["proof"]["images_proving"] == 24
    if command == "recalibrate":
        assert any("both paths were tried, and the better one counts: loss" in note for note in made["notes"])


def test_whether_a_smaller_metric_is_better_is_not_guessed_where_nothing_says_so(workspace: Workspace) -> None:
    """As loaded the statistics are those of a new layer, so that they are no alternative either."""
    fitted(workspace)
    state = torch.load(workspace.folder / "w.pt")
    state["1.running_mean"].zero_()
    state["1.running_var"].fill_(1.0)
    torch.save(state, workspace.folder / "w.pt")
    error_rate = FITTED.replace("def loss", "def unused").replace("argmax(1) == batch", "argmax(1) != batch")
    workspace.write("model.py", error_rate)
    found = workspace.run("recalibrate", *TRAINED, "--format", "json")
    assert written(workspace) >= {"out.safetensors"}  # whatever the scan says of a metric that looks worse at inference
    proof = json.loads(found.stdout)["proof"]
    assert (proof["conclusion"], proof["gain"], proof["surely_worse"]) == ("not_compared", None, False)
    again = workspace.run("recalibrate", *TRAINED, "--format", "json", "--goal", "min", "--force")
    assert json.loads(again.stdout)["proof"]["conclusion"] == "better"


RMSE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def data(seed, count):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, 0])


def load_model():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].running_mean.fill_(1.0)
        model[1].weight.copy_(torch.eye(1, 4))
        model[1].bias.zero_()
    return model


def load_data(batch_size=32):
    return DataLoader(data(0, 128), batch_size, shuffle=True)


def load_eval_data(batch_size=32):
    return DataLoader(data(1, 128), batch_size)


def loss(model, batch):
    return (model(batch[0]).squeeze(1) - batch[1]).square().mean()


def metric(model, batch):
    return loss(model, batch).sqrt()
"""
"""A regression whose running means are off, and its RMSE: recalibration lowers loss and metric."""


def test_the_loss_decides_where_it_contradicts_a_metric_of_unstated_goal(workspace: Workspace) -> None:
    workspace.write("model.py", RMSE)
    command = ("recalibrate", "model.py", "--batch-size", "32", "-o", "out.safetensors", "--force")
    found = workspace.run(*command)
    assert found.code == CLEAN
    said = " ".join(found.stdout.split())
    assert "✓ The recalibrated model is better than the model as it is. The loss on the same" in said
    assert "If a smaller metric is better, give --goal min" in said
    stated = workspace.run(*command, "--goal", "min")
    assert stated.code == CLEAN
    assert "is better than the model as it is. The metric on the same" in " ".join(stated.stdout.split())
    assert "--goal" not in stated.stdout


def test_a_metric_that_only_looks_better_does_not_write_weights_that_lose_by_the_loss(workspace: Workspace) -> None:
    """The running means fit the held-out data, not the training data: recalibration raises loss and RMSE."""
    turned = RMSE.replace("fill_(1.0)", "zero_()").replace("data(0, 128)", "data(0, 128, 1.0)")
    workspace.write(
        "model.py", turned.replace("(seed, count)", "(seed, count, shift=0.0)").replace("seed))\n", "seed)) + shift\n")
    )
    found = recalibrate(workspace)
    assert (found.code, written(workspace)) == (FINDINGS, set())
    said = " ".join(found.stdout.split())
    assert "✗ The recalibrated model is worse than the model as it is. The loss on the same" in said
    assert "scores worse than the model as loaded, loss " in said


def test_a_scan_asks_for_the_goal_and_lets_the_loss_judge(workspace: Workspace) -> None:
    workspace.write("model.py", RMSE)
    asks = "give --goal min (repair: {goal: min} in a spec), otherwise --goal max."
    command = ("scan", "model.py", "--batch-size", "32")
    assert asks in " ".join(workspace.run(*command).stdout.split())
    assert "--goal max" not in workspace.run(*command, "--goal", "min").stdout
    workspace.write("model.py", RMSE.replace("loss(model, batch)", "error(model, batch)"))
    alone = " ".join(workspace.run(*command).stdout.split())
    assert (
        "and there is no loss to tell: a larger one is taken to be. If a smaller one is better, give --goal min"
        in alone
    )
