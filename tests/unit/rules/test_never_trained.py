"""BN102."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bnprobe.records import Gap
from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_shares, run_rule
from unit.rules.expect import failed, passed, skipped

START = "All running means are 0 and all running variances 1, as in a new layer"
NEW = f"{START}, and no update is counted. Was the checkpoint not loaded, or loaded without buffers?"


def test_a_new_layer_among_trained_ones_is_an_error() -> None:
    layers = [
        make_anatomy("trained"),
        make_anatomy("new", untouched=True, batches_tracked=0),
        make_anatomy("uncounted", untouched=True, batches_tracked=None),
        make_anatomy("counted", untouched=True, batches_tracked=1),
        make_anatomy("held", untouched=True, momentum=0.0),
        make_anatomy("none kept", has_running_statistics=False),
    ]
    assert run_rule("BN102", make_evidence(anatomy=layers)) == [
        passed("BN102", "trained", "The running statistics differ from mean 0 and variance 1.", 1200.0),
        failed("BN102", "new", NEW, 0.0),
        failed("BN102", "uncounted", NEW),
        failed("BN102", "counted", f"{START}, although num_batches_tracked is 1. Was momentum 0, or a reset?", 1.0),
        failed("BN102", "held", f"{START}: momentum=0 never updates them.", 1200.0),
        skipped("BN102", "none kept", "the layer has no running statistics"),
    ]


def test_a_model_that_is_new_throughout_is_only_remarked_on() -> None:
    layers = [make_anatomy(name, untouched=True, batches_tracked=0) for name in "ab"]
    assert run_rule("BN102", make_evidence(anatomy=layers)) == [
        failed("BN102", "a", NEW, 0.0, None, "info"),
        failed("BN102", "b", NEW, 0.0, None, "info"),
    ]


def test_a_scan_tells_whether_it_does_harm() -> None:
    layers = [make_layer("off", make_shares(lag=0.5)), make_layer("fits")]
    names = [*(layer.name for layer in layers), "uncalled"]
    anatomy = [make_anatomy(name, untouched=True, batches_tracked=0, affine_moved=True) for name in names]
    told = f"{START}, but weight or bias were trained. Was the checkpoint loaded, or averaged, without buffers?"
    uncalled = failed("BN102", "uncalled", f"{START}, and the forward pass never calls it.", 0.0, None, "info")
    facts = make_evidence(*layers, anatomy=anatomy, called=frozenset(["off", "fits"]))
    assert run_rule("BN102", facts) == [
        failed("BN102", "off", told, 0.0, None, "error"),
        failed("BN102", "fits", told, 0.0, None, "warning"),
        replace(uncalled, remedy="None is needed, unless the model was meant to use the layer."),
    ]


def test_a_new_network_is_an_error_where_a_layer_is_flagged_and_nothing_shows_that_it_costs_nothing() -> None:
    layers = [make_layer("off", make_shares(lag=0.5)), make_layer("fits")]
    new = [make_anatomy(layer.name, untouched=True, batches_tracked=0, affine_moved=False) for layer in layers]

    def severities(**scored: Any) -> list[str]:
        return [verdict.severity for verdict in run_rule("BN102", make_evidence(*layers, anatomy=new, **scored))]

    assert severities() == ["error", "info"]
    better = Gap("loss", 0.5, 0.4, 0.4, None, -0.1, 0.0, None, inconsistency_interval=(-0.12, -0.08))
    assert severities(gaps=(better,)) == ["info", "info"]


def test_updates_that_are_not_counted_do_not_make_a_layer_new() -> None:
    uncounted = make_anatomy("bn", batches_tracked=0)
    assert not make_evidence(anatomy=[uncounted]).is_new
    assert [verdict.outcome for verdict in run_rule("BN102", make_evidence(anatomy=[uncounted]))] == ["passed"]
