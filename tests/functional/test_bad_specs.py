"""Spec files and options that cannot work: the nearest key, the line."""

from __future__ import annotations

import pytest
import torch

from functional.command import ERROR, MODEL, Workspace

SPEC = "model: model.py\ndata:\n  target: model.py:load_data\n  batch_size: 2\n"

UNUSABLE_SPECS = [
    pytest.param(
        SPEC + "treshold: 3\n",
        'Unknown key "treshold" (spec.yaml, line 5); the nearest known key is "thresholds".',
        id="unknown-key",
    ),
    pytest.param(
        SPEC.replace("  batch_size", "  batchsize"),
        'Unknown key "batchsize" in data (spec.yaml, line 4); the nearest known key is "batch_size".',
        id="unknown-key-in-a-section",
    ),
    pytest.param(
        SPEC.replace("size: 2", "size: two"),
        "Expected a whole number for data.batch_size, but got the text 'two' (spec.yaml, line 4).",
        id="wrong-type",
    ),
    pytest.param(SPEC + "layers: [\n", "spec.yaml, line 6 is not valid YAML", id="bad-yaml"),
    pytest.param(SPEC + "\tloss: x\n", "spec.yaml, line 5 is not valid YAML", id="tab"),
    pytest.param(SPEC + SPEC, 'The key "model" is given twice in spec.yaml, lines 1 and 5.', id="key-given-twice"),
    pytest.param("data: {batch_size: 2}\n", "model is missing: say where the model comes from.", id="no-model"),
    pytest.param("- model.py\n", "spec.yaml, line 1: a spec file must be a mapping (key: value)", id="a-list"),
    pytest.param(
        SPEC + "repair: {to: groupnorm}\n",
        "per-domain, auto (the nearest is group-norm) for repair.to, but got the text 'groupnorm' (spec.yaml, line 5).",
        id="repair-unknown",
    ),
    pytest.param(
        SPEC + "repair: {renorm: {r_max: 0.5}}\n",
        "Expected a number of at least 1.0 for repair.renorm.r_max, but got 0.5 (spec.yaml, line 5).",
        id="repair-limit",
    ),
    pytest.param(
        SPEC + "repair: {require: 'metric>1'}\n",
        "Expected a list for repair.require, but got the text 'metric>1' (spec.yaml, line 5).",
        id="repair-require",
    ),
    pytest.param(
        SPEC + "train: {optimiser: SGD}\n",
        'Unknown key "optimiser" in train (spec.yaml, line 5); the nearest known key is "optimizer".',
        id="train-unknown-key",
    ),
    pytest.param(
        SPEC + "train: {clip_norm: .nan}\n", "Expected a finite number for train.clip_norm, but got nan", id="train-nan"
    ),
    pytest.param(
        SPEC + "thresholds: {'*': -1}\n", "Expected a number above 0.0 for thresholds.*, but got -1", id="bad-threshold"
    ),
]


@pytest.mark.parametrize(("spec", "said"), UNUSABLE_SPECS)
def test_a_spec_that_cannot_be_read_is_explained(workspace: Workspace, spec: str, said: str) -> None:
    workspace.write("spec.yaml", spec)
    assert said in workspace.run("scan", "spec.yaml").error()


UNUSABLE_OPTIONS = [
    pytest.param(["--threshold", "0"], "Expected a number above 0.0 for --threshold, but got 0.0.", id="threshold"),
    pytest.param(["--batches", "0"], "Expected a whole number of at least 1 for --batches, but got 0.", id="batches"),
    pytest.param(
        ["--batch-sizes", "1,x"], "Expected whole numbers and commas (as in 1,2,4) for --batch-sizes", id="sizes"
    ),
    pytest.param(
        ["--input-shape", "3xx"], "Expected whole numbers and commas (as in 1,2,4) for --input-shape", id="shape"
    ),
    pytest.param(["--device", "gpu"], "The device 'gpu' cannot be used: Expected one of cpu, cuda,", id="device"),
]


@pytest.mark.parametrize(("options", "said"), UNUSABLE_OPTIONS)
def test_an_option_that_cannot_work_is_explained(workspace: Workspace, options: list[str], said: str) -> None:
    workspace.write("model.py", MODEL)
    assert said in workspace.scan(*options).error()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_cuda_device_where_there_is_none(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    message = workspace.scan("--device", "cuda").error()
    assert message.startswith("The device 'cuda' cannot be used: ")
    assert message.endswith("This machine has cpu and no CUDA device; use --device cpu.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scan"], "Missing argument 'TARGET'."),
        (["scan", "model.py", "--treshold", "3"], "No such option: --treshold (Possible options: --threshold)"),
        (["scan", "model.py", "--batch-size", "x"], "Invalid value for '--batch-size'"),
        (["scan", "model.py", "--format", "xml"], "Invalid value for '--format'"),
        (["scna"], "No such command 'scna'."),
    ],
)
def test_wrong_usage(workspace: Workspace, arguments: list[str], said: str) -> None:
    found = workspace.run(*arguments)
    assert (found.code, found.stdout) == (ERROR, "")
    assert said in found.stderr
    assert "Usage: bnprobe" in found.stderr
