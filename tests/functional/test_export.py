"""``bnprobe export``: a file that was checked, or none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from functional.command import CLEAN, FINDINGS, MODEL, Result, Workspace
from functional.processes import run_on_a_full_disk

BRANCH = MODEL.replace(
    "        return self.head",
    "        if float(x[0, 0, 0, 0]) > 0:\n            return self.head(x.mean((2, 3))) + len(repr(lambda: None))\n"
    "        return self.head",
)
"""A decision on the data that TorchScript can neither trace nor script."""


@pytest.fixture
def model(workspace: Workspace) -> Workspace:
    workspace.write("model.py", MODEL)
    return workspace


def export(workspace: Workspace, *options: str | Path) -> Result:
    return workspace.run("export", "model.py", "--batch-size", "4", *options)


def exported(workspace: Workspace) -> set[str]:
    return {path.name for path in workspace.folder.iterdir() if path.suffix not in (".py", ".safetensors")}


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("torch-export", "net.pt2"),
        ("torchscript", "net.pt"),
        pytest.param(
            "onnx",
            "net.onnx",
            marks=pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="no onnxruntime"),
        ),
    ],
)
def test_each_format(model: Workspace, to: str, name: str) -> None:
    found = export(model, "--to", to, "-o", name)
    assert (found.code, found.stderr) == (CLEAN, "")
    assert "largest absolute difference" in found.stdout
    assert "largest relative difference" in found.stdout
    assert "5 batches of 4, 8, 1 samples" in found.stdout
    assert f"The outputs agree within 1e-05: written to {name}." in found.stdout
    assert exported(model) == {name}


def test_recalibrated_weights_are_exported_beside_them(model: Workspace) -> None:
    model.write("model.py", MODEL.replace("SHIFT = 0.0", "SHIFT = 3.0"))
    assert model.run("recalibrate", "model.py", "--batch-size", "4", "-o", "out.safetensors").code == CLEAN
    found = export(model, "--checkpoint", "out.safetensors")
    assert found.code == CLEAN
    program = torch.export.load(model.folder / "out.pt2").module()
    outputs = [program(torch.full((5, 2, 8, 8), value)) for value in (3.0, 0.0)]
    assert not torch.allclose(*outputs)
    assert float(program.bn.running_mean.mean()) == pytest.approx(3, abs=0.1)


def test_quantized(model: Workspace) -> None:
    if importlib.util.find_spec("torch.ao.quantization.quantize_fx") is None:
        pytest.skip("this torch has no torch.ao quantization")
    found = export(model, "--to", "torchscript", "--quantize", "-o", "net.pt")
    assert (found.code, found.stderr) == (CLEAN, "")
    assert "torchscript, quantized to 8 bits" in found.stdout
    assert "Outputs of the quantized model against those of the model as loaded" in found.stdout


def test_outputs_that_differ_are_findings_and_nothing_is_written(model: Workspace) -> None:
    model.write("model.py", BRANCH)
    model.write("net.pt", "old")
    found = export(model, "--to", "torchscript", "-o", "net.pt", "--force")
    assert found.code == FINDINGS
    assert "above the tolerance of 1e-05: nothing was written." in " ".join(found.stdout.split())
    assert (model.folder / "net.pt").read_text() == "old"
    again = export(model, "--to", "torchscript", "-o", "net.pt", "--force", "--tolerance", "1000000")
    assert again.code == CLEAN


def test_an_existing_file_is_kept_without_force(model: Workspace) -> None:
    model.write("model.py", "raise RuntimeError('loaded')")
    model.write("net.pt2", "old")
    assert export(model, "-o", "net.pt2").error() == (
        "net.pt2 already exists; give another -o, or --force to overwrite."
    )


def test_the_checkpoint_is_never_replaced(model: Workspace) -> None:
    """Its own name is what the exported file would get by default."""
    torch.save({}, model.folder / "net.pt")
    before = (model.folder / "net.pt").read_bytes()
    found = export(model, "--checkpoint", "net.pt", "--to", "torchscript", "--force")
    assert found.error() == "-o net.pt is a file that this command reads; give another name."
    assert (model.folder / "net.pt").read_bytes() == before


def test_a_disk_that_is_full(model: Workspace) -> None:
    arguments = ("export", "model.py", "--batch-size", "4", "-o", "net.pt2")
    found = run_on_a_full_disk(model, *arguments, largest_file=512)
    assert "File too large" in found.error()
    assert exported(model) == set()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "export writes a file: give -o FILE, or a --checkpoint to name the file after."),
        (("-o", "no/net.pt2"), "The folder no of -o does not exist; create it first."),
        (
            ("-o", "net.pt2", "--quantize"),
            "--quantize uses kernels that torch-export cannot store; give --to torchscript",
        ),
        (("-o", "net.pt2", "--checkpoint", "none.pt"), "The checkpoint none.pt does not exist."),
        (("-o", "net.pt2", "--input-shape", "0"), "--input-shape"),
    ],
)
def test_bad_options(model: Workspace, options: tuple[str, ...], said: str) -> None:
    assert said in export(model, *options).error()
    assert exported(model) == set()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("\ndef forward(model, batch):\n    return model.bn(batch[0])\n", "calls only parts of the model"),
        (
            "\ndef forward(model, batch):\n    raise ValueError('no')\n",
            "ValueError while calling forward(model, batch)",
        ),
        ("\ndef load_data(batch_size):\n    yield from ()\n", "The data yielded no batch"),
        ("\ndef images():\n    return torch.full((64, 2, 8, 8), torch.nan)\n", "holds NaN or Inf"),
    ],
)
def test_bad_models_and_data(model: Workspace, changes: str, said: str) -> None:
    model.write("model.py", MODEL + changes)
    assert said in export(model, "-o", "net.pt2").error()
    assert exported(model) == set()


def test_a_model_that_cannot_be_exported(model: Workspace) -> None:
    model.write("model.py", BRANCH)
    message = export(model, "-o", "net.pt2").error()
    assert message.startswith("Net could not be exported as torch-export (")
    assert message.endswith("Another format may do (--to).")
