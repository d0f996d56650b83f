"""Projects of Lightning, and configurations of LightningCLI and Hydra, are scanned as they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from functional.command import CLEAN, FINDINGS, Workspace
from support.frameworks import framework
from support.lightning_projects import DIGITS, copy_into, write_trained

for _package in ("lightning", "pytorch_lightning", "hydra", "omegaconf"):
    framework(_package)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with last.ckpt, the checkpoint of a short training."""
    made = Workspace(tmp_path_factory.mktemp("project"))
    write_trained(made)
    return made.folder


@pytest.fixture
def here(workspace: Workspace, project: Path) -> Workspace:
    copy_into(workspace.folder, project)
    return workspace


def scan(here: Workspace, *arguments: str) -> dict[str, Any]:
    """The JSON report of a scan at batch size 4."""
    result = here.run("scan", *arguments, "--batch-size", "4", "--batches", "16", "--format", "json")
    assert result.code in (CLEAN, FINDINGS)
    report: dict[str, Any] = json.loads(result.stdout)  # Lightning may warn of what the project does
    return report


def error(here: Workspace, *arguments: str) -> str:
    return here.run("scan", *arguments).error()


def figures(report: dict[str, Any]) -> Any:
    """All that was measured and judged; the lines where layers were built aside."""
    return _without_places({part: value for part, value in report.items() if part not in ("scan", "environment")})


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items() if key != "location"}
    return [_without_places(item) for item in value] if isinstance(value, list) else value


CHECKPOINT = ("--checkpoint", "last.ckpt")


@pytest.fixture(scope="module")
def by_hand(project: Path) -> dict[str, Any]:
    """The report of the model file that one would write for the project."""
    return scan(Workspace(project), "model.py", *CHECKPOINT, "--goal", "max")


@pytest.mark.parametrize("target", ["lit.py:LitNet", "lit.py", "lit:LitNet", "config.yaml", "conf/config.yaml"])
def test_the_figures_are_those_of_a_model_file(here: Workspace, by_hand: dict[str, Any], target: str) -> None:
    report = scan(here, target, *CHECKPOINT)
    assert figures(report) == figures(by_hand)
    assert report["scan"]["taken"].keys() == {"model", "data", "loss", "metric"}
    assert report["scan"]["taken"]["metric"] == "val_acc of validation_step (goal: max)"


def test_the_first_lines_say_what_was_taken(here: Workspace) -> None:
    found = here.run("scan", "lit.py:LitNet", *CHECKPOINT, "--batches", "8", "--verbose", COLUMNS="200")
    title, said = (line.strip() for line in found.stdout.partition("\ndata ")[0].split("\n", 1))
    assert title.endswith("scan of lit.py:LitNet")
    assert " ".join(said.split()) == (
        "taken model: lit.py:LitNet with arguments saved in last.ckpt; data: train_dataloader() of lit.py:Digits;"
        " loss: training_step; metric: val_acc of validation_step (goal: max)"
    )
    assert "val_dataloader() of lit.py:Digits (128 images)" in found.stdout
    assert found.stderr == ""


def test_arguments_and_data_can_be_given(here: Workspace) -> None:
    here.write("more.py", "import lit\ndef make(): return lit.Digits(batch_size=8)\ndata = lit.Digits(batch_size=8)\n")
    for data in ("Digits", "lit.py:Digits", "more.py:make", "more.py:data"):
        found = here.run("scan", "lit.py:LitNet", "--data", data, "--model-arg", "width=3", "--format", "json")
        report = found.report(found.code)
        assert report["layers"][0]["channels"] == 3
        assert report["scan"]["batch_size"] == (8 if "more" in data else 32)
        assert report["scan"]["held_out_images"] == 128
    given = scan(here, "lit.py:LitNet", *CHECKPOINT, "--data", "Digits")
    assert given["scan"]["notes"][-1] == (
        "The loader was rebuilt at batch size 4, with its own sampler; its batch size was 16."  # that of the checkpoint
    )
    assert "does not fit the model" in error(here, "lit.py:LitNet", *CHECKPOINT, "--model-arg", "width=3")


def test_a_module_that_is_made_and_a_function_that_makes_one(here: Workspace, by_hand: dict[str, Any]) -> None:
    here.write("made.py", "from lit import *\nnet = LitNet(6)\ndef make(width): return LitNet(width)\n")
    given = (*CHECKPOINT, "--data", "lit.py:Digits")
    assert figures(scan(here, "made.py:net", *given)) == figures(by_hand)
    assert figures(scan(here, "made.py:make", "--model-arg", "width=6", *given)) == figures(by_hand)
    said = error(here, "made.py:net", "--model-arg", "width=6")
    assert said == "made.py:net is already a model, so model.args (width) cannot be used."


# ---- steps that are not as in a tutorial

STEPS = {
    "manual optimization": """
    def training_step(self, batch, batch_idx):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0)
        optimizer.step()
        scheduler.step(0.0)
        self.print(loss)
        self.logger.experiment.add_scalar("loss", loss, self.global_step)
""",
    "a schedule as long as the training": """
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch, batch_idx):
        rates = [
            self.optimizers().param_groups[0]["lr"],
            self.trainer.optimizers[0].param_groups[0]["lr"],
            self.lr_schedulers().get_last_lr()[0],
            self.trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0],
        ]
        assert len(set(rates)) == 1
        return F.cross_entropy(self(batch[0]), batch[1])
""",
    "a dictionary": """
    def training_step(self, batch):
        return {"loss": F.cross_entropy(self(batch[0]), batch[1]), "at": (self.current_epoch, self.trainer.world_size)}
""",
    "optional arguments": """
    def training_step(self, batch, batch_idx=None, *, factor=1.0):
        return F.cross_entropy(self(batch[0]), batch[1]) * factor
""",
}


@pytest.mark.parametrize("step", STEPS)
def test_other_steps_that_give_the_same_loss(here: Workspace, by_hand: dict[str, Any], step: str) -> None:
    _replace(here, "Other", STEPS[step])
    report = scan(here, "other.py:Other", *CHECKPOINT, "--data", "lit.py:Digits")
    assert figures(report) == figures(by_hand)
    assert report["scan"]["taken"]["loss"] == "training_step"


def test_the_model_gets_what_the_training_step_gives_it(here: Workspace) -> None:
    step = "return F.cross_entropy(self.net(2 * batch[0] + 1), batch[1])"
    _replace(here, "Other", f"\n    def training_step(self, batch, batch_idx):\n        {step}\n")
    here.write("by_hand.py", "from model import *\ndef forward(model, batch): return model.net(2 * batch[0] + 1)\n")
    report = scan(here, "other.py:Other", *CHECKPOINT, "--data", "lit.py:Digits")
    expected = scan(here, "by_hand.py", *CHECKPOINT)
    for found, wanted in zip(report["layers"], expected["layers"], strict=True):
        assert (found["train"], found["eval"]) == (wanted["train"], wanted["eval"])
    assert report["scan"]["taken"]["forward"] == "training_step"


REFUSED = {
    "return self(batch[0])": "it returned a tensor of shape (4, 10) and dtype torch.float32",
    "pass": "it returned None",
    "return 1 / self.trainer.estimated_stepping_batches": (
        "in train mode it raises AttributeError in other.py:8: self.trainer.estimated_stepping_batches is there only"
        " while a Trainer runs"
    ),
    "return self(batch[0]).mean() * len(self.trainer.optimizers)": (
        "in train mode it raises AttributeError in other.py:11: self.trainer.strategy is there only while a Trainer"
        " runs"
    ),
    "assert self.training; return self(batch[0]).mean()": "in eval mode it raises AssertionError in other.py:8",
    "[self.manual_backward(self(batch[0]).mean()) for _ in 'ab']": (
        "it calls manual_backward 2 times, and none of these losses is that of the network"
    ),
}


@pytest.mark.parametrize("body", REFUSED)
def test_a_step_without_a_loss_says_why(here: Workspace, body: str) -> None:
    step = f"\n    def training_step(self, batch, batch_idx):\n        {body}\n"
    _replace(here, "Other", f"{step}\n    def configure_optimizers(self):\n        return self.trainer.strategy\n")
    report = scan(here, "other.py:Other", *CHECKPOINT, "--data", "lit.py:Digits")
    assert report["scan"]["missing"] == {"loss": f"training_step gives none to compare: {REFUSED[body]}"}
    assert report["scan"]["taken"].keys() >= {"model", "data", "metric"}
    assert "loss" not in report["scan"]["taken"]
    assert [gap["measure"] for gap in report["summary"]["gaps"]] == ["metric"]


METRICS = {
    "mean_absolute_error": (
        """
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        error = (self(batch[0]).argmax(1) - batch[1]).abs().float().mean()
        self.log_dict({"val_loss": 1.0, "val_mae": error})
""",
        "val_mae of validation_step (goal: min)",
    ),
    "collection": (
        """
    def __init__(self, width=6):
        super().__init__(width)
        kinds = {"acc": self.val_acc, "f1": torchmetrics.F1Score("multiclass", num_classes=10)}
        self.many = torchmetrics.MetricCollection(kinds, prefix="val/")
    def validation_step(self, batch, batch_idx):
        self.many.update(self(batch[0]), batch[1])
        self.log_dict(self.many)
""",
        "val/acc of validation_step (goal: max)",
    ),
    "at the end": (
        """
    def on_validation_epoch_start(self):
        self.kept = []
    def validation_step(self, batch, batch_idx):
        self.kept.append((self(batch[0]).argmax(1) == batch[1]).float())
    def on_validation_epoch_end(self):
        self.log("hits", torch.cat(self.kept).mean(), sync_dist=True)
""",
        "hits of validation_step",
    ),
}


@pytest.mark.parametrize("kind", METRICS)
def test_metrics_are_found_by_name(here: Workspace, kind: str) -> None:
    body, taken = METRICS[kind]
    _replace(here, "Other", body)
    report = scan(here, "other.py:Other", "--data", "lit.py:Digits")
    assert report["scan"]["taken"]["metric"] == taken
    assert {gap["measure"]: gap["goal"] for gap in report["summary"]["gaps"]} == {
        "loss": "min",
        "metric": "min" if "min" in taken else "max",
    }


def test_a_step_without_a_metric_gives_none(here: Workspace) -> None:
    _replace(here, "Other", "\n    def validation_step(self, batch, batch_idx):\n        self.log('val_loss', 1.0)\n")
    report = scan(here, "other.py:Other", "--data", "lit.py:Digits")
    assert "metric" not in report["scan"]["taken"]


def _replace(here: Workspace, name: str, body: str) -> None:
    """A file with LitNet in which some methods are other ones."""
    head = "from lit import *\nimport lightning\n\n\n"
    here.write(f"{name.lower()}.py", f"{head}class {name}(LitNet):\n{body}")


# ---- data of several kinds

LOADERS = {
    "return {'plain': many(32), 'noisy': many(8)}": "2 loaders (plain, noisy): the first, plain, was used.",
    "return [many(32), many(8)]": "2 loaders (number 0, number 1): the first, number 0, was used.",
    "return CombinedLoader({'a': many(32), 'b': many(8)})": "2 loaders (a, b): the first, a, was used.",
    "return many(32)": "",
}


@pytest.mark.parametrize("body", LOADERS)
def test_one_of_several_loaders_is_used(here: Workspace, body: str) -> None:
    here.write(
        "own.py",
        "from lit import *\nfrom lightning.pytorch.utilities import CombinedLoader\n"
        "def many(size): return DataLoader(TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) % 10), size)\n"
        f"class Own(LitNet):\n    def train_dataloader(self):\n        {body}\n",
    )
    report = scan(here, "own.py:Own")
    said = [note for note in report["scan"]["notes"] if "loaders" in note]
    assert said == ([f"train_dataloader() of own.py:Own gives {LOADERS[body]}"] if LOADERS[body] else [])
    assert (report["scan"]["images"], report["scan"]["batch_size"]) == (64, 4)


def test_layers_that_setup_makes_are_there_before_the_weights(here: Workspace) -> None:
    here.write(
        "late.py",
        "from lit import *\nclass Late(LitNet):\n    def setup(self, stage):\n"
        "        assert stage == 'fit' and self.trainer.datamodule.train_set\n"
        "        self.extra = nn.BatchNorm2d(6)\n"
        "class Mine(Digits): pass\n"
        "if __name__ == '__main__': trained(Late(6), Mine(), 'late.ckpt')\n",
    )
    assert here.run_script("late.py").code == CLEAN
    report = scan(here, "late.py:Late", "--checkpoint", "late.ckpt")
    assert [layer["name"] for layer in report["skipped"]] == ["extra"]  # which nothing calls


def test_without_data_one_is_told_how_to_name_it(here: Workspace) -> None:
    here.write("bare.py", "import lit\nclass Bare(lit.LitNet): pass\n")
    said = error(here, "bare.py:Bare")
    assert said.startswith("bare.py:Bare has no train_dataloader. Name a data module with --data ")
    assert "/lit.py:Digits (data: target in a spec), or give --input-shape" in said  # the file is a link
    report = here.run("scan", "bare.py:Bare", "--input-shape", "1,8,8", "--batch-size", "4", "--format", "json")
    assert report.report(report.code)["scan"]["synthetic"]


# ---- what checkpoints hold


OBJECTS = """
from lit import *
class Holding(LitNet):
    def __init__(self, criterion, width=6):
        super().__init__(width)
        self.save_hyperparameters()
def load_model(): return Holding(nn.CrossEntropyLoss())
if __name__ == "__main__":
    trained(load_model(), Digits(), "objects.ckpt")
"""


def test_objects_in_a_checkpoint_are_not_unpickled(here: Workspace) -> None:
    here.write("objects.py", OBJECTS)
    assert here.run_script("objects.py").code == CLEAN
    given = ("--checkpoint", "objects.ckpt", "--data", "lit.py:Digits")
    assert error(here, "objects.py:Holding", *given) == (
        "1 argument of objects.py:Holding in objects.ckpt is an object, and objects are not read, since that would run"
        ' code from the file: "criterion" (torch.nn.modules.loss.CrossEntropyLoss). Write a function that returns'
        " Holding(...) and name it as objects.py:FUNCTION; or, if you trust the file, give --unsafe-load."
    )
    assert scan(here, "objects.py:Holding", *given, "--unsafe-load")["layers"]
    assert scan(here, "objects.py:load_model", *given)["layers"]


WHOLE = """
from argparse import Namespace
from omegaconf import OmegaConf
from lit import *
class Whole(L.LightningModule):
    def __init__(self, hparams):
        super().__init__()
        self.save_hyperparameters(hparams)
        self.net = LitNet(hparams.width)
    def forward(self, x): return self.net(x)
    def training_step(self, batch): return F.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch): self.log("val_acc", 1.0)
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
if __name__ == "__main__":
    trained(Whole(Namespace(width=5)), Digits(), "namespace.ckpt")
    trained(Whole(OmegaConf.create({"width": 5, "deep": {"lr": 0.1}})), Digits(), "omegaconf.ckpt")
"""


def test_one_argument_may_hold_all_settings(here: Workspace) -> None:
    here.write("whole.py", WHOLE)
    assert here.run_script("whole.py").code == CLEAN
    for file in ("namespace.ckpt", "omegaconf.ckpt"):
        report = scan(here, "whole.py:Whole", "--checkpoint", file, "--data", "lit.py:Digits")
        assert report["layers"][0]["channels"] == 5
    said = error(here, "whole.py:Whole", "--data", "lit.py:Digits")
    assert said.startswith("whole.py:Whole needs hparams, which is not given: there is no --checkpoint. Give it by")


def test_pytorch_lightning_is_the_same_under_another_name(here: Workspace) -> None:
    text = (here.folder / "lit.py").read_text().replace("import lightning as L", "import pytorch_lightning as L")
    here.write("older.py", text)
    report = scan(here, "older.py:LitNet", *CHECKPOINT)
    assert report["scan"]["taken"].keys() == {"model", "data", "loss", "metric"}


# ---- configurations


def test_a_configuration_without_a_class_says_so(here: Workspace) -> None:
    here.write("fixed.yaml", "trainer: {max_epochs: 1}\nmodel: {width: 6}\ndata: {batch_size: 16}\n")
    assert error(here, "fixed.yaml") == (
        "fixed.yaml does not name the class of the model (model: class_path): LightningCLI is given it in code. Name it"
        " yourself: bnprobe scan FILE.py:CLASS --model-arg width=6"
    )


HYDRA_ERRORS = {
    "conf/config.yaml:nothing": (
        'conf/config.yaml has no node "nothing" that names a class. Its nodes are data, model: name one, as in'
        " conf/config.yaml:model."
    ),
    "conf/missing.yaml": "Hydra cannot compose conf/missing.yaml (MissingConfigException): ",
    "conf/unset.yaml": 'The node "model" of conf/unset.yaml cannot be resolved: Missing mandatory value: ',
    "conf/unknown.yaml": 'There is no module "nowhere" ',
    "conf/other.yaml": "conf/other.yaml has no node for the model (model, lit_model, ",
    "conf/program.yaml": "InstantiationException while making model of conf/program.yaml: Target 'os.system'",
}


@pytest.mark.parametrize("target", HYDRA_ERRORS)
def test_errors_of_hydra_name_file_and_node(here: Workspace, project: Path, target: str) -> None:
    (here.folder / "conf").unlink()
    for path in project.glob("conf/**/*.yaml"):
        here.write(str(path.relative_to(project)), path.read_text())
    here.write("conf/missing.yaml", "defaults: [model: none]\n")
    here.write("conf/unset.yaml", "model:\n  _target_: lit.LitNet\n  width: ???\n")
    here.write("conf/unknown.yaml", "model: {_target_: nowhere.Net}\n")
    here.write("conf/other.yaml", "optimizer: {_target_: torch.optim.Adam}\n")
    here.write("conf/program.yaml", "model: {_target_: os.system, command: touch ran}\n")
    assert error(here, target).startswith(HYDRA_ERRORS[target])
    assert not (here.folder / "ran").exists()


def test_nodes_within_nodes(here: Workspace) -> None:
    here.write(
        "nested.yaml",
        "parts: {net: {_target_: torch.nn.Sequential, _args_: [{_target_: torch.nn.BatchNorm2d, num_features: 1},"
        " {_target_: torch.nn.Flatten}]}}\ndata: {_target_: lit.Digits, batch_size: 16}\n",
    )
    report = scan(here, "nested.yaml:parts.net")
    assert [layer["name"] for layer in report["layers"]] == ["0"]
    assert report["scan"]["data"] == "train_dataloader() of nested.yaml:data (512 samples)"


CWD = "data:\n  _target_: lit.Digits\n  path: ${hydra:runtime.cwd}/digits.npz\n"


@pytest.mark.parametrize("file", ["conf/cwd.yaml", "conf/cwd.yml", "outputs/.hydra/config.yaml"])
def test_what_hydra_knows_of_its_run(here: Workspace, file: str) -> None:
    """The working directory is that of the command, or of the run whose composed configuration this is."""
    here.write("job/digits.npz" if "outputs" in file else "digits.npz", "").write_bytes(DIGITS.read_bytes())
    here.write("outputs/.hydra/hydra.yaml", f"hydra: {{env: {{}}, runtime: {{cwd: {here.folder / 'job'}}}}}\n")
    (here.folder / "conf").unlink()
    here.write(file, f"model: {{_target_: lit.LitNet, width: 6}}\n{CWD}")
    assert scan(here, file)["scan"]["data"] == f"train_dataloader() of {file}:data (512 samples)"


def test_nodes_of_lightning_within_nodes(here: Workspace) -> None:
    """Also where nothing but nodes says that this is no spec, and with arguments that no signature names."""
    here.write(
        "wrapped.py",
        "import lit\n\nclass Wrapped(lit.L.LightningModule):\n    def __init__(self, **parts):\n"
        "        super().__init__()\n        self.net = parts['net']\n"
        "    def forward(self, x):\n        return self.net(x)\n",
    )
    norm = "net: {class_path: torch.nn.BatchNorm2d, dict_kwargs: {num_features: 1}}"
    data = "data: {class_path: lit.Digits, init_args: {batch_size: 16}}\n"
    for key in ("init_args", "dict_kwargs"):
        here.write("parts.yaml", f"model: {{class_path: wrapped.Wrapped, {key}: {{{norm}}}}}\n{data}")
        assert [layer["name"] for layer in scan(here, "parts.yaml")["layers"]] == ["net"]


# ---- a spec for the project


@pytest.mark.parametrize("target", ["lit.py:LitNet", "config.yaml", "conf/config.yaml"])
def test_init_writes_a_spec_that_scans_the_same(here: Workspace, by_hand: dict[str, Any], target: str) -> None:
    made = here.run("init", "--from", target, *CHECKPOINT, "--batch-size", "4", "its spec")
    assert (made.code, made.stderr) == (CLEAN, "")
    assert made.stdout == "wrote its spec/spec.yaml\nnext: bnprobe scan 'its spec/spec.yaml'\n"
    text = (here.folder / "its spec" / "spec.yaml").read_text()
    assert "Found: val_acc of validation_step (goal: max)." in " ".join(text.replace("\n# ", " ").split())
    found = here.run("scan", "its spec/spec.yaml", "--batches", "16", "--format", "json")
    assert figures(found.report(CLEAN)) == figures(by_hand)


def test_init_says_where_data_is_missing(here: Workspace) -> None:
    here.write("bare.py", "import lit\nclass Bare(lit.LitNet): pass\n")
    made = here.run("init", "--from", "bare.py:Bare")
    assert made.code == CLEAN
    to_fill_in, then = made.stdout.splitlines()[1:]
    why = "data: bare.py:Bare has no train_dataloader. Name a data module"
    assert to_fill_in.startswith(f"fill in first: {why}")
    assert then == "then: bnprobe scan spec.yaml"
    text = (here.folder / "spec.yaml").read_text()
    assert f"# TO BE FILLED IN: {why}" in text
    assert "None was found" not in text
    assert here.run("init", "--checkpoint", "last.ckpt").error() == (
        "These options say what to write a spec for: name the project with --from TARGET."
    )


def test_repaired_weights_know_the_arguments_of_the_model(here: Workspace) -> None:
    made = here.run("recalibrate", "lit.py:LitNet", *CHECKPOINT, "--batches", "8", "-o", "new.safetensors")
    assert made.code == CLEAN, made
    assert scan(here, "lit.py:LitNet", "--checkpoint", "new.safetensors")["layers"][0]["channels"] == 6
    converted = ("--layers", "net.1", "--finetune", "--steps", "4", "-o", "more.safetensors", "--force")
    assert here.run("convert", "lit.py:LitNet", *CHECKPOINT, *converted).code == CLEAN
    record = json.loads((here.folder / "more.record.json").read_text())
    assert (record["settings"]["repair"]["goal"], record["settings"]["model"]["args"]["width"]) == ("max", 6)


def test_a_module_without_a_forward_that_its_step_does_not_call_is_explained(here: Workspace) -> None:
    body = "    forward = L.LightningModule.forward\n    def training_step(self, batch): return self.trainer.lost\n"
    _replace(here, "Other", body)
    assert error(here, "other.py:Other", "--data", "lit.py:Digits") == (
        "other.py:Other has no forward, and its training_step did not call the network: in train mode it raises"
        " AttributeError in other.py:7: self.trainer.lost is there only while a Trainer runs. Give it a forward, or"
        " name a function forward(model, batch) in a spec."
    )


def test_hooks_that_change_batches_are_called(here: Workspace) -> None:
    _replace(
        here, "Other", "    def on_after_batch_transfer(self, batch, index): return [2 * batch[0] + 1, batch[1]]\n"
    )
    here.write("by_hand.py", "from model import *\ndef forward(model, batch): return model(2 * batch[0] + 1)\n")
    report = scan(here, "other.py:Other", *CHECKPOINT, "--data", "lit.py:Digits")
    expected = scan(here, "by_hand.py", *CHECKPOINT)
    assert report["layers"][0]["eval"] == expected["layers"][0]["eval"]
    here.write("changing.py", "from lit import *\nclass Data(Digits):\n    on_after_batch_transfer = print\n")
    report = scan(here, "lit.py:LitNet", *CHECKPOINT, "--data", "changing.py:Data")
    assert report["scan"]["notes"].count(
        "on_after_batch_transfer() of changing.py:Data is not called: the batches are those of its loaders."
    )


def test_streams_have_a_loss_too(here: Workspace) -> None:
    here.write(
        "stream.py",
        "from lit import *\nfrom torch.utils.data import IterableDataset\nclass Stream(IterableDataset):\n"
        "    def __iter__(self): return iter([(torch.full((1, 8, 8), i / 64), i % 10) for i in range(64)])\n"
        "class Streamed(LitNet):\n    def train_dataloader(self): return DataLoader(Stream(), 8)\n"
        "class Once(LitNet):\n    def train_dataloader(self): return iter(DataLoader(Stream(), 8))\n",
    )
    found = here.run("scan", "stream.py:Streamed", "--format", "json")
    assert json.loads(found.stdout)["scan"]["taken"].keys() == {"model", "data", "loss", "metric"}
    found = here.run("scan", "stream.py:Once", "--format", "json")
    scanned = json.loads(found.stdout)["scan"]
    assert scanned["taken"].keys() == {"model", "data"}
    why = "stream.py:Once was not tried for it, since train_dataloader() of stream.py:Once can be read only once"
    assert scanned["missing"] == {"loss": why, "metric": why}


def test_the_data_module_beside_the_class_is_named_by_its_file(here: Workspace) -> None:
    here.write("made.py", "import lit\ndef make(): return lit.LitNet(6)\n")
    data = scan(here, "made.py:make", *CHECKPOINT)["scan"]["data"]
    assert data.endswith("lit.py:Digits (512 samples)")  # the file is a link


def test_a_data_module_that_cannot_be_made_matters_only_where_there_is_need_of_it(here: Workspace) -> None:
    here.write(
        "needing.py",
        "from lit import *\nclass Needing(LitNet): pass\nclass Data(L.LightningDataModule):\n"
        "    def __init__(self, root): super().__init__()\n",
    )
    assert here.run("lint", "needing.py:Needing").code == CLEAN
    said = error(here, "needing.py:Needing")
    assert said.startswith("needing.py:Data needs root, which is not given: there is no --checkpoint. Give it by data:")
    assert here.run("init", "--from", "needing.py:Needing").code == CLEAN
    assert "# TO BE FILLED IN: data: needing.py:Data needs root" in (here.folder / "spec.yaml").read_text()
