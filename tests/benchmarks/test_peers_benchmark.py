"""The benchmark of other people's suites: checks pass, fail and do not apply for the right reasons, and are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.peers import tables
from benchmarks.peers.__main__ import render
from benchmarks.peers.checks import CHECKS
from benchmarks.peers.layers import SUBJECTS, Subject, control_of
from benchmarks.peers.reasons import REASONS
from benchmarks.peers.registry import FAILED, NOT_APPLICABLE, PASSED, Check, NotApplicableError, is_asked, run
from bnprobe import nn as layers

BY_NAME = {check.name: check for check in CHECKS}
LAYERS = {subject.name: subject for subject in SUBJECTS}
QUICK = ("forward", "grad", "functional_gradients", "script", "layers_are_leaves", "autocast", "empty_batches")


class Forgetful(nn.BatchNorm2d):
    """A layer that loses its gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * input.detach()


FORGETFUL = Subject("forgetful", Forgetful, 2, "bn")


@pytest.mark.parametrize("name", QUICK)
def test_layers_pass_and_a_broken_one_does_not(name: str) -> None:
    chosen = ("nn.BatchNorm2d", "BatchRenorm2d", "FrozenBatchNorm1d", "GatedBatchNorm3d", "InstanceRenorm2d")
    outcomes = [run(BY_NAME[name], LAYERS[layer]) for layer in chosen]
    assert [(each.state, each.reason) for each in outcomes] == [(PASSED, "")] * len(chosen)
    if name in ("grad", "functional_gradients"):
        assert run(BY_NAME[name], FORGETFUL).state == FAILED


def test_every_layer_of_the_package_is_asked() -> None:
    kinds = {subject.kind for subject in SUBJECTS}
    public = [getattr(layers, name) for name in layers.__all__]
    modules = [kind for kind in public if isinstance(kind, type) and issubclass(kind, nn.Module)]
    assert not {kind for kind in modules if kind.__name__.endswith("d")} - kinds  # 1d, 2d or 3d, and no base class
    assert len(LAYERS) == len(SUBJECTS)
    assert len(BY_NAME) == len(CHECKS)
    assert {control_of(subject).family for subject in SUBJECTS} == {"bn"}


def test_lazy_layers_are_asked_what_concerns_them() -> None:
    lazy = LAYERS["LazyBatchRenorm2d"]
    assert is_asked(BY_NAME["lazy_state"], lazy)
    assert not is_asked(BY_NAME["hessians"], lazy)
    assert run(BY_NAME["lazy_first_call_counts"], lazy).state == PASSED
    assert run(BY_NAME["lazy_first_call_counts"], LAYERS["BatchRenorm2d"]).reason == "the layer is not lazy"


def test_layers_are_used_and_alike() -> None:
    one, other = (LAYERS["BatchRenorm2d"].layer() for _ in range(2))
    assert torch.equal(one.running_mean, other.running_mean)
    assert not torch.allclose(one.running_mean, torch.zeros(4))
    assert LAYERS["BatchRenorm2d"].differentiable(True).r_max == 1.0


def test_tables_count_and_give_reasons() -> None:
    def broken(subject: Subject) -> None:
        """Breaks."""
        raise ValueError("a | b")

    def elsewhere(subject: Subject) -> None:
        """Not here."""
        raise NotApplicableError("no such thing")

    checks = [Check(function.__name__, "mine", (), function) for function in (broken, elsewhere)]
    subjects = [LAYERS["nn.BatchNorm2d"], LAYERS["BatchRenorm2d"]]
    outcomes = [run(check, subject) for check in [*checks, BY_NAME["check_inplace"]] for subject in subjects]
    assert [each.state for each in outcomes] == [FAILED] * 2 + [NOT_APPLICABLE] * 2 + [PASSED] * 2
    report = render(outcomes, 1.0)
    assert "* bnprobe.nn: 2 run, 1 passed, 1 failed, 1 not applicable." in report
    assert "| mine | broken | nn.BatchNorm2d, BatchRenorm2d | failed | ValueError: a / b |  |" in report
    assert "| mine | elsewhere | all | no such thing |" in report
    assert "| BatchRenorm2d | 3 | 2 | 1 | 1 | 1 |" in report


def test_packages_are_not_fetched() -> None:
    outcome = run(BY_NAME["composer_surgery"], LAYERS["BatchRenorm2d"])
    assert outcome.state in (PASSED, NOT_APPLICABLE)
    assert outcome.state == PASSED or "not installed" in outcome.reason or "cannot be imported" in outcome.reason


def test_every_failure_in_the_results_has_a_reason() -> None:
    text = (Path(tables.__file__).parent / "RESULTS.md").read_text(encoding="utf-8")
    failed = text.split("## What failed")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in failed.splitlines() if line.startswith("| ")][1:]
    assert all(row[-1].strip(" |") for row in rows)
    assert {(row[1], row[-1].strip(" |")) for row in rows} <= {(check, why) for (check, _), why in REASONS.items()}
