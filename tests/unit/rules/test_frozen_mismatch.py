"""BN105."""

from __future__ import annotations

import pytest

from bnprobe.rules.effect import WITH_FROZEN
from bnprobe.testing import make_anatomy, make_evidence, make_layer, run_rule
from unit.rules.effects import metric, tried
from unit.rules.expect import failed, passed, skipped


def test_both_halves_must_be_trained_or_frozen() -> None:
    layers = [
        make_anatomy("trained"),
        make_anatomy("frozen", trains_statistics=False, trains_affine=False),
        make_anatomy("drifting", trains_affine=False),
        make_anatomy("standing", trains_statistics=False),
        make_anatomy("plain", trains_affine=None),
        make_anatomy("none kept", has_running_statistics=False, trains_statistics=False),
    ]
    assert run_rule("BN105", make_evidence(anatomy=layers)) == [
        passed("BN105", "trained", "Running statistics, weight and bias are all trained."),
        passed("BN105", "frozen", "Running statistics, weight and bias are all frozen."),
        failed(
            "BN105",
            "drifting",
            "Weight and bias are frozen (requires_grad=False), but training updates the running statistics.",
        ),
        failed(
            "BN105",
            "standing",
            "The running statistics are frozen (eval mode during training), but weight and bias are trained.",
        ),
        skipped("BN105", "plain", "the layer has no weight and bias (affine=False)"),
        skipped("BN105", "none kept", "the layer has no running statistics"),
    ]


@pytest.mark.parametrize(
    ("inference", "recalibrated", "remedy"),
    [
        (0.9, None, "To freeze the layer, also call eval()"),
        (0.5, None, "Do not freeze the running statistics as they are"),
        (0.5, 0.8, "First recalibrate the running statistics"),
    ],
)
def test_statistics_that_move_are_to_be_frozen_only_where_they_do_no_harm(
    inference: float, recalibrated: float | None, remedy: str
) -> None:
    remedies = () if recalibrated is None else (tried(0.5, recalibrated),)
    layer, anatomy = make_layer("bn"), [make_anatomy("bn", trains_affine=False)]
    facts = make_evidence(layer, anatomy=anatomy, gaps=(metric(0.9, inference),), remedies=remedies)
    assert [verdict.remedy[: len(remedy)] for verdict in run_rule("BN105", facts)] == [remedy]


@pytest.mark.parametrize(
    ("after", "remedy"),
    [(0.4, "Keep the running statistics as they are"), (0.95, "Recalibrate"), (0.8, "If the layer")],
)
def test_fixed_statistics_are_to_be_replaced_only_where_others_are_better(after: float, remedy: str) -> None:
    layer, anatomy = make_layer("bn"), [make_anatomy("bn", trains_statistics=False)]
    facts = make_evidence(layer, anatomy=anatomy, gaps=(metric(0.9, 0.8),), remedies=(tried(0.8, after, WITH_FROZEN),))
    assert [verdict.remedy[: len(remedy)] for verdict in run_rule("BN105", facts)] == [remedy]


@pytest.mark.parametrize(
    ("inference", "after", "found"),
    [
        (0.9, None, ("info", "None is needed: inference is no worse")),
        (0.9, 0.9, ("info", "None is needed: inference is no worse")),
        (0.9, 0.95, ("warning", "Recalibrate these statistics")),
        (0.5, None, ("warning", "If the layer is to be frozen")),
    ],
)
def test_fixed_statistics_that_do_no_harm_are_a_remark(
    inference: float, after: float | None, found: tuple[str, str]
) -> None:
    """As in fine-tuning a small-batch detector: frozen statistics with trained weight and bias are intended."""
    remedies = () if after is None else (tried(0.9, after, WITH_FROZEN),)
    layer, anatomy = make_layer("bn"), [make_anatomy("bn", trains_statistics=False)]
    facts = make_evidence(layer, anatomy=anatomy, gaps=(metric(0.9, inference),), remedies=remedies)
    [verdict] = run_rule("BN105", facts)
    assert (verdict.severity, verdict.remedy[: len(found[1])]) == found
