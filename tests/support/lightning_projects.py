"""Projects of Lightning as their owners write them, on the digits: code, a configuration of each kind, a checkpoint."""

from __future__ import annotations

from pathlib import Path

from functional.command import CLEAN, REPOSITORY, Workspace

DIGITS = REPOSITORY / "sample_configs" / "digits" / "digits.npz"

LIT = f"""\
import lightning as L
import numpy as np
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class LitNet(L.LightningModule):
    def __init__(self, width: int = 8, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10)
        )
        self.train_acc = torchmetrics.Accuracy(task="multiclass", num_classes=10)
        self.val_acc = torchmetrics.Accuracy(task="multiclass", num_classes=10)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.log_dict({{"train_loss": loss, "train_acc": self.train_acc}}, prog_bar=True)
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.val_acc(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", self.val_acc, on_step=False, on_epoch=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
        return {{"optimizer": optimizer, "lr_scheduler": {{"scheduler": scheduler, "monitor": "val_acc"}}}}


class Digits(L.LightningDataModule):
    def __init__(self, path: str = {str(DIGITS)!r}, batch_size: int = 32):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        with np.load(self.hparams.path) as file:
            images, labels = file["images"], file["labels"]
        images = torch.from_numpy(images).float().div(16).unsqueeze(1)
        data = TensorDataset(images, torch.from_numpy(labels).long())
        self.train_set = torch.utils.data.Subset(data, range(512))
        self.val_set = torch.utils.data.Subset(data, range(512, 640))

    def train_dataloader(self):
        return DataLoader(self.train_set, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, self.hparams.batch_size)


def trained(module, data=None, path="last.ckpt"):
    callback = L.pytorch.callbacks.ModelCheckpoint(dirpath="run", monitor="val_acc", mode="max")
    quiet = {{"logger": False, "enable_progress_bar": False, "enable_model_summary": False}}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(module, data)
    trainer.save_checkpoint(path)
"""
"""A LightningModule and a LightningDataModule as in any tutorial."""

TRAIN = "import lit\nlit.L.seed_everything(0)\nlit.trained(lit.LitNet(width=6), lit.Digits(batch_size=16))\n"
"""Trains, and leaves last.ckpt."""

BY_HAND = """\
from torch.nn import functional as F
from lit import Digits, LitNet


def load_model():
    return LitNet(width=6)


data = Digits(batch_size=16)
data.setup("fit")
loader = data.train_dataloader()


def load_eval_data(batch_size):
    return data.val_dataloader()


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def metric(model, batch):
    return (model(batch[0]).argmax(1) == batch[1]).float().mean()
"""
"""A model file for the same project."""

CLI = """\
seed_everything: 0
trainer: {max_epochs: 2}
model:
  class_path: lit.LitNet
  init_args: {width: 6}
data:
  class_path: lit.Digits
  init_args: {batch_size: 16}
"""
"""A configuration of LightningCLI."""

HYDRA = {
    "conf/config.yaml": "defaults: [_self_, data: digits, model: wide]\nseed: 0\nsize: 16\nckpt_path: null\n",
    "conf/model/wide.yaml": "_target_: lit.LitNet\nwidth: 6\n",
    "conf/data/digits.yaml": "_target_: lit.Digits\nbatch_size: ${size}\n",
}
"""A configuration of Hydra in groups."""


def write_project(workspace: Workspace) -> None:
    """The code and the configurations."""
    workspace.write("lit.py", LIT)
    workspace.write("pyproject.toml", "[tool.bnprobe.scan]\nwhat_if = false\n")  # takes longer than all else
    workspace.write("train.py", TRAIN)
    workspace.write("model.py", BY_HAND)
    workspace.write("config.yaml", CLI)
    for name, text in HYDRA.items():
        workspace.write(name, text)


def write_trained(workspace: Workspace) -> None:
    """The same with a data module in a file of its own, and last.ckpt, the checkpoint of a short training."""
    write_project(workspace)
    workspace.write("data.py", "from lit import Digits\n")
    (workspace.folder / "last.ckpt").write_bytes(_checkpoint(workspace))


_trained: list[bytes] = []


def _checkpoint(workspace: Workspace) -> bytes:
    """The checkpoint of a short training of the project in a folder; trained once."""
    if not _trained:
        assert workspace.run_script("train.py").code == CLEAN
        _trained.append((workspace.folder / "last.ckpt").read_bytes())
    return _trained[0]


def copy_into(folder: Path, project: Path) -> None:
    """Give a test the files of a project that was made once."""
    for path in project.iterdir():
        (folder / path.name).symlink_to(path)
