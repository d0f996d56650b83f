"""``medical``: Dice against brute force, what volumes are, and that batch norm of one volume is instance norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnprobe import lab
from bnprobe.lab.experiment import Budget, Results
from bnprobe.lab.medical import BATCH_NORM, INSTANCE, NORMS, SIDE, Medical, dice, volumes
from bnprobe.records import Trial


def test_dice_is_that_of_sets() -> None:
    torch.manual_seed(0)
    scans, lesions = torch.randn(7, 2, 3, 3, 3), torch.randint(2, (7, 3, 3, 3))
    expected = []
    for scan, lesion in zip(scans, lesions, strict=True):
        answer, truth = ({tuple(at) for at in (each == 1).nonzero().tolist()} for each in (scan.argmax(0), lesion))
        expected.append(2 * len(answer & truth) / (len(answer) + len(truth)))
    assert dice(nn.Identity(), scans, lesions, batch=3) == pytest.approx(sum(expected) / 7)


def test_a_volume_has_one_lesion_that_is_brighter_than_the_tissue_around_it() -> None:
    scans, lesions = volumes(200, torch.Generator().manual_seed(0))
    assert scans.shape == (200, 1, SIDE, SIDE, SIDE)
    assert lesions.shape == (200, SIDE, SIDE, SIDE)
    size = lesions.flatten(1).sum(1)
    assert size.min() > 5
    assert size.max() < SIDE**3 / 4
    inside = (scans[:, 0] * lesions).flatten(1).sum(1) / size
    outside = (scans[:, 0] * (1 - lesions)).flatten(1).sum(1) / (SIDE**3 - size)
    assert ((inside > outside).double().mean()) > 0.98
    # Gain differs more from scan to scan than the lesion stands out.
    assert outside.std() > 0.4
    again, _ = volumes(200, torch.Generator().manual_seed(0))
    assert torch.equal(scans, again)


def test_batch_norm_of_one_volume_is_instance_norm_in_training_but_not_at_inference() -> None:
    found = {}
    for norm in (BATCH_NORM, INSTANCE):
        torch.manual_seed(0)
        found[norm] = Medical().trial({"norm": norm, "batch": 1}, 0, Budget(0.3))
    batch_norm, instance = found[BATCH_NORM], found[INSTANCE]["Dice"]
    assert isinstance(instance, float)
    assert instance > 0.2
    assert batch_norm["Dice in train mode"] == pytest.approx(instance, abs=0.02)
    assert isinstance(batch_norm["Dice"], float)
    assert batch_norm["Dice"] < instance - 0.1


def test_the_lowest_scores_are_named_with_their_range() -> None:
    scores = {(1, BATCH_NORM): (0.2, 0.4), (8, INSTANCE): (0.1, 0.7)}
    trials = [
        Trial({"norm": norm, "batch": size}, seed, {"Dice": scores.get((size, norm), (0.9, 0.9))[seed]}, 0.0)
        for size in (1, 8)
        for norm in NORMS
        for seed in range(2)
    ]
    said = "batch norm at batch 1 (0.3, from 0.2 to 0.4) and instance norm at batch 8 (0.4, from 0.1 to 0.7)."
    assert any(note.endswith(said) for note in Medical().notes(Results(trials), Budget()))


def test_a_run_scores_every_norm_at_every_size() -> None:
    report = lab.run("medical", budget=0.02, seeds=1, jobs=1)
    results = Results(report.trials)
    assert results.levels("norm") == list(NORMS)
    assert results.levels("batch") == [1, 2, 8]
    assert {claim.verdict for claim in report.claims} == {"open"}  # one seed decides nothing
    assert not report.data
