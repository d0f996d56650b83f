"""BN210."""

from __future__ import annotations

from bnprobe.records import Verdict
from bnprobe.testing import make_evidence, make_layer, run_rule
from unit.rules.expect import failed, passed, skipped

LEFT = "1,001 samples in batches of 8 leave a last batch of one sample"
SILENT = "it is normalized with its own statistics, and updates the running statistics like a whole batch."
STOPS = "training raises an error there, because it gives layer bn one value per channel."


def last_batch(values_per_channel: int = 512, **changes: object) -> list[Verdict]:
    return run_rule("BN210", make_evidence(make_layer(values_per_channel=values_per_channel), batch_size=8, **changes))


def test_one_sample_left_over_fails_unless_it_is_dropped() -> None:
    assert last_batch(images=1001, drop_last=False) == [failed("BN210", None, f"{LEFT}; {SILENT}", 1.0, 1.0)]
    unless = f"{LEFT}, unless the training loader drops it; {SILENT}"
    assert last_batch(images=1001) == [failed("BN210", None, unless, 1.0, 1.0)]
    dropped = "1,001 samples in batches of 8 leave 1 over. The loader drops a partial last batch."
    assert last_batch(images=1001, drop_last=True) == [passed("BN210", None, dropped, 1.0, 1.0)]
    two = "1,002 samples in batches of 8 leave 2 over."
    assert last_batch(images=1002, drop_last=False) == [passed("BN210", None, two, 2.0, 1.0)]


def test_it_is_an_error_where_training_is_sure_to_stop() -> None:
    stopping = failed("BN210", None, f"{LEFT}; {STOPS}", 1.0, 1.0, "error")
    assert last_batch(8, images=1001, drop_last=False) == [stopping]
    assert [verdict.severity for verdict in last_batch(8, images=1001)] == ["warning"]


def test_unknown_numbers_are_skipped() -> None:
    unknown = [skipped("BN210", None, "how many samples an epoch has is not known")]
    assert last_batch() == unknown
    assert last_batch(images=1001, synthetic=True) == unknown
