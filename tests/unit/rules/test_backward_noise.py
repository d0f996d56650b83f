"""BN303."""

from __future__ import annotations

from bnprobe.records import Backward
from bnprobe.testing import make_evidence, make_layer, run_rule
from unit.rules.expect import failed, passed, skipped


def test_only_noise_that_is_surely_too_much_fails() -> None:
    layers = [
        make_layer("noisy", backward=Backward(0.5, (0.4, 0.6), 4.0)),
        make_layer("unsure", backward=Backward(0.1, (0.05, 0.15), 20.0)),
        make_layer("silent", backward=Backward(0.0, None, None)),
        make_layer("unreached"),
    ]
    start = "In the backward pass, the statistics of a batch are as noisy as those of"
    assert run_rule("BN303", make_evidence(*layers)) == [
        failed(
            "BN303",
            "noisy",
            f"{start} 4 independent values (95%: at most 5); this noise is 50% of the gradient's mean square.",
            4.0,
            32.0,
        ),
        passed("BN303", "unsure", f"{start} 20 independent values.", 20.0, 32.0),
        passed("BN303", "silent", f"{start} any number of independent values.", None, 32.0),
        skipped("BN303", "unreached", "no gradient reaches the layer"),
    ]


def test_gradients_are_asked_for() -> None:
    reason = "needs gradients: scan with --gradients and a loss"
    assert run_rule("BN303", make_evidence(make_layer())) == [skipped("BN303", None, reason)]
