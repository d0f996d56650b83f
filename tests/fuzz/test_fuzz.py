"""Whatever is in a file or on the command line: a result, or an error of bnprobe's own with a sentence; no traceback.

A few examples run by default; see ``tests/README.md`` for the large run.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bnprobe.commands.verify import verify
from bnprobe.config.load import build_spec
from bnprobe.config.spec import CheckpointSpec, Spec
from bnprobe.errors import BnprobeError
from bnprobe.loading.checkpoint import load_checkpoint
from bnprobe.records import Report, Verification
from bnprobe.repairs import wanted_from_report
from bnprobe.report import FORMATS, RenderOptions, renderer
from bnprobe.report.json import load_as
from bnprobe.training import StateFolder
from bnprobe.training.state import load_state
from functional.command import SHIFTED, Workspace
from fuzz.inputs import CORPUS, TOKENS, as_yaml, changed, nested, saved

EXAMPLES = int(os.environ.get("BNPROBE_FUZZ", "40"))
COMMANDS = int(os.environ.get("BNPROBE_FUZZ_COMMANDS", "6"))
SECONDS = 20.0
"""A command that has work for longer is interrupted."""

fuzzed = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
whole = settings(max_examples=COMMANDS, suppress_health_check=list(HealthCheck))

Folder = Iterator[Path]


@pytest.fixture(scope="module")
def folder() -> Folder:
    """One folder for all examples of a test: what they write, the next one writes over."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def survives(call: Callable[[], Any]) -> Any:
    """What a call gives; None where it raises an error of bnprobe's own, which must say something."""
    try:
        return call()
    except BnprobeError as error:
        said = str(error)
    assert len(said) > 10
    assert "Traceback" not in said
    return None


KEYS = st.sampled_from(
    [*Spec.model_fields, "target", "args", "path", "layers", "rules", "lr", "norms", "exempt", "renorm"]
)
JSON = nested(st.text(max_size=3)).map(lambda value: json.dumps(value, default=str).encode())
SPEC = nested(KEYS | st.integers() | st.none() | st.text(max_size=4)).map(as_yaml)


@fuzzed
@given(text=changed("specs") | SPEC, pyproject=st.none() | changed("specs"))
def test_specs(folder: Path, text: bytes, pyproject: bytes | None) -> None:
    folder = folder / "specs"
    folder.mkdir(exist_ok=True)
    (folder / "spec.yaml").write_bytes(text)
    (folder / "pyproject.toml").unlink(missing_ok=True)
    if pyproject is not None:
        (folder / "pyproject.toml").write_bytes(pyproject)
    spec = survives(lambda: build_spec(str(folder / "spec.yaml"), {"data.batch_size": 2}))
    if spec is not None:
        json.dumps(spec.recorded())
        spec.settings().threshold_of("bn")


class Net(nn.Module):
    """What the checkpoints of the corpus are of."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head = nn.BatchNorm1d(2), nn.Linear(2, 3)


@fuzzed
@given(
    data=changed("checkpoints") | saved(),
    name=st.sampled_from(["w.pt", "w.safetensors", "model.safetensors.index.json", "w"]),
    key=st.none() | st.sampled_from(["model", "state_dict", "a.b", "", ".", "epoch"]),
    prefix=st.none() | st.sampled_from(["module", "", ".", "bn"]),
    strict=st.booleans(),
)
def test_checkpoints(folder: Path, data: bytes, name: str, key: str | None, prefix: str | None, strict: bool) -> None:
    place = folder / "checkpoints"
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(data)
    spec = CheckpointSpec(path=str(place / name), key=key, strip_prefix=prefix, strict=strict)
    for need_statistics in (True, False):
        survives(lambda need=need_statistics: load_checkpoint(Net(), spec, need))


@fuzzed
@given(data=changed("reports") | JSON)
def test_reports(data: bytes) -> None:
    """As `verify` and `convert --report` read them."""
    report = survives(lambda: load_as(Report, data.decode(errors="replace")))
    if report is not None:
        found = survives(lambda: verify(report, report))
        survives(lambda: wanted_from_report(report, Net()))
        for name in FORMATS.names() if found is not None else ():
            survives(lambda name=name: renderer(name, Verification)(found, RenderOptions()))
        survives(lambda: renderer("html", Report)(report, RenderOptions()))


MARKS = {"bnprobe": "0.1.0", "layers": ["bn"], "train": {"steps": 3}}


@fuzzed
@given(data=changed("states") | JSON | saved())
def test_states(folder: Path, data: bytes) -> None:
    place = folder / "out.state"
    place.mkdir(exist_ok=True)
    (place / "made-by-bnprobe.txt").write_bytes((CORPUS / "states" / "made-by-bnprobe.txt").read_bytes())
    (place / "fingerprint.json").write_bytes(data)
    survives(lambda: StateFolder.open(place, MARKS, resume=True))
    state = StateFolder(place)
    for path in (state.running("a", 0), state.running("a", 0).with_suffix(".safetensors")):
        path.write_bytes(data)
    survives(lambda: load_state(state.running("a", 0), {"arm": "a", "seed": 0}))
    survives(lambda: state.finished("a", 0))
    (place / "made-by-bnprobe.txt").write_bytes(data)
    survives(lambda: StateFolder.open(place, MARKS, resume=True))


def spoken(workspace: Workspace, arguments: list[str]) -> None:
    """Run a command: an exit code of bnprobe's, and no traceback."""
    with interrupted_after(SECONDS):
        result = workspace.run(*arguments)
    assert result.code in (0, 1, 2, 3), result
    assert "Traceback" not in result.stderr, result.stderr
    assert "internal error" not in result.stderr, result.stderr


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def words_of(data: bytes) -> list[str]:
    """Arguments as a shell could give them, which lead nowhere outside of the folder."""
    text = data.decode(errors="surrogateescape").replace("/", "_").replace("\0", "")
    return [word for word in text.split("\n") if word not in ("", "..")][:20]


@fuzzed
@given(data=changed("commands"))
def test_argument_lists(folder: Path, data: bytes) -> None:
    workspace = Workspace(folder / "commands")
    workspace.folder.mkdir(exist_ok=True)
    spoken(workspace, words_of(data))


MODEL = (
    SHIFTED.replace("IMAGES = 64", "IMAGES = 16")
    + """

def load_eval_data(batch_size):
    return DataLoader(TensorDataset(images()), batch_size=batch_size)


def loss(model, batch):
    return model(batch[0]).square().mean()
"""
)

ODD = [
    "None",
    "3",
    "'x'",
    "{}",
    "[]",
    "()",
    "object()",
    "Net",
    "lambda *a: 3",
    "torch.zeros(4)",
    "torch.zeros(0)",
    "float('nan')",
    "torch.zeros(2, device='meta')",
    "[None]",
    "[[]]",
    "{1: 2}",
    "iter([])",
    "torch.zeros(4, 2, 8, 8)",
    "[torch.zeros(4, 2, 8, 8)] * 4",
    "[(torch.zeros(4, 2, 8, 8), 'a')] * 4",
    "[{3: torch.zeros(4, 2, 8, 8)}] * 4",
    "10 ** 400",
    "True",
    "...",
    "print",
    "1 / 0",
]
FUNCTIONS = [
    "load_model()",
    "load_data(batch_size)",
    "load_eval_data(batch_size)",
    "loss(model, batch)",
    "metric(model, batch)",
    "forward(model, batch)",
    "batch_size_of(batch)",
    "norm_classes",
    "model",
    "dataset",
    "loader",
]
ODD_COMMANDS = [
    ["scan", "{}", "--batch-size", "4", "--batches", "2"],
    ["scan", "{}", "--batch-size", "4", "--batches", "2", "--what-if", "--format", "json"],
    ["scan", "{}", "--batch-size", "4", "--batches", "2", "--train-steps", "2", "--gradients"],
    ["sweep", "{}", "--batch-size", "4", "--batches", "2", "--momentum"],
    ["recalibrate", "{}", "--batch-size", "4", "-o", "out.safetensors", "--force"],
    ["convert", "{}", "--batch-size", "4", "-o", "out.safetensors", "--force"],
    ["convert", "{}", "--batch-size", "4", "--finetune", "--steps", "2", "-o", "out.safetensors", "--force"],
    ["convert", "{}", "--batch-size", "4", "--check"],
    ["lint", "{}"],
    ["export", "{}", "--batch-size", "4", "--to", "torchscript", "-o", "out.pt", "--force"],
]


@st.composite
def model_files(draw: st.DrawFn) -> bytes:
    """A model file of which one function gives something odd."""
    name, value = draw(st.sampled_from(FUNCTIONS)), draw(st.sampled_from(ODD))
    if "(" not in name:
        return f"{MODEL}\n{name} = {value.replace('1 / 0', '0')}\n".encode()
    return f"{MODEL}\n\ndef {name}:\n    return {value}\n".encode()


@whole
@given(
    command=st.sampled_from(ODD_COMMANDS),
    model=st.just(MODEL.encode()) | model_files(),
    spec=st.none() | changed("specs") | nested(KEYS).map(as_yaml),
    weights=st.none() | changed("checkpoints") | saved(),
    more=st.lists(
        st.sampled_from(TOKENS).map(lambda token: token.decode(errors="replace").replace("/", "_")), max_size=1
    ),
)
def test_whole_commands(
    folder: Path, command: list[str], model: bytes, spec: bytes | None, weights: bytes | None, more: list[str]
) -> None:
    workspace = Workspace(folder / "whole")
    workspace.folder.mkdir(exist_ok=True)
    (workspace.folder / "model.py").write_bytes(model)
    arguments = [word.format("model.py" if spec is None else "spec.yaml") for word in command]
    if spec is not None:
        safe = spec.replace(b"unsafe_load", b"strict").replace(b"/", b"_")
        (workspace.folder / "spec.yaml").write_bytes(b"model: model.py\n" + safe)
    if weights is not None:
        (workspace.folder / "w.pt").write_bytes(weights)
        arguments += ["--checkpoint", "w.pt"]
    spoken(workspace, [*arguments, *(word.replace("\0", "") for word in more)])
    torch.set_num_threads(1)
