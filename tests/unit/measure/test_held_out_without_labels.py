"""Held-out data that the loss cannot take is still measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnprobe import scan
from bnprobe.errors import UserCodeError
from bnprobe.records import Report

CLASSES = 3


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def scanned(held_out: list[Any], **options: Any) -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES))
    data = [(torch.randn(32, 6), torch.randint(CLASSES, (32,))) for _ in range(16)]
    return scan(model, data, 32, evaluation=held_out, loss=loss, **options)


@pytest.mark.parametrize("alone", [True, False], ids=["tensors", "tuples"])
def test_its_shift_is_judged_without_loss(alone: bool) -> None:
    inputs = [torch.randn(32, 6) + 2.0 for _ in range(8)]
    report = scanned(inputs if alone else [(x,) for x in inputs])
    assert report.diagnoses[0].cause == "data_shift"
    assert report.layers[0].shares is not None
    assert report.layers[0].shares.data_shift == pytest.approx(4.0, rel=0.2)
    [note] = [note for note in report.scan.notes if "held-out" in note]
    raised = "ValueError" if alone else "IndexError"
    assert note.startswith(f"Loss and metric cannot be computed on the held-out data: {raised} while ")
    assert note.endswith(". Its shift is judged by mean and variance alone.")
    assert report.summary.gaps[0].held_out is None
    assert {remedy.scored_on for remedy in report.remedies} <= {"training"}


def test_data_that_the_model_cannot_take_is_named() -> None:
    with pytest.raises(UserCodeError, match="on the held-out data"):
        scanned([torch.randn(32, 5) for _ in range(8)])
