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

from functional.command import CLEAN, ERROR, FINDINGS, MODEL, NOTHING, SHIFTED, TIMEOUT, Result, Workspace
from functional.processes import run_on_a_full_disk, start

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
        ("", ("--path", "test"), ERROR, "'test' is not one of 'train', 'eval'"),
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
