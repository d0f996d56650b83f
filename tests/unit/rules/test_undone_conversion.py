"""BN108."""

from __future__ import annotations

from dataclasses import replace

from bnprobe.testing import make_anatomy, make_evidence, run_rule
from unit.rules.expect import failed, passed

UNMARKED = "No tensor in a checkpoint shows that the layer was converted."
HOW = "Convert the layers in load_model() before the weights are loaded: bnprobe.convert(model, [...], to={})."


def test_layers_fail_whose_weights_are_those_of_converted_ones() -> None:
    layers = [make_anatomy(name, kind="SyncBatchNorm") for name in ("usual", "domains", "gates")]
    facts = replace(make_evidence(anatomy=layers), undone={"domains": "per-domain", "gates": "gated"})
    message = "The checkpoint has tensors of a layer converted to {}, but the layer is SyncBatchNorm: it {}."
    assert run_rule("BN108", facts) == [
        passed("BN108", "usual", UNMARKED),
        replace(
            failed("BN108", "domains", message.format("per-domain", "gives other outputs")),
            severity="error",
            remedy=HOW.format('"per-domain"'),
        ),
        replace(
            failed(
                "BN108",
                "gates",
                message.format("gated", "trains as plain BN does, while inference is the same"),
            ),
            remedy=HOW.format('"gated"'),
        ),
    ]
