"""Every source that a scan takes as it stands: a project as its owner has it, and the exact command.

``docs/how-to/your-project.md`` shows them as a table, and ``functional/test_sources.py`` runs them. To add one, append
a row to ``SOURCES``, and write the table into the page: ``BNPROBE_UPDATE_GOLDEN=1 pytest
tests/functional/test_sources.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from functional.command import MODEL, Workspace
from support import framework_projects as projects
from support.lightning_projects import write_trained


@dataclass(frozen=True)
class Source:
    """A source.

    Attributes:
        project: What the user has, a phrase.
        command: What to type.
        taken: What is taken from it, a phrase.
        write: Writes such a project into a folder.
        packages: Libraries that it takes.
    """

    project: str
    command: str
    taken: str
    write: Callable[[Workspace], object]
    packages: tuple[str, ...] = ()


def _write_training_file(workspace: Workspace) -> None:
    text = MODEL.replace("def load_model", "def build").replace("def load_data(batch_size)", "def train_loader()")
    guard = (
        '\n\nif __name__ == "__main__":\n    for batch in train_loader():\n        build()(batch[0]).sum().backward()\n'
    )
    workspace.write("train.py", text.replace("batch_size=batch_size", "batch_size=8") + guard)


def _write_model_file(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    workspace.write("save.py", "import model, torch\ntorch.save(model.load_model().state_dict(), 'weights.pt')\n")
    workspace.run_script("save.py")


_LIGHTNING, _HYDRA = ("lightning",), ("lightning", "hydra")

SOURCES = (
    Source(
        "a file with `load_model()` and `load_data(batch_size)`",
        "bnprobe scan model.py --checkpoint weights.pt --batch-size 8",
        "what the [model file](../model-files.md) says",
        _write_model_file,
    ),
    Source(
        "a training script with a class or function for the model, and a loader",
        "bnprobe scan train.py:build --data train.py:train_loader",
        "the model and the loader",
        _write_training_file,
    ),
    Source(
        "Lightning: module, data module and checkpoint",
        "bnprobe scan lit.py:LitNet --checkpoint last.ckpt",
        "arguments of both from the checkpoint, the loaders, the loss of `training_step`, the metric of"
        " `validation_step`",
        write_trained,
        _LIGHTNING,
    ),
    Source(
        "Lightning, with the data module elsewhere",
        "bnprobe scan lit.py:LitNet --checkpoint last.ckpt --data data.py:Digits",
        "the same",
        write_trained,
        _LIGHTNING,
    ),
    Source(
        "LightningCLI: its `config.yaml`",
        "bnprobe scan config.yaml --checkpoint last.ckpt",
        "the same, with classes and arguments from `class_path` and `init_args`; the seed",
        write_trained,
        _LIGHTNING,
    ),
    Source(
        "Hydra: a configuration, composed from its groups",
        "bnprobe scan conf/config.yaml --checkpoint last.ckpt",
        "the objects of its nodes `model` and `data` (`_target_`); the seed",
        write_trained,
        _HYDRA,
    ),
    Source(
        "Hydra: the nodes by name",
        "bnprobe scan conf/config.yaml:model --data conf/config.yaml:data",
        "the same of these nodes",
        write_trained,
        _HYDRA,
    ),
    Source(
        "Hugging Face: a folder with `config.json` and `model.safetensors`, a data set of `datasets`",
        "bnprobe scan hf:resnet --data data.py:dataset --batch-size 8",
        "the class that the configuration names, its loss and accuracy; images as `preprocessor_config.json` says",
        projects.write_huggingface,
        ("transformers", "datasets"),
    ),
    Source(
        "a model of transformers in a file of your own",
        "bnprobe scan net.py:net --data data.py:dataset --batch-size 8",
        "the same",
        projects.write_huggingface,
        ("transformers", "datasets"),
    ),
    Source(
        "timm: a checkpoint of its `train.py`",
        "bnprobe scan timm:resnet10t --checkpoint last.pth.tar --data data.py:train_loader",
        "the model with the arguments that the script was given; cross-entropy, accuracy",
        projects.write_timm,
        ("timm",),
    ),
    Source(
        "torchvision: a checkpoint of its `train.py`",
        "bnprobe scan torchvision:shufflenet_v2_x0_5 --checkpoint checkpoint.pth --data data.py:train_loader",
        "the model with as many classes as the file has; losses and accuracies of its training scripts",
        projects.write_torchvision,
        ("torchvision",),
    ),
    Source(
        "PyTorch Geometric: a network and its loader",
        "bnprobe scan gnn.py:GNN",
        "graphs as samples, nodes as rows; what `forward` takes, by name",
        projects.write_graphs,
        ("torch_geometric",),
    ),
    Source(
        "MONAI: a network and its loader",
        "bnprobe scan segment.py:unet",
        "volumes as samples; the image of a dictionary",
        projects.write_volumes,
        ("monai",),
    ),
    Source(
        "samples as tensors, in a file of PyTorch, NumPy or safetensors",
        "bnprobe scan net.py --data samples.pt --batch-size 8",
        "a row for each sample; of a tuple the first tensor is the input",
        projects.write_tensors,
    ),
    Source(
        "a replay buffer with `sample(batch_size)`",
        "bnprobe scan net.py --data replay.py:buffer --batch-size 8",
        "batches as it draws them",
        projects.write_buffer,
    ),
)


def table() -> str:
    """The sources as a table in Markdown."""
    rows = [f"| {each.project} | `{each.command}` | {each.taken} |" for each in SOURCES]
    return "\n".join(["| You have | Type | Taken |", "|---|---|---|", *rows])
