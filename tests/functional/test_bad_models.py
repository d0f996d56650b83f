"""Model files that cannot be used: what was found, where, and what to do."""

from __future__ import annotations

import sys

import pytest
import torch

from functional.command import CLEAN, ERROR, FINDINGS, MODEL, NOTHING, Workspace

DEEP = """
class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()
        self.late = nn.BatchNorm1d(3)
        self.last = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.last(self.late(self.net(x) * FACTOR))


def load_model():
    return Deep()

"""

UNUSABLE = [
    pytest.param(
        "def broken(:\n",
        ["Syntax error in model.py, line 31 (invalid syntax): def broken(:"],
        id="syntax-error",
    ),
    pytest.param(
        "import json\n\nrows = json.loads('[1,')\n",
        [
            "JSONDecodeError while loading model.py: Expecting value: line 1 column 4 (char 3)",
            'model.py", line 33, in <module>',
            "rows = json.loads('[1,')",
        ],
        id="exception-while-loading",
    ),
    pytest.param(
        "def load_model():\n    return nn.Sequential(nn.Linear(3))\n",
        [
            "TypeError while calling model.py:load_model(): ",
            "missing 1 required positional argument: 'out_features'",
            'model.py", line 32, in load_model',
            "return nn.Sequential(nn.Linear(3))",
        ],
        id="exception-in-load_model",
    ),
    pytest.param(
        "def load_model():\n    with torch.device('meta'):\n        return Net()\n",
        ["7 tensors of the model without values (device meta): bn.weight, bn.bias, head.weight, head.bias, "],
        id="device-meta",
    ),
    pytest.param(
        "Net.__hash__ = None\n",
        ["TypeError while listing the parameters and buffers of the model: unhashable type: 'Net'"],
        id="no-hash",
    ),
    pytest.param(
        "for batch in range(10**9):\n    Net()(images()).sum().backward()\n",
        ["model.py trains when it is imported: the loop in line 31 calls backward(). Put what trains under"],
        id="trains",
    ),
    pytest.param(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--data', required=True)\n"
        "args = parser.parse_args()\n",
        ["in line 34, and ends without them (the following arguments are required: --data). Give them default values"],
        id="needs-arguments",
    ),
    pytest.param(
        "def load_model():\n    return Net().cuda()\n",
        ["model.py:32 asks for a GPU, and there is none: leave .cuda() out, or write .to("],
        id="cuda",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    ),
    pytest.param(
        "def load_model():\n    raise SystemExit\n",
        ["SystemExit while calling model.py:load_model()", 'model.py", line 32, in load_model'],
        id="exit-in-load_model",
    ),
    pytest.param(
        "import not_a_module_anywhere\n",
        ["ModuleNotFoundError while loading model.py: No module named 'not_a_module_anywhere'", "line 31"],
        id="import-error",
    ),
    pytest.param(
        "del load_model\n",
        [
            "model.py has neither load_model() nor model.",
            "It defines: Net (class), images (function), load_data (function).",
            "Name one of them as model.py:NAME, or add load_model().",
            "bnprobe scan model.py:Net\n",
        ],
        id="no-model",
    ),
    pytest.param(
        "def load_model():\n    return Net(), {'epoch': 3}\n",
        ["model.py:load_model returned a tuple of Net and dict, not an nn.Module. Return only the model."],
        id="not-a-module",
    ),
    pytest.param(
        "load_model = 3\n",
        ["model.py:load_model is an int, not an nn.Module or a function or class that returns one."],
        id="not-callable",
    ),
    pytest.param(
        "def load_model():\n    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))\n",
        [
            "RuntimeError while calling the model on a batch of shape (2, 2, 8, 8)",
            "to have 3 channels, but got 2 channels instead",
        ],
        id="batch-of-a-shape-the-model-rejects",
    ),
    pytest.param(
        "class Net(Net):\n    def forward(self, x):\n        return self.head(self.bn(x))\n",
        [
            "RuntimeError while calling the model on a batch of shape (2, 2, 8, 8)",
            "mat1 and mat2 shapes cannot be multiplied",
            'model.py", line 33, in forward',
            "return self.head(self.bn(x))",
        ],
        id="shape-error-in-own-forward",
    ),
    pytest.param(
        "def forward(model, batch):\n    return model(batch['image'])\n",
        ["TypeError while calling forward(model, batch) on a batch", 'model.py", line 32, in forward'],
        id="exception-in-forward-function",
    ),
    pytest.param(
        "def loss(model, batch):\n    return {}['loss']\n",
        ["KeyError while calling loss(model, batch) (training): 'loss'", 'model.py", line 32, in loss'],
        id="exception-in-loss",
    ),
    pytest.param(
        f"FACTOR = float('inf')\n{DEEP}",
        [
            "The input of late (BatchNorm1d) contains NaN or Inf in train mode",
            "It is the first such layer in the order of the forward pass, of 2.",
        ],
        id="inf-in-activations",
    ),
]


@pytest.mark.parametrize(("change", "said"), UNUSABLE)
def test_a_model_file_that_fails_is_explained(workspace: Workspace, change: str, said: list[str]) -> None:
    workspace.write("model.py", MODEL + change)
    message = workspace.scan().error()
    for words in said:
        assert words in message
    assert "torch/" not in message
    assert "bnprobe/" not in message


@pytest.mark.parametrize(
    "arguments",
    [("recalibrate", "model.py"), ("convert", "model.py"), ("convert", "model.py", "--finetune", "--steps", "2")],
    ids=" ".join,
)
def test_a_model_that_cannot_be_saved_is_known_before(workspace: Workspace, arguments: tuple[str, ...]) -> None:
    workspace.write(
        "model.py", MODEL + "def fails(self, *_, **__):\n    return self.nothing\n\n\nNet.state_dict = fails\n"
    )
    message = workspace.run(*arguments, "--batch-size", "4", "-o", "out.safetensors").error()
    assert "AttributeError while calling state_dict() of the model: 'Net' object has no attribute 'nothing'" in message
    assert 'model.py", line 32, in fails' in message


@pytest.mark.parametrize(
    ("value", "words"),
    [("float('inf')", "1 NaN or Inf value"), ("-1.0", "1 negative variance")],
    ids=["inf", "negative"],
)
def test_statistics_that_are_none_are_a_finding(workspace: Workspace, value: str, words: str) -> None:
    change = f"def load_model():\n    net = Net()\n    net.bn.running_var[1] = {value}\n    return net\n"
    workspace.write("model.py", MODEL + change)
    found = workspace.scan()
    assert found.code == FINDINGS
    assert f"bn: its running statistics hold {words}: there is nothing to compare batches" in " ".join(
        found.stdout.split()
    )
    assert "Non-finite running statistics (BN103)" in found.stdout


NOT_FOUND = [
    pytest.param("modle.py", "The file modle.py does not exist. Did you mean model.py?", id="no-such-file"),
    pytest.param("no/model.py", "no/model.py does not exist. The folder no does not exist.", id="no-such-folder"),
    pytest.param(
        "modle", 'There is no module "modle" (looked for "modle" in the working directory', id="no-such-module"
    ),
    pytest.param("spce.yaml", "The file spce.yaml does not exist.", id="no-such-spec"),
    pytest.param(".", ". is a folder. Name a Python file (model.py:symbol)", id="a-folder"),
    pytest.param(
        "model.py:Nte",
        'model.py has no "Nte". Did you mean "Net"? It defines: Net (class), images (function)',
        id="no-such-symbol",
    ),
    pytest.param(
        "model.py:images", "model.py:images returned a Tensor, not an nn.Module.", id="symbol-of-another-kind"
    ),
]


@pytest.mark.parametrize(("target", "said"), NOT_FOUND)
def test_a_target_that_leads_nowhere_is_explained(workspace: Workspace, target: str, said: str) -> None:
    workspace.write("model.py", MODEL)
    assert said in workspace.run("scan", target, "--batch-size", "2").error()


UNPROBED = [
    pytest.param(
        "def load_model():\n    return nn.Conv2d(2, 3, 3)\n",
        "Conv2d has no Batch Normalization layer: there is nothing to probe.",
        id="no-bn",
    ),
    pytest.param(
        "def forward(model, batch):\n    return model.head(batch[0].mean((2, 3)))\n",
        "The forward pass called none of the BN layers (found: 1).",
        id="bn-never-called",
    ),
]


@pytest.mark.parametrize(("change", "said"), UNPROBED)
def test_nothing_to_probe_has_an_exit_code_of_its_own(workspace: Workspace, change: str, said: str) -> None:
    workspace.write("model.py", MODEL + change)
    assert said in workspace.scan("--exit-zero").error(NOTHING)


def test_an_output_that_is_not_finite_is_said(workspace: Workspace) -> None:
    workspace.write(
        "model.py", MODEL + "class Net(Net):\n    def forward(self, x):\n        return super().forward(x) / 0\n"
    )
    found = workspace.scan()
    assert found.code == CLEAN
    assert "The outputs cannot be compared: in training or at inference" in found.stdout
    assert "predicted class" not in found.stdout


def test_exit_zero_hides_no_error(workspace: Workspace) -> None:
    assert workspace.scan("--exit-zero").code == ERROR


def test_a_file_that_parses_arguments_gets_none(workspace: Workspace) -> None:
    parses = "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--width', default=2)\n"
    workspace.write("model.py", f"{MODEL}\n{parses}args = parser.parse_args()\n")
    for target in ("model.py", "model:load_model"):
        report = workspace.run("scan", target, "--format", "json", "--batch-size", "8", "--batches", "4").report(CLEAN)
        assert "model.py parses arguments in line 35 when it is imported: it was given none." in report["scan"]["notes"]
    workspace.write("model.py", f"{MODEL}\n{parses}parser.add_argument('folder')\nargs = parser.parse_args()\n")
    for target in ("model.py", "model:load_model"):
        said = workspace.run("scan", target).error()
        assert said.startswith("model.py parses arguments when it is imported, in line 36, and ends without them (the")


WAYS = {
    "x = 1\n": ["bnprobe lint model.py:Net", "bnprobe init --from model.py:Net  # writes a spec.yaml for it"],
    "from torch import nn\nclass Own(nn.Module): pass\n": [
        "bnprobe lint own.py:Own",
        "bnprobe init --from own.py:Own  # writes a spec.yaml for it",
    ],
}


@pytest.mark.parametrize("text", WAYS)
def test_a_file_without_a_model_shows_the_nearest_ways_on(workspace: Workspace, text: str) -> None:
    workspace.write("own.py", text)
    workspace.write("model.py", MODEL)
    said = workspace.run("lint", "own.py").error().splitlines()[1:]
    assert [each.strip() for each in said] == [
        *WAYS[text],
        "bnprobe init  # writes a model.py and a spec.yaml to fill in",
    ]


def test_a_folder_of_hugging_face_is_named_as_one(workspace: Workspace) -> None:
    workspace.write("net/config.json", "{}")
    for target in ("net", "net/", "net:Net"):
        assert "a model of Hugging Face is named hf:net. " in workspace.run("scan", target).error()


def test_a_package_that_is_not_installed_is_said_how_to_install(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "lightning":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [each for each in sys.modules if each.partition(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    workspace.write("model.py", f"{MODEL}\nimport lightning.pytorch\n")
    said = workspace.scan().error()
    assert 'lightning is not installed. Run: pip install "bnprobe[lightning]".\n' in said
