"""Names, keys, values, paths and exceptions with characters that a terminal obeys: none reaches a stream as it is."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import torch

from bnprobe.printable import escaped
from bnprobe.records import Report
from bnprobe.report import FORMATS, Format, formats_of
from bnprobe.rules import RULES
from bnprobe.rules.interface import Rule
from functional.command import CLEAN, ERROR, FINDINGS, MODEL, SHIFTED, Result, Workspace

NASTY = "\x1b[2J\x9b31m\x07\b\r\u202e\u2066\x00\x7f\u2028x"
"""Clear the screen, colours in one byte, the bell, backspace, start of the line, from right to left, NUL, DEL."""

TYPED = NASTY.replace("\x00", "")
"""The same as an argument or the name of a file."""

QUOTED = json.dumps(NASTY)
"""The same in YAML or Python."""

LONG = "w" * 100_000

REPAIRABLE = SHIFTED + (
    """
import torch.nn.functional as F


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), torch.zeros(len(batch[0]), dtype=torch.long))


def load_eval_data(batch_size):
    return load_data(batch_size)
"""
)


def clean(found: Result) -> Result:
    """The result, if its streams hold no character but what can be seen, and line breaks; and are of readable size."""
    for stream in (found.stdout, found.stderr):
        bad = {char for char in stream if char != "\n" and unicodedata.category(char)[0] == "C"} - set(" ")
        assert not bad, (sorted(map(repr, bad)), stream)
        assert not {"\u2028", "\u2029"} & set(stream)
    assert "Traceback" not in found.stderr
    assert "internal error" not in found.stderr
    assert len(found.stderr) < 60_000
    return found


@pytest.mark.parametrize(
    "options",
    [
        *([option, TYPED] for option in ("--checkpoint", "--model-arg", "--device", "--batch-sizes", "--select")),
        *([option, TYPED] for option in ("--ignore", "--include", "--exclude", "--format", "--input-shape")),
        *([option, TYPED] for option in ("--batch-size", "--seed", "--autocast", "--goal", "--threshold", "--batches")),
        ["--model-arg", f"{TYPED}=3"],
        ["--model-arg", f"depth={TYPED}"],
        ["--output", f"{TYPED}/report"],
        [f"--{TYPED}"],
        [f"--{LONG}"],
        ["--include", LONG],
        ["--device", LONG],
        ["--batch-sizes", LONG],
        ["--batches", "9" * 100_000],
        ["--model-arg", "depth=" + "9" * 100_000],
        ["--batch-sizes", "9" * 100_000],
        ["--threshold", "9" * 100_000],
    ],
    ids=lambda options: f"{options[0]} {options[-1][:3]!a}"[:30],
)
def test_options(workspace: Workspace, options: list[str]) -> None:
    workspace.write("model.py", MODEL)
    found = clean(workspace.scan(*options))
    assert found.code != CLEAN or options[0] == "--exclude"
    assert found.stderr.count("\n") < 80  # in a box


@pytest.mark.parametrize(
    "command", ["scan", "sweep", "lint", "convert", "recalibrate", "export", "verify", "explain", "show", "watch"]
)
@pytest.mark.parametrize("name", [TYPED, f"{TYPED}.py", f"{TYPED}.yaml", f"model.py:{TYPED}", f"timm:{TYPED}", LONG])
def test_targets(workspace: Workspace, command: str, name: str) -> None:
    workspace.write("model.py", MODEL)
    output = {"recalibrate": ["-o", "w.safetensors"], "export": ["-o", "w"], "convert": ["--dry-run"]}
    more = ["model.py"] if command == "verify" else output.get(command, [])
    assert clean(workspace.run(command, name, *more)).code == ERROR


def test_a_command_that_does_not_exist(workspace: Workspace) -> None:
    assert clean(workspace.run(TYPED)).code == ERROR


@pytest.mark.parametrize(
    "spec",
    [
        f"model: model.py\n{QUOTED}: 3\n",
        f"model: model.py\ndata: {{{QUOTED}: 3}}\n",
        f"model: model.py\ndata: {{batch_size: {QUOTED}}}\n",
        f"model: {QUOTED}\n",
        f"model: {{target: model.py, args: {{{QUOTED}: 3}}}}\ndata: {{batch_size: 2}}\n",
        f"model: model.py\nloss: {QUOTED}\ndata: {{batch_size: 2}}\n",
        f"model: model.py\ncheckpoint: {QUOTED}\ndata: {{batch_size: 2}}\n",
        f"model: model.py\nrepair: {{to: {QUOTED}}}\n",
        f"model: model.py\nrules: {{select: [{QUOTED}]}}\n",
        f"model: model.py\nlayers: {{include: {{{QUOTED}: 1}}}}\n",
        f"model: model.py\nlayers: {{norms: {{{QUOTED}: {{mean: a}}}}}}\n",
        f"model: model.py\nthresholds: {{{QUOTED}: -1}}\n",
        f"model: model.py\ntrain: {{optimizer: {{target: {QUOTED}}}}}\n",
        "model: model.py\n\x07: [",
        f"model: model.py\n{LONG}: 3\n",
        f"model: model.py\ndata: {{batch_size: {LONG}}}\n",
        f"model: model.py\nloss: {LONG}\ndata: {{batch_size: 2}}\n",
        f"model: model.py\ncheckpoint: {LONG}\ndata: {{batch_size: 2}}\n",
        f"model: [model.py, {LONG}\n",
    ],
    ids=lambda spec: spec[10:36].encode("unicode_escape").decode(),
)
def test_specs(workspace: Workspace, spec: str) -> None:
    workspace.write("model.py", MODEL)
    workspace.write("spec.yaml", spec)
    command = ("convert", "spec.yaml", "--dry-run") if "repair" in spec or "train" in spec else ("scan", "spec.yaml")
    found = clean(workspace.run(*command))
    if "train" not in spec:
        assert found.code == ERROR


RAISING = [
    f"raise ValueError({QUOTED})\n",
    f"raise type('E' + {QUOTED}.replace(chr(0), ''), (Exception,), {{}})({QUOTED})\n",
    f"def load_model():\n    raise RuntimeError({QUOTED})\n",
    f"def load_data(batch_size):\n    raise RuntimeError({QUOTED} * 20000)\n",
    f"def load_data(batch_size):\n    return type({QUOTED}.replace(chr(0), ''), (), {{}})()\n",
    f"class Net(Net):\n    def forward(self, x):\n        raise RuntimeError({QUOTED})\n",
    f"class Net(Net):\n    def forward(self, x):\n        return {{{QUOTED}: super().forward(x), 'b': None}}\n",
    f"def load_data(batch_size):\n    yield {{{QUOTED}: torch.ones(2), 'other': {QUOTED}}}\n",
    f"def loss(model, batch):\n    raise KeyError({QUOTED})\n",
    f"def metric(model, batch):\n    return {QUOTED}\n",
    f"exec(compile('raise ValueError(1)', {TYPED!r}, 'exec'))\n",
    f"import sys\nsys.exit({QUOTED})\n",
    "raise ValueError('l\\n' * 100000)\n",
    f"model = 3\nload_model = None\nglobals()[{QUOTED}] = lambda: 3\n",
]


@pytest.mark.parametrize("appended", RAISING, ids=range(len(RAISING)))
def test_exceptions_and_what_the_model_file_holds(workspace: Workspace, appended: str) -> None:
    workspace.write("model.py", MODEL + appended)
    clean(workspace.scan())
    clean(workspace.scan("--format", "json"))


NAMED = (
    SHIFTED
    + f"""
NAME = {QUOTED}

TensorDataset = type(NAME.replace(chr(0), ''), (TensorDataset,), {{}})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module(NAME, type(NAME.replace(chr(0), ''), (nn.BatchNorm2d,), {{}})(2))
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(getattr(self, NAME)(x).relu().mean((2, 3)))
"""
    + REPAIRABLE.removeprefix(SHIFTED)
)


@pytest.mark.parametrize(
    "arguments",
    [
        ("scan", "--what-if", "--gradients", "--train-steps", "2"),
        ("sweep", "--batch-sizes", "1,2", "--momentum"),
        ("convert", "--dry-run"),
        ("convert", "--finetune", "--steps", "4", "-o", "w.safetensors"),
        ("recalibrate", "-o", "w.safetensors"),
        ("export", "-o", "w.pt2"),
        ("lint",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("format_", ["terminal", "json"])
def test_names_of_layers_and_data_sets(workspace: Workspace, arguments: tuple[str, ...], format_: str) -> None:
    workspace.write("model.py", NAMED)
    command, *options = arguments
    more = [] if command == "lint" else ["--batch-size", "2"]
    found = clean(workspace.run(command, "model.py", *more, *options, "--format", format_))
    assert found.stdout or command == "export"  # torch cannot read what it writes of such names
    if format_ == "json" and found.stdout:
        json.loads(found.stdout)
    for path in workspace.folder.glob("w.*"):
        if path.suffix in (".json", ".csv"):
            assert path.read_text(encoding="utf-8").replace("\n", "").isprintable()


def test_names_in_reports_that_are_compared(workspace: Workspace) -> None:
    workspace.write("model.py", NAMED)
    for name in (f"{TYPED}.json", "after.json"):
        assert clean(workspace.scan("--format", "json", "--output", name)).code == CLEAN
    written = (workspace.folder / "after.json").read_text(encoding="utf-8")
    assert written.replace("\n", "").isprintable()
    assert NASTY in str(json.loads(written)["layers"][0]["name"])
    for format_ in set(formats_of("scan")) - {"html"}:  # which has tests of its own
        clean(workspace.run("show", "after.json", "--format", format_))
    for format_ in set(formats_of("verify")) - {"html"}:
        clean(workspace.run("verify", f"{TYPED}.json", "after.json", "--format", format_))
    clean(workspace.run("verify", f"{TYPED}.json", TYPED))
    clean(workspace.run("verify", f"{TYPED}.json", "after.json", "--output", f"{TYPED}.json"))


@pytest.mark.parametrize("options", [(), ("--key", TYPED), ("--strip-prefix", TYPED), ("--key", LONG)])
@pytest.mark.parametrize(
    "saved",
    [
        {NASTY: torch.ones(2)},
        {f"bn.{NASTY}": torch.ones(2), "bn.weight": torch.ones(2)},
        {NASTY: {"bn.weight": torch.ones(2)}, "b": {"bn.weight": torch.ones(2)}},
        {NASTY: 3},
        {f"{LONG}{number}": torch.ones(2) for number in range(20)},
    ],
    ids=["key", "mixed", "states", "number", "long"],
)
def test_keys_of_checkpoints(workspace: Workspace, saved: dict[str, object], options: tuple[str, ...]) -> None:
    workspace.write("model.py", MODEL)
    torch.save(saved, workspace.folder / f"{TYPED}.pt")
    assert clean(workspace.scan("--checkpoint", f"{TYPED}.pt", *options)).code == ERROR


def test_rules_of_others(workspace: Workspace) -> None:
    class Nasty(type(RULES["BN102"])):  # type: ignore[misc]
        __doc__ = f"{NASTY}\n\nWhat:\n    {NASTY}\n"
        code, title, cause = "XX901", NASTY, "nasty"
        remedy = NASTY

    workspace.write("model.py", MODEL)
    rule: Rule = Nasty()
    with RULES.including(rule):
        for arguments in ("explain", "explain XX901", "lint model.py", "lint model.py --format json"):
            assert clean(workspace.run(*arguments.split())).stdout


def test_formats_of_others(workspace: Workspace) -> None:
    workspace.write("model.py", NAMED)
    rows = Format(f"rows{TYPED}", {Report: lambda report, options: f"{report.layers[0].name}\r\n\tx\n"})
    with FORMATS.including(rows):
        clean(workspace.run("scan", "--help"))
        arguments = ("--format", rows.name, "--exit-zero")
        assert clean(workspace.scan(*arguments, "--output", "rows")).code == CLEAN
        expected = escaped(NASTY) + "\r\n\tx\n"
        assert (workspace.folder / "rows").read_bytes().decode() == expected
        assert workspace.scan(*arguments).stdout == expected


def test_init_in_a_folder(workspace: Workspace) -> None:
    clean(workspace.run("init", TYPED))
    clean(workspace.run("init", TYPED))
    assert (workspace.folder / TYPED / "spec.yaml").is_file()


def test_a_file_name_that_is_no_text(workspace: Workspace) -> None:
    name = b"w\xff\xfe.py".decode("utf-8", "surrogateescape")
    (workspace.folder / Path(name)).write_text(SHIFTED, encoding="utf-8")
    for format_ in ("terminal", "json"):
        found = clean(workspace.run("scan", name, "--batch-size", "2", "--format", format_))
        assert found.code == FINDINGS
        assert "w\\udcff\\udcfe.py" in found.stdout or "w\\\\udcff" in found.stdout
