"""What a second scan says of converted layers that cannot differ, or cannot be measured."""

from __future__ import annotations

import pytest

import bnprobe
from bnprobe.errors import NothingToProbeError
from support.networks import Residual, images, unsettled

REASONS = {
    "frozen": "the same constants in training and at inference",
    "cross-iteration": "statistics of earlier batches, too, which a scan of single batches does not follow",
    "mabn": "statistics of earlier batches, too, which a scan of single batches does not follow",
    "per-domain": "statistics per domain, which a scan does not tell apart",
    "instance-renorm": "the same output in training and at inference",
    "example-weighing": "at inference every sample's own statistics enter",
}


@pytest.mark.parametrize("to", REASONS)
def test_layers_without_a_mismatch_to_measure_are_skipped_by_name(to: str) -> None:
    model = bnprobe.convert(unsettled(Residual()), ["bn1"], to=to)
    with bnprobe.nn.domain(0):
        report = bnprobe.scan(model, images(8, 2, 3, 8, 8), 2, num_batches=8)
    assert [layer.name for layer in report.layers] == ["bn2"]
    assert [(layer.name, REASONS[to] in layer.reason) for layer in report.skipped] == [("bn1", True)]
    with pytest.raises(NothingToProbeError, match=REASONS[to]):
        bnprobe.scan(bnprobe.convert(model, ["bn2"], to=to), images(8, 2, 3, 8, 8), 2, num_batches=8)
