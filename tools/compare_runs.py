"""Record what bnprobe measures on the samples, and compare two recordings: does a change of the code change a figure?

    python tools/compare_runs.py record before --checkout ../before
    python tools/compare_runs.py record after
    python tools/compare_runs.py compare before after

``record`` runs every case of one table: each sample and each command of the README, shortened where it trains. A case
is a few commands in a temporary folder that holds copies of the samples. What it gives is kept in ``FOLDER/CASE.json``:

- per command the exit code and its JSON document; for ``explain`` the rules it names, for ``export`` the figures it
  prints;
- per file written its content: JSON documents and tables of numbers as they are, a hash of every tensor of weights, the
  outputs of an exported model on one fixed input.

``compare`` prints every difference and exits with 1 if there is one. Numbers must agree to the bit unless
``--relative`` is given, and a field that only one side has is a difference. Not compared: the text of the fields in
``WORDS`` (that there is one, and in a list how many, is compared), versions and times (``ASIDE``), and the folders in
paths (``PATHS``).

Commands run in processes of their own, one after the other, on one thread, with the Python that runs this script; any
checkout can be recorded with it. Only byte code caches are written to the checkout. With ``--warm`` these processes are
forks of one that has imported torch already, which gives the same and takes half as long; where the start of the
program itself is changed, record without it.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import hashlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

CHECKOUT = Path(__file__).resolve().parent.parent
TIMEOUT = 600
"""Seconds that one command may take."""

WORDS = (
    "message",
    "remedy",
    "reason",
    "note",
    "notes",
    "detail",
    "unit",
    "consequences",
    "problems",
    "plan.source",
    "scan.data",
    "scan.emulation",
    "scan.passes.name",
    "stderr",
)
"""Fields whose text may change; a dot means that the field before it must match too."""

ASIDE = ("seconds", "command", "tool.version", "environment.python", "environment.torch", "environment.platform")
"""Fields that are not compared at all."""

DIGESTS = ("weights_sha256",)
"""Digests of whole files: not compared, since the tensors in the file are."""

PATHS = ("model", "checkpoint", "location", "weights", "target", "path", "report")
"""Fields with a path, of which only the last part is compared, e.g. ``model.py:25``."""

JSON_COMMANDS = ("scan", "sweep", "lint", "convert", "recalibrate", "verify")
"""Commands with a JSON document, to which ``--format json`` is added."""

PRELOADED = ("torch", "scipy.stats", "safetensors.torch", "pydantic", "typer", "yaml", "rich.console", "jaxtyping")
"""What a warm process has imported; never bnprobe."""

EXPORT_INPUT = (8, 1, 8, 8)
"""Shape of the input on which exported models are run; the cases export the digits model."""

# An unusual model: layers of every kind that rules and reports treat in a way of their own.
_EDGE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Edge(nn.Module):
    def __init__(self, mixes=False):
        super().__init__()
        torch.manual_seed(0)
        self.mixes = mixes
        self.stem = nn.Conv2d(1, 8, 3)
        self.cumulative = nn.BatchNorm2d(8, momentum=None)
        self.drop = nn.Dropout2d(0.3)
        self.other_framework = nn.BatchNorm2d(8, momentum=0.9)
        self.untracked = nn.BatchNorm2d(8, track_running_stats=False)
        self.half_frozen = nn.BatchNorm2d(8)
        self.half_frozen.weight.requires_grad_(False)
        self.shared = nn.BatchNorm2d(8)
        self.alias = self.shared
        self.no_affine = nn.BatchNorm1d(8, affine=False)
        self.never_called = nn.BatchNorm1d(4)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for norm in (self.cumulative, self.other_framework, self.half_frozen, self.shared):
                norm.running_mean.uniform_(-0.3, 0.3)
                norm.running_var.uniform_(0.5, 1.5)
                norm.num_batches_tracked.fill_(100)
            for dead in (self.stem.weight, self.stem.bias, self.cumulative.running_mean, self.cumulative.running_var):
                dead[0] = 0

    def forward(self, images):
        x = torch.relu(self.cumulative(self.stem(images)))
        x = torch.relu(self.other_framework(self.drop(x)))
        x = torch.relu(self.half_frozen(self.untracked(x)))
        x = self.shared(x) + self.alias(x + 1)
        x = self.no_affine(x.mean(dim=(2, 3)))
        if self.mixes:
            x = x - x.mean(dim=0)
        return self.head(x)


def load_model(mixes=False):
    return Edge(mixes)


def _images(shift=0.0):
    return TensorDataset(torch.randn(70, 1, 6, 6, generator=torch.Generator().manual_seed(1)) + shift)


def load_data(batch_size=4):
    return DataLoader(_images(), batch_size, shuffle=True, generator=torch.Generator().manual_seed(2))


def load_eval_data(batch_size=4):
    return DataLoader(_images(shift=0.5), batch_size)


def load_broken(batch_size=4):
    return _Broken(batch_size)


class _Broken:
    def __init__(self, batch_size):
        self.batch_size = batch_size

    def __len__(self):
        return 16

    def __iter__(self):
        for position, batch in enumerate(load_data(self.batch_size)):
            if position == 10:
                raise ValueError("the disk is gone")
            yield batch


def loss(model, batch):
    return model(batch[0]).square().mean()
"""

_SPEC = (
    "model: {{target: edge.py:load_model, args: {{mixes: {mixes}}}}}\ndata: {{target: edge.py:{data}, batch_size: 4}}\n"
)

_TUNED = """
model: {target: model.py:load_model}
checkpoint: {path: batch2.safetensors}
data: {target: model.py:load_data, batch_size: 2}
eval_data: {target: model.py:load_eval_data}
thresholds: {"*": 32, "blocks.0.*": 200}
rules: {ignore: [BN105], exempt: [{layers: "blocks.2.bn1", rules: [BN201], reason: "known"}]}
train:
  optimizer: {target: AdamW, args: {lr: 0.001}}
  schedule: {target: CosineAnnealingLR, args: {T_max: 12}}
  steps: 12
  batch_size: 4
  accumulate: 2
  clip_norm: 1.0
  evaluate_every: 3
  patience: 3
  save_every: 4
repair:
  layers: ["blocks.2.*", "blocks.1.bn1"]
  groups: 8
  blend: 0.25
  renorm: {r_max: 2.0, d_max: 1.0, warmup: 0.1, r_ramp: 0.5, d_ramp: 0.5, momentum: 0.02}
  seeds: 2
  goal: max
"""

# The calls of the README, from Python: prints one JSON document.
_CALLS = """
import copy, dataclasses, hashlib, json, sys
import torch
import bnprobe
from bnprobe import nn as layers
from bnprobe.nn import BatchRenorm2d, RenormSchedule, watch_clipping
from bnprobe.repairs import deployable_state
from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from safetensors.torch import load_file

sys.path.insert(0, "digits")
import model as digits


def hashes(state):
    return {name: hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
            for name, value in sorted(state.items())}


def as_json(report):
    # JSON leaves out the results of other packages' statistics where there are none.
    return dataclasses.asdict(
        report, dict_factory=lambda items: {key: value for key, value in items if key != "statistics" or value})


def trained():
    network = digits.load_model()
    network.load_state_dict(load_file("digits/batch2.safetensors"))
    return network


def batches(size=2):
    return digits.load_data(size)


found = {}
network = trained()
report = bnprobe.scan(network, batches(), batch_size=2)
found["report"] = as_json(report)
found["untouched"] = hashes(network.state_dict())
found["further"] = as_json(bnprobe.scan(
    network, batches(), batch_size=2, num_batches=24, device="cpu", thresholds={"*": 16},
    evaluation=digits.load_eval_data(2), loss=digits.loss, metric=digits.metric, what_if=True, train_steps=4,
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), gradients=True))
for path in ("train", "eval"):
    found[f"recalibrated, {path}"] = hashes(bnprobe.recalibrate(trained(), batches(64), path=path).state_dict())
images = next(iter(batches(8)))[0]
for to in ("batch-renorm", "frozen", "group-norm", "sync", "instance-renorm", "gated", "ghost", "mabn"):
    for name, wanted in (("flagged", report), ("globs", ["blocks.1.*"])):
        converted = bnprobe.convert(network, wanted, to=to)
        kinds = [type(each).__name__ for each in converted.modules()]
        result = {"state": hashes(converted.state_dict()), "kinds": kinds}
        result["eval"] = hashes({"outputs": converted.eval()(images)})
        if to != "sync":
            outputs = converted.train()(images)
            outputs.square().mean().backward()
            result["train"] = hashes({"outputs": outputs})
            result["gradients"] = hashes({n: p.grad for n, p in converted.named_parameters() if p.grad is not None})
            result["trained"] = hashes(converted.state_dict())
        try:
            result["deployable"] = hashes(deployable_state(converted, network))
        except Exception as error:
            result["refused"] = type(error).__name__
        found[f"{to}, {name}"] = result

torch.manual_seed(0)
norm = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3), BatchRenorm2d(6, momentum=0.1, r_max=3.0, d_max=5.0))
schedule = RenormSchedule(steps=20)
schedule.attach(norm)
optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
steps = []
with watch_clipping(norm) as clipping:
    for step, (batch, _) in zip(range(20), batches(4)):
        optimizer.zero_grad()
        value = norm(batch * (1 + step % 3)).square().sum(dim=1).tanh().mean()
        value.backward()
        optimizer.step()
        schedule.advance()
        steps.append([value.item(), schedule.state_dict(), repr(clipping.read()) if step % 5 == 4 else None])
found["renorm"] = {"steps": steps, "state": hashes(norm.state_dict())}
for dimensions in (1, 2, 3):
    torch.manual_seed(dimensions)
    inputs = torch.randn(4, 6, *(3,) * dimensions)
    for family in ("BatchRenorm", "FrozenBatchNorm", "InstanceRenorm", "GatedBatchNorm"):
        layer = getattr(layers, f"{family}{dimensions}d")(6)
        given = inputs.clone().requires_grad_()
        outputs = [layer(given), layer(given * 2), layer.eval()(given)]
        sum(output.tanh().square().sum() for output in outputs).backward()
        found[f"{family}{dimensions}d"] = {
            "outputs": hashes(dict(enumerate(outputs))), "gradient": hashes({"input": given.grad}),
            "state": hashes(layer.state_dict())}
lagging = make_evidence(make_layer("bn1", shares=make_shares(lag=0.4)))
found["rule"] = [dataclasses.asdict(verdict) for verdict in run_rule("BN203", lagging)]
print(json.dumps(found))
"""

FILES = {
    "edge/edge.py": _EDGE,
    "edge/edge.yaml": _SPEC.format(mixes="false", data="load_data") + "eval_data: {target: edge.py:load_eval_data}\n",
    "edge/mixing.yaml": _SPEC.format(mixes="true", data="load_data"),
    "edge/broken.yaml": _SPEC.format(mixes="false", data="load_broken"),
    "edge/unknown.yaml": "model: {target: edge.py}\ndate: {target: edge.py:load_data}\n",
    "edge/plain.py": "from torch import nn\nmodel = nn.Linear(2, 2)\n",
    "digits/tuned.yaml": _TUNED,
    "calls.py": _CALLS,
}
"""What stands in the folder of a case beside the samples."""

_SORTED = "digits/sorted.yaml"
_SHORT = "--finetune --steps 6"

CASES: dict[str, list[str]] = {
    "scan/digits-sorted": [f"bnprobe scan {_SORTED}"],
    "scan/digits-spec": ["bnprobe scan digits/spec.yaml"],
    "scan/digits-spec-64": ["bnprobe scan digits/spec.yaml --batch-size 64"],
    "scan/digits-batch2": ["bnprobe scan digits/batch2.yaml"],
    "scan/gan": ["bnprobe scan gan/spec.yaml --what-if --batch-sizes 8,32"],
    "scan/tabular": ["bnprobe scan tabular/spec.yaml"],
    "scan/tabular-further": ["bnprobe scan tabular/spec.yaml --what-if --train-steps 4 --gradients"],
    "scan/volumes-batch1": ["bnprobe scan volumes/batch1.yaml --what-if"],
    "scan/volumes-spec": ["bnprobe scan volumes/spec.yaml"],
    "scan/what-if": [f"bnprobe scan {_SORTED} --what-if"],
    "scan/batch-sizes": ["bnprobe scan digits/batch2.yaml --batch-sizes 1,2,4,16"],
    "scan/further": ["bnprobe scan digits/batch2.yaml --train-steps 8 --gradients"],
    "scan/select": [f"bnprobe scan {_SORTED} --select BN1 --select BN202", f"bnprobe scan {_SORTED} --ignore BN2"],
    "scan/no-emulate": [f"bnprobe scan {_SORTED} --no-emulate --batches 12"],
    "scan/physical-batch": [f"bnprobe scan {_SORTED} --physical-batch 16 --max-batches 20"],
    "scan/threshold": ["bnprobe scan digits/batch2.yaml --threshold 8"],
    "scan/include": [f"bnprobe scan {_SORTED} --include blocks.* --exclude *.bn1 --batches 4"],
    "scan/input-shape": [
        "bnprobe scan digits/model.py --input-shape 1,8,8 --batch-size 2 --checkpoint digits/healthy.safetensors"
    ],
    "scan/model-file": ["bnprobe scan digits/model.py --batch-size 2 --seed 3 --output report.json"],
    "scan/autocast": ["bnprobe scan digits/batch2.yaml --autocast bfloat16 --exit-zero"],
    "scan/edge": ["bnprobe scan edge/edge.yaml --what-if --train-steps 3 --gradients"],
    "scan/mixing": ["bnprobe scan edge/mixing.yaml", "bnprobe scan edge/mixing.yaml --batch-sizes 2,8"],
    "scan/broken": ["bnprobe scan edge/broken.yaml"],
    "scan/tuned": ["bnprobe scan digits/tuned.yaml"],
    "scan/torchrun": [f"torchrun scan {_SORTED} --what-if --output report.json"],
    "sweep/digits-batch2": ["bnprobe sweep digits/batch2.yaml"],
    "sweep/momentum": ["bnprobe sweep digits/batch2.yaml --momentum --shift 1"],
    "sweep/train-sizes": [
        f"bnprobe sweep {_SORTED} --batch-sizes 2,8,32 --train-sizes 8,32 --momentum 0.1,0.01,cumulative --scale 2"
    ],
    "sweep/volumes": ["bnprobe sweep volumes/batch1.yaml --batches 24 --output sweep.json"],
    "lint/samples": [
        "bnprobe lint tabular/spec.yaml",
        "bnprobe lint digits/model.py",
        "bnprobe lint volumes/spec.yaml --select BN10",
        "bnprobe lint edge/edge.yaml",
    ],
    "explain": [
        "bnprobe explain",
        "bnprobe explain BN202",
        "bnprobe explain composition",
        "bnprobe explain BN999",
    ],
    "convert/plans": [
        f"bnprobe convert {_SORTED} --dry-run",
        f"bnprobe convert {_SORTED} --check",
        "bnprobe convert digits/spec.yaml --batch-size 64 --check",
        "bnprobe convert digits/batch2.yaml --dry-run --to group-norm --layers blocks.2.*",
        "bnprobe convert gan/spec.yaml --dry-run --to instance-renorm",
        "bnprobe convert edge/edge.yaml --dry-run --layers * --to gated",
    ],
    "convert/batch-renorm": [f"bnprobe convert {_SORTED} -o out.safetensors"],
    "convert/frozen": [f"bnprobe convert {_SORTED} --to frozen -o out.safetensors"],
    "convert/group-norm": [f"bnprobe convert {_SORTED} --to group-norm -o out.safetensors"],
    "convert/sync": [f"bnprobe convert {_SORTED} --to sync -o out.safetensors"],
    "convert/instance-renorm": ["bnprobe convert volumes/batch1.yaml --to instance-renorm -o out.safetensors"],
    "convert/gated": [f"bnprobe convert {_SORTED} --to gated -o out.safetensors"],
    "convert/layers": ["bnprobe convert gan/spec.yaml --layers discriminator.* --batches 4 -o out.safetensors"],
    "convert/report": [
        "bnprobe scan digits/batch2.yaml --output before.json",
        "bnprobe convert digits/batch2.yaml --report before.json --to frozen -o out.safetensors",
    ],
    "convert/nothing": ["bnprobe convert digits/spec.yaml --batch-size 64 -o out.safetensors"],
    "finetune/workflow": [
        f"bnprobe convert {_SORTED} --finetune --steps 30 --seeds 3 -o repaired.safetensors",
        "bnprobe verify repaired.before.json repaired.after.json",
        "bnprobe verify repaired.after.json repaired.before.json",
        f"bnprobe export {_SORTED} --checkpoint repaired.safetensors --to torchscript --quantize",
        f"bnprobe export {_SORTED} --checkpoint repaired.safetensors --to onnx",
        f"bnprobe export {_SORTED} --checkpoint repaired.safetensors",
        f"bnprobe scan {_SORTED} --checkpoint repaired.safetensors",
    ],
    "finetune/frozen": [f"bnprobe convert {_SORTED} {_SHORT} --to frozen --seeds 2 -o out.safetensors"],
    "finetune/group-norm": [
        f"bnprobe convert {_SORTED} {_SHORT} --to group-norm --resume -o out.safetensors",
        f"bnprobe scan {_SORTED} --checkpoint out.safetensors",
    ],
    "finetune/sync": [f"bnprobe convert {_SORTED} {_SHORT} --to sync -o out.safetensors"],
    "finetune/instance-renorm": [
        f"bnprobe convert volumes/batch1.yaml {_SHORT} --to instance-renorm -o out.safetensors"
    ],
    "finetune/gated": [f"bnprobe convert {_SORTED} {_SHORT} --to gated --layers * -o out.safetensors"],
    "finetune/auto": [f"bnprobe convert {_SORTED} --finetune --steps 10 --to auto -o out.safetensors"],
    "finetune/epochs": [
        "bnprobe convert tabular/spec.yaml --finetune --epochs 1 --lr 0.001 --goal min -o out.safetensors",
        "bnprobe convert tabular/spec.yaml --finetune --steps 2 -o out.safetensors",
        "bnprobe convert tabular/spec.yaml --finetune --steps 2 -o out.safetensors --force",
    ],
    "finetune/require": [
        f"bnprobe convert {_SORTED} {_SHORT} -o out.safetensors --require metric>=0.97 --require flagged==0"
    ],
    "finetune/tuned": [
        "bnprobe convert digits/tuned.yaml --finetune -o renorm.safetensors",
        "bnprobe convert digits/tuned.yaml --finetune --to gated --seeds 1 -o gated.safetensors",
    ],
    "finetune/torchrun": [f"torchrun convert {_SORTED} {_SHORT} -o out.safetensors"],
    "finetune/torchrun-sync": [f"torchrun convert digits/batch2.yaml {_SHORT} --to sync -o out.safetensors"],
    "recalibrate/train": [f"bnprobe recalibrate {_SORTED} -o out.safetensors"],
    "recalibrate/eval": [f"bnprobe recalibrate {_SORTED} --path eval -o out.safetensors"],
    "recalibrate/tabular": ["bnprobe recalibrate tabular/spec.yaml --path eval --exit-zero -o out.safetensors"],
    "recalibrate/layers": ["bnprobe recalibrate volumes/spec.yaml --layers fine* --batches 12 -o out.safetensors"],
    "export": ["bnprobe export digits/spec.yaml", "bnprobe export digits/spec.yaml"],
    "init": [
        "bnprobe init probe",
        "bnprobe lint probe/spec.yaml",
        "bnprobe scan probe/spec.yaml",
        "bnprobe convert probe/spec.yaml --check",
        "bnprobe init probe",
    ],
    "errors": [
        "bnprobe scan digits/sort.yaml",
        "bnprobe scan edge/unknown.yaml",
        "bnprobe scan edge/plain.py --input-shape 2 --batch-size 2",
        "bnprobe scan digits/batch2.yaml --select BN9",
        "bnprobe convert digits/batch2.yaml",
        "bnprobe verify none.json none.json",
    ],
    "python": ["python calls.py"],
}
"""Commands of each case. What ``torchrun`` is given runs as bnprobe in two processes."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the cases with a checkout, and keep what they give")
    recording.add_argument("folder", type=Path, help="where to keep it; created if missing")
    recording.add_argument(
        "--checkout",
        type=Path,
        default=CHECKOUT,
        metavar="DIR",
        help="checkout of bnprobe to record (default: this one)",
    )
    comparing = commands.add_parser("compare", help="print every difference of two recordings; exit 1 if there are any")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument(
        "--relative",
        type=float,
        default=0.0,
        metavar="X",
        help="largest relative difference of two numbers (default: 0)",
    )
    recording.add_argument(
        "--warm", action="store_true", help="fork processes that have imported torch already (quicker)"
    )
    for command in (recording, comparing):
        command.add_argument("--only", default="*", metavar="GLOB", help='only these cases, e.g. "scan/*"')
    commands.add_parser("list", help="print the names of the cases")
    given = parser.parse_args(arguments)
    if given.command == "list":
        print("\n".join(CASES))
        return 0
    if given.command == "record":
        record(given.folder, given.only, given.checkout.resolve(), given.warm)
        return 0
    return compare(given.before, given.after, given.relative, given.only)


# Recording


class Done(NamedTuple):
    """How a process ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


Run = Callable[[str, Path], Done]
"""Run a command of the table in a folder."""


def record(folder: Path, only: str, checkout: Path, warm: bool) -> None:
    """Run the cases whose name matches ``only``; replaces what ``folder`` has of them."""
    environment = _environment(checkout)
    _require_imported_from(checkout, environment)
    run = _forks(environment) if warm else _processes(environment)
    chosen = [name for name in CASES if fnmatch.fnmatchcase(name, only)]
    if not chosen:
        raise SystemExit(f'no case is called "{only}"; "compare_runs.py list" prints their names')
    started = time.perf_counter()
    for position, name in enumerate(chosen, start=1):
        found = _run_case(CASES[name], checkout, run)
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        codes = " ".join(str(step["exit"]) for step in found["steps"])
        took = sum(step["seconds"] for step in found["steps"])
        print(f"[{position}/{len(chosen)}] {name}: exit {codes}, {took:.1f} s", flush=True)
    used = os.times().children_user + os.times().children_system
    print(f"{len(chosen)} cases in {time.perf_counter() - started:.0f} s ({used:.0f} s of CPU), written to {folder}")


def _environment(checkout: Path) -> dict[str, str]:
    """One thread, no colours, a terminal of fixed width, and bnprobe of this checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BNPROBE", "PYTHON", "FORCE_"))}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {
        **kept,
        **threads,
        "PYTHONPATH": str(checkout),
        "NO_COLOR": "1",
        "COLUMNS": "100",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _require_imported_from(checkout: Path, environment: dict[str, str]) -> None:
    code = "import bnprobe; print(bnprobe.__file__)"
    with tempfile.TemporaryDirectory() as folder:
        output = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
        ).stdout
    if not Path(output.strip()).resolve().is_relative_to(checkout):
        raise SystemExit(f"Python imports {output.strip()}, which is not of {checkout}")


def _run_case(commands: list[str], checkout: Path, run: Run) -> dict[str, Any]:
    """What a case gives: its steps, and the files that they wrote."""
    with tempfile.TemporaryDirectory(prefix="bnprobe-") as temporary:
        folder = Path(temporary)
        shutil.copytree(checkout / "sample_configs", folder, dirs_exist_ok=True)
        for name, content in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
        given = _files(folder)
        steps = [_step(command, folder, run) for command in commands]
        return {"steps": steps, "files": {name: _content(folder / name) for name in sorted(_files(folder) - given)}}


def _files(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in files}


def _step(command: str, folder: Path, run: Run) -> dict[str, Any]:
    started = time.perf_counter()
    done = run(command, folder)
    return {
        "command": command,
        "exit": done.code,
        "output": _output(command, done.stdout),
        "seconds": time.perf_counter() - started,
        "stderr": done.stderr[-4000:],
    }


def _processes(environment: dict[str, str]) -> Run:
    """Every command in a process that starts from nothing."""

    def run(command: str, folder: Path) -> Done:
        done = subprocess.run(
            [sys.executable, *_arguments(command)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=TIMEOUT,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


def _arguments(command: str) -> list[str]:
    """A command of the table as arguments of Python; globs are not the shell's here."""
    program, *arguments = shlex.split(command)
    if program == "python":
        return arguments
    if arguments[0] in JSON_COMMANDS:
        arguments += ["--format", "json"]
    several = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"] if program == "torchrun" else []
    return ["-m", *several, "bnprobe", *arguments]


def _forks(environment: dict[str, str]) -> Run:
    """Commands of bnprobe in forks of this process, which imports what takes long; others in processes of their own."""
    os.environ.clear()
    os.environ.update(environment)  # before torch is imported, which reads the number of threads
    for name in PRELOADED:
        importlib.import_module(name)
    start = _processes(environment)

    def run(command: str, folder: Path) -> Done:
        if not command.startswith("bnprobe "):
            return start(command, folder)
        module, *arguments = _arguments(command)[1:]
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            process = os.fork()
            if process == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(stdout.fileno(), 1)
                os.dup2(stderr.fileno(), 2)
                _become(module, arguments, folder, environment["PYTHONPATH"])
            _, status = os.waitpid(process, 0)
            printed = [_read_back(file) for file in (stdout, stderr)]
            return Done(os.waitstatus_to_exitcode(status), printed[0], printed[1])

    return run


def _become(module: str, arguments: list[str], folder: Path, path: str) -> NoReturn:
    """Do what ``python -m module`` does in ``folder``, and end the process."""
    code: Any = 0
    signal.alarm(TIMEOUT)
    try:
        os.chdir(folder)
        sys.path[0:1] = [str(folder), path]  # in place of the folder of this script
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _read_back(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _output(command: str, text: str) -> Any:
    """What is compared of the standard output: a JSON document, or what can be told from text that may be reworded."""
    words = command.split()
    if words[1] == "explain":
        return explained(text)
    if words[1] == "export":
        return table_figures(text)
    if words[1] == "init" or not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError:
        return {"not JSON": text[-4000:]}


def explained(text: str) -> list[list[str]]:
    """Rules in the order in which a text names them, and the cause if it is a table: ``[["BN201", "small_batch"]]``."""
    rows = re.findall(r"^(BN\d{3})  +.*?  +([a-z_]+)  ", text, flags=re.MULTILINE)
    return [list(row) for row in rows] or [[code] for code in re.findall(r"\bBN\d{3}\b", text)]


def table_figures(text: str) -> list[list[float]]:
    """Numbers in the rows ``what it is    1.5e-06 (of what)``: the label is set off by two blanks."""
    rows = re.findall(r"^\S.*?  +(\d.*)$", text, flags=re.MULTILINE)
    return [[float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?", row)] for row in rows]


def _content(file: Path) -> Any:
    """What is compared of a file; None: only that it is there."""
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))
    if file.suffix == ".csv":
        return read_table(file.read_text(encoding="utf-8"))
    if file.suffix == ".safetensors":
        return read_tensors(file.read_bytes())
    return _exported_outputs(file) if file.suffix in (".pt", ".pt2", ".onnx") else None


def read_table(text: str) -> dict[str, list[float | str]]:
    """Columns of a CSV file; cells that are numbers as numbers."""
    header, *rows = csv.reader(io.StringIO(text))
    return {name: [_cell(row[column]) for row in rows] for column, name in enumerate(header)}


def _cell(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def read_tensors(content: bytes) -> dict[str, Any]:
    """Metadata of a safetensors file, and type, shape and SHA-256 of each tensor.

    The format: eight bytes with the length of the header, the header in JSON, the values.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items()):
        first, last = entry["data_offsets"]
        digest = hashlib.sha256(content[start + first : start + last]).hexdigest()
        tensors[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "sha256": digest}
    return {"metadata": metadata, "tensors": tensors}


def _exported_outputs(file: Path) -> Any:
    """Outputs of an exported model on a fixed input."""
    import torch

    torch.set_num_threads(1)
    inputs = torch.rand(EXPORT_INPUT, generator=torch.Generator().manual_seed(0))
    if file.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        return outputs.tolist()
    model = torch.jit.load(str(file)) if file.suffix == ".pt" else torch.export.load(str(file)).module()
    with torch.no_grad():
        return model(inputs).tolist()


# Comparing


class Difference(NamedTuple):
    """One place where two recordings differ; None stands for a field that is not there."""

    path: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        return f"{self.path}: {self.before or '(absent)'} -> {self.after or '(absent)'}"


def compare(before: Path, after: Path, relative: float, only: str = "*") -> int:
    """Print every difference of two recordings; 1 if there are any, else 0.

    Raises:
        SystemExit: There is nothing to compare.
    """
    names = sorted(_recorded(before, only) | _recorded(after, only))
    if not names:
        raise SystemExit(f'neither {before} nor {after} holds a case called "{only}"')
    count = 0
    for name in names:
        sides = [_read(folder / f"{name}.json") for folder in (before, after)]
        for difference in differences(sides[0], sides[1], relative):
            print(f"{name}  {difference}")
            count += 1
    print(f"{len(names)} cases, {count or 'no'} difference{'' if count == 1 else 's'}")
    return 1 if count else 0


def _recorded(folder: Path, only: str) -> set[str]:
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.json"))
    return {name for name in names if fnmatch.fnmatchcase(name, only)}


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else _ABSENT


_ABSENT = object()


def differences(before: Any, after: Any, relative: float = 0.0, path: tuple[str, ...] = ()) -> Iterator[Difference]:
    """Where two JSON values differ.

    Args:
        before, after: The values.
        relative: Largest difference of two numbers, as a part of the larger one.
        path: Where they are: keys, and positions as ``[3]``.
    """
    if is_field(path, ASIDE + DIGESTS) and _ABSENT not in (before, after):
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from differences(before.get(key, _ABSENT), after.get(key, _ABSENT), relative, (*path, key))
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield Difference(_in_words(path), f"{len(before)} entries", f"{len(after)} entries")
        for position, pair in enumerate(zip(before, after, strict=False)):
            yield from differences(*pair, relative, (*path, f"[{position}]"))
    elif not _agree(before, after, relative, path):
        yield Difference(_in_words(path), _short(before), _short(after))


def _agree(before: Any, after: Any, relative: float, path: tuple[str, ...]) -> bool:
    if isinstance(before, str) and isinstance(after, str):
        if is_field(path, WORDS):
            return True
        if is_field(path, PATHS):
            return before.rpartition("/")[2] == after.rpartition("/")[2]
        return before == after
    if isinstance(before, bool) or isinstance(after, bool) or not _are_numbers(before, after):
        return before is after or (type(before) is type(after) and before == after)
    both_nan = before != before and after != after
    return both_nan or bool(before == after or abs(before - after) <= relative * max(abs(before), abs(after)))


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def is_field(path: tuple[str, ...], fields: tuple[str, ...]) -> bool:
    """Whether a path, positions aside, ends with one of the fields."""
    keys = ".".join(key for key in path if not key.startswith("["))
    return any(f".{keys}".endswith(f".{field}") for field in fields)


def _in_words(path: tuple[str, ...]) -> str:
    return ".".join(path).replace(".[", "[") or "(the whole case)"


def _short(value: Any) -> str | None:
    if value is _ABSENT:
        return None
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


if __name__ == "__main__":
    sys.exit(main())
