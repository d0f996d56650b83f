"""BN202."""

from __future__ import annotations

from bnprobe.records import Composition
from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.expect import HALF, failed, passed, skipped

SORTED = make_shares(composition=0.3)


def test_alike_images_are_told_in_numbers_of_images() -> None:
    layer = make_layer("bn", SORTED, composition=Composition(0.43, 4.01, 1e-9))
    assert run_rule("BN202", make_evidence(layer, batch_size=8)) == [
        failed(
            "BN202",
            "bn",
            "Two images of a batch correlate 0.43 (0 if drawn at random, 1 if the same), so that a batch of 8 stands"
            " for 2 independent images; the chance of that with shuffled batches is less than 1 in 10,000."
            " (D = 0.3 of 0.3, 98%; a layer may have 0.047 in all.)",
            0.3,
            HALF,
        )
    ]


def test_what_chance_explains_passes_and_small_batches_are_blamed() -> None:
    layer = make_layer("bn", SORTED, composition=Composition(0.02, 1.1, 0.01))
    facts = make_evidence(layer)
    unsure = "It makes up D = 0.3, but is not sure to matter, or would not without the larger causes."
    told = passed("BN202", "bn", unsure, 0.3, HALF)
    assert run_rule("BN202", facts) == [told]
    assert [verdict.outcome for verdict in run_rule("BN201", facts)] == ["failed"]


def test_images_that_could_not_be_told_apart_are_skipped() -> None:
    layer = make_layer("bn", make_shares(composition=None), note="One image per batch.")
    reason = "the layer's mismatch could not be taken apart (One image per batch)"
    assert run_rule("BN202", make_evidence(layer)) == [skipped("BN202", "bn", reason)]


def test_synthetic_images_have_no_order() -> None:
    facts = make_evidence(make_layer("bn", SORTED), synthetic=True)
    assert run_rule("BN202", facts) == [skipped("BN202", None, "synthetic images: only real data can show it")]
