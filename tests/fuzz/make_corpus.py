"""Write the corpus of the fuzz tests anew: ``python tests/fuzz/make_corpus.py``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from bnprobe import scan
from bnprobe.report.json import dump

CORPUS = Path(__file__).parent / "corpus"

SPECS = {
    "whole": """\
model: {target: model.py:Net, args: {depth: 3}}
checkpoint: {path: weights.pt, key: state_dict, strip_prefix: module, strict: false, unsafe_load: false}
data: {target: load_data, args: {root: x}, batch_size: 4, batches: 8, seed: 1, input_shape: [[3, 8], [10]],
  batch_size_of: count}
eval_data: {target: load_eval_data, batch_size: 8}
forward: model.py:forward
loss: loss
metric: metric
thresholds: {"*": 32, "head.*": 8}
layers: {include: ["a.*"], exclude: [b], norms: {MyNorm: {mean: m, log_std: s, eps: 1.0e-5}}}
scan: {max_batches: 64, device: cpu, autocast: bfloat16, physical_batch: 16, batch_sizes: [1, 2], emulate: true,
  what_if: false,  train_steps: 3, gradients: true}
rules: {select: [BN1], ignore: [BN107], exempt: [{layers: "head.*", rules: [BN2], reason: small}]}
train: {optimizer: {target: Adam, args: {lr: 0.01}}, schedule: {target: StepLR, args: {step_size: 3}}, steps: 10,
  accumulate: 2, clip_norm: 1.0, evaluate_every: 5, patience: 2, save_every: 3}
repair: {to: batch-renorm, layers: ["*"], report: r.json, groups: 8, blend: 0.5, renorm: {r_max: 3.0, momentum: 0.1}, 
  seeds: 2, require: ["metric>=0.9"], goal: min}
""",
    "short": "model: model.py\ncheckpoint: w.pt\nthresholds: 16\ndata: model.py:load_data\n",
    "anchors": "x: &a {target: model.py}\nmodel: *a\ndata: {args: &b {y: *b}}\n",
}

COMMANDS = {
    "scan": "scan\nmodel.py\n--batch-size\n4\n--batches\n2\n--threshold\n8\n--include\na*\n--format\njson\n--seed\n3",
    "sweep": "sweep\nspec.yaml\n--batch-sizes\n1,2\n--momentum\n0.1,cumulative\n--shift\n1\n--train-sizes\n4",
    "convert": "convert\nmodel.py:Net\n--finetune\n--steps\n3\n--lr\n0.1\n--require\ngain>0\n-o\nx.safetensors",
    "recalibrate": "recalibrate\nmodel.py\n-o\nout.safetensors\n--path\neval\n--force\n--device\ncpu",
    "lint": "lint\nmodel.py\n--model-arg\ndepth=3\n--select\nBN1,BN2\n--checkpoint\nw.pt\n--key\nema",
    "export": "export\nmodel.py\n--to\nonnx\n--input-shape\n3,8,8\n--tolerance\n1e-4",
    "verify": "verify\nbefore.json\nafter.json\n--all",
    "compare": "compare\nbefore.json\nafter.json\n--format\nmarkdown",
    "show": "show\nreport.json\n--format\njunit\n--format\ncsv\n--output-dir\nout",
    "watch": "watch\nrun\n--all",
    "config": "config\nspec.yaml\n--batch-size\n4\n--format\ntoml",
    "explain": "explain\nBN203",
    "init": "init\nfolder\n--force",
}


class Net(nn.Module):
    """One layer and a head, as the model file of the tests has."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head = nn.BatchNorm1d(2), nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of rows of two."""
        return self.head(self.bn(x))  # type: ignore[no-any-return]


def main() -> None:
    """Write all files."""
    torch.manual_seed(0)
    net = Net()
    state = net.state_dict()
    folders = {name: CORPUS / name for name in ("specs", "checkpoints", "reports", "states", "commands")}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for name, text in SPECS.items():
        (folders["specs"] / f"{name}.yaml").write_text(text, encoding="utf-8")
    for name, text in COMMANDS.items():
        (folders["commands"] / name).write_text(text, encoding="utf-8")
    checkpoints = folders["checkpoints"]
    torch.save(state, checkpoints / "zip.pt")
    torch.save({"epoch": 3, "model": state, "args": nn.Linear(1, 1)}, checkpoints / "training.pt")
    torch.save(state, checkpoints / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, checkpoints / "plain.safetensors")
    mark = json.dumps({"to": "group-norm", "layers": ["bn"]})
    save_file(state, checkpoints / "converted.safetensors", {"bnprobe.converted": mark})
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "plain.safetensors")}
    (checkpoints / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    report = scan(net, [torch.randn(4, 2) + 3 for _ in range(8)], 4, num_batches=4)
    (folders["reports"] / "flagged.json").write_text(dump(report), encoding="utf-8")
    states = folders["states"]
    marks = {"bnprobe": "0.1.0", "layers": ["bn"], "train": {"steps": 3}}
    (states / "fingerprint.json").write_text(json.dumps(marks), encoding="utf-8")
    run = {
        "seed": 0,
        "steps": 3,
        "best_step": 2,
        "ending": "finished",
        "note": "",
        "seconds": 1.0,
        "clipped_r": None,
        "clipped_d": None,
        "score": {"loss": 0.1, "metric": None},
    }
    save_file(state, states / "finished.safetensors", {"run": json.dumps(run)})
    running = {"version": 1, "run": {"arm": "a", "seed": 0}, "state": {"step": 3, "model": state}}
    torch.save(running, states / "running.pt")
    (states / "log.csv").write_text("arm,seed,step\na,0,1\n", encoding="utf-8")
    (states / "made-by-bnprobe.txt").write_text("This folder was made by bnprobe\n", encoding="utf-8")


if __name__ == "__main__":
    main()
