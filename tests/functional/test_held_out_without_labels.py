"""Held-out data without labels: the scan judges its shift, and a repair is scored on training data; both say so."""

from __future__ import annotations

from functional.command import FINDINGS, Workspace

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

X = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def load_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))


def load_data(batch_size=32):
    return DataLoader(TensorDataset(X, Y), batch_size, shuffle=True)


def load_eval_data(batch_size=32):
    return DataLoader(TensorDataset(X[:128] + 2), batch_size)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])
"""


def test_a_scan_and_a_repair_run_and_name_it(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    scanned = workspace.run("scan", "model.py", "--batch-size", "32")
    assert scanned.code == FINDINGS
    why = "Loss and metric cannot be computed on the held-out data: IndexError while"
    assert why in " ".join(scanned.stdout.split())
    repaired = workspace.run("recalibrate", "model.py", "--batch-size", "32", "-o", "new.safetensors")
    assert repaired.code == FINDINGS, repaired.stderr  # the shift of the held-out data is still there
    said = " ".join((repaired.stdout + repaired.stderr).split())
    assert why in said
