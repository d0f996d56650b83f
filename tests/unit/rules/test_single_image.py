"""BN209."""

from __future__ import annotations

from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_shares, run_rule
from unit.rules.effects import metric, tried
from unit.rules.expect import failed, passed

MESSAGE = "A batch is one sample, which is normalized with its own mean and variance in training."
FINE = "The layer is not an instance norm in training."


def test_batches_of_one_sample_are_an_instance_norm() -> None:
    layers = [
        make_layer("steady"),
        make_layer("flagged", make_shares(small_batch=0.3)),
        make_layer("one value", values_per_channel=1),
        make_layer("frozen"),
    ]
    anatomy = [make_anatomy(layer.name, trains_statistics=layer.name != "frozen") for layer in layers]
    assert run_rule("BN209", make_evidence(*layers, anatomy=anatomy, batch_size=1)) == [
        failed("BN209", "steady", MESSAGE, 1.0, 1.0, "warning"),
        failed("BN209", "flagged", MESSAGE, 1.0, 1.0, "error"),
        passed("BN209", "one value", FINE, 1.0, 1.0),
        passed("BN209", "frozen", FINE, 1.0, 1.0),
    ]


def test_batches_of_two_are_not() -> None:
    assert run_rule("BN209", make_evidence(make_layer(), batch_size=2)) == [passed("BN209", "bn", FINE, 2.0, 1.0)]


def test_eval_comes_first_where_the_weights_were_trained_on_larger_batches() -> None:
    layer = make_layer("bn", make_shares(small_batch=0.3))
    better, worse = metric(0.1, 0.9), metric(0.9, 0.1)
    of_single = tried(0.9, 0.1, "instance statistics")
    for gap, remedies, start in (
        (better, (tried(0.9, 0.9), of_single), "If this is not training (serving"),
        (
            better,
            (tried(0.8, 0.9), of_single),
            "Train with larger batches",
        ),  # its statistics are those of single samples
        (better, (), "Train with larger batches"),
        (worse, (tried(0.1, 0.1), of_single), "Train with larger batches"),
        (worse, (tried(0.1, 0.1), tried(0.1, 0.9, "instance statistics")), "Normalize every sample with its own"),
    ):
        [verdict] = run_rule("BN209", make_evidence(layer, gaps=(gap,), remedies=remedies, batch_size=1))
        assert verdict.severity == "error"
        assert verdict.remedy.startswith(start)
