"""Two reports of one model: what makes the comparison fail, and what only weakens it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from bnprobe.commands.verify import compare as verify
from bnprobe.errors import UsageError
from bnprobe.records import Environment, Layer, LayerComparison, Output, Report, SkippedLayer, Summary, Tool
from bnprobe.testing import make_layer, make_path, make_scan

FINE, BAD = 0.004, 0.4
ENVIRONMENT = Environment("3.11.7", "2.13.0", "Linux", "x86_64", 1)


def layer(name: str, mismatch: float | None = FINE, **changes: Any) -> Layer:
    path = None if mismatch is None else make_path(mismatch)
    return make_layer(name, train=path, eval=path, **changes)


def report(*layers: Layer, output: float | None = 0.2, **scan: Any) -> Report:
    flagged = sum(each.flagged for each in layers)
    summary = Summary(len(layers), flagged, 0, 0, Output(output, None, None, None, None))
    return Report(1, Tool("bnprobe", "0.1.0"), ENVIRONMENT, make_scan(**scan), summary, layers, (), (), (), ())


def test_a_repair_that_holds() -> None:
    found = verify(report(layer("a", BAD), layer("b")), report(layer("a"), layer("b", 0.005), output=0.1))
    assert found.passed
    assert (found.problems, found.notes, found.only_before, found.only_after) == ((), (), (), ())
    assert found.layers == (
        LayerComparison("a", pytest.approx(BAD), pytest.approx(FINE), True, False),
        LayerComparison("b", pytest.approx(FINE), pytest.approx(0.005), False, False),
    )
    assert (found.output_before, found.output_after) == (0.2, 0.1)


def test_a_layer_that_is_undecided_now_is_told() -> None:
    found = verify(report(layer("a", BAD)), report(layer("a", undecided=True)))
    assert [each.undecided_after for each in found.layers] == [True]
    assert found.notes == ("Undecided after the repair (more batches would decide): a.",)


def test_two_reports_with_the_same_figures_have_no_change_and_pass() -> None:
    one = report(layer("a", BAD), layer("b"))
    found = verify(one, replace(one, scan=replace(one.scan, seconds=9.0, command="bnprobe scan model.py")))
    assert (found.passed, found.unchanged, found.problems) == (True, True, ())
    assert not verify(one, replace(one, scan=replace(one.scan, partial=True, stopped="interrupted"))).passed
    assert not verify(one, report(layer("a", BAD), layer("b", 1.01 * FINE))).unchanged


def test_the_worse_path_is_compared() -> None:
    before = make_layer("a", train=make_path(0.3), eval=make_path(0.1))
    after = make_layer("a", train=None, eval=make_path(0.01))
    found = verify(report(before), report(after))
    assert (found.layers[0].before, found.layers[0].after) == (pytest.approx(0.3), pytest.approx(0.01))


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (report(layer("a", BAD)), report(layer("a", 1.1 * BAD)), "Still flagged: a."),
        (report(layer("a"), layer("b")), report(layer("a", BAD), layer("b", BAD)), "Newly flagged: a, b."),
        (report(layer("a")), report(layer("a"), layer("new", BAD)), "Newly flagged: new."),
        (
            report(layer("a", BAD), layer("b")),
            report(layer("a", None, flagged=False), layer("b")),
            "1 of 1 flagged layer was not measured again, so its mismatch is not known: a.",
        ),
        (
            report(layer("a", BAD), layer("b"), layer("c", BAD)),
            replace(report(layer("b"), layer("c")), skipped=(SkippedLayer("a", "Norm", "earlier batches"),)),
            "1 of 2 flagged layers was not measured again, so its mismatch is not known: a.",
        ),
        (
            report(layer("a")),
            report(layer("a"), output=0.23),
            "The outputs of training and inference are farther apart than before: 0.23, before 0.2 (relative L2).",
        ),
        (
            report(layer("a")),
            report(layer("a"), output=None),
            "The outputs of training and inference could be compared before the repair, but not after it.",
        ),
        (
            report(layer("a")),
            report(layer("a"), partial=True, stopped="interrupted"),
            "The second scan ended early (interrupted), so the repair cannot be verified. Scan again.",
        ),
        (
            report(layer("a", BAD), layer("b"), layer("c", BAD)),
            report(layer("b"), unselected=("a", "c")),
            "Flagged before, and left out of the second scan by --include/--exclude: a, c.",
        ),
        (
            report(layer("a")),
            report(layer("a"), batch_size=32),
            "The second scan used a larger batch size (32, before 8), which makes every layer look better."
            " Scan again with --batch-size 8.",
        ),
    ],
)
def test_what_makes_it_fail(before: Report, after: Report, problem: str) -> None:
    found = verify(before, after)
    assert not found.passed
    assert (found.problems, found.notes) == ((problem,), ())


def test_outputs_that_moved_by_sampling_pass() -> None:
    assert verify(report(layer("a")), report(layer("a"), output=0.21)).passed


def test_a_flagged_layer_that_is_gone_was_repaired() -> None:
    found = verify(report(layer("a", BAD), layer("b")), report(layer("b")))
    assert found.passed
    assert found.only_before == ("a",)
    frozen = SkippedLayer("a", "FrozenBatchNorm2d", "the same constants in training and at inference", agrees=True)
    assert verify(report(layer("a", BAD), layer("b")), replace(report(layer("b")), skipped=(frozen,))).passed


def test_a_layer_left_out_of_both_scans_is_no_problem() -> None:
    found = verify(report(layer("b", BAD), unselected=("a",)), report(layer("b"), unselected=("a",)))
    assert found.passed
    assert found.notes == ()


def test_a_layer_left_out_that_was_not_flagged_is_said() -> None:
    found = verify(report(layer("a"), layer("b", BAD)), report(layer("b"), unselected=("a",)))
    assert found.passed
    assert found.notes == ("Not flagged before, and left out of the second scan by --include/--exclude: a.",)


def test_layers_stand_in_network_order() -> None:
    names = ("a", "c", "gone", "e"), ("new", "a", "b", "c", "e", "f")
    before, after = (report(*(layer(name) for name in each)) for each in names)
    found = verify(before, after)
    assert [each.name for each in found.layers] == ["new", "a", "b", "c", "gone", "e", "f"]
    assert (found.only_before, found.only_after) == (("gone",), ("new", "b", "f"))


@pytest.mark.parametrize("after", [("c", "a", "b"), ("b", "x", "a", "c"), ("c", "b", "a")])
def test_layers_in_another_order_are_all_there_once(after: tuple[str, ...]) -> None:
    found = verify(report(*map(layer, ("a", "b", "c"))), report(*map(layer, after)))
    assert sorted(each.name for each in found.layers) == sorted({"a", "b", "c", *after})


def test_reports_of_different_models_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no layer in common\. The first layers are a \(.+\) and b \("):
        verify(report(layer("a")), report(layer("b")))
    with pytest.raises(UsageError, match=r"The first layers are a .+ and none "):
        verify(report(layer("a")), report())


def test_scans_of_different_layers_of_one_model_are_refused() -> None:
    before, after = report(layer("a", BAD), unselected=("b",)), report(layer("b"), unselected=("a",))
    with pytest.raises(UsageError, match=r"no layer in common: --include/--exclude selected different layers"):
        verify(before, after)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"batch_size": 4}, "The batch size differs: 8 before, 4 after."),
        ({"seed": 7}, "The seed differs: 0 before, 7 after."),
        ({"data": "other"}, "The data differs: .+ before, other after."),
        ({"autocast": "bfloat16"}, "The autocast differs: none before, bfloat16 after."),
        ({"synthetic": True}, "The second scan used synthetic inputs"),
    ],
)
def test_what_weakens_the_comparison(changes: dict[str, Any], note: str) -> None:
    found = verify(report(layer("a")), report(layer("a"), **changes))
    assert found.passed
    assert len(found.notes) == 1
    assert re.match(note, found.notes[0])


def test_thresholds_that_were_moved_are_said() -> None:
    after = report(layer("a", BAD, threshold=2.0), layer("b"))
    found = verify(report(layer("a", BAD), layer("b")), after)
    assert found.passed
    assert found.notes == ("The threshold differs in 1 of 2 layers, first in a: 32 before, 2 after.",)


def test_what_is_undecided_is_said() -> None:
    found = verify(report(layer("a", BAD)), report(layer("a", undecided=True)))
    assert found.passed
    assert found.notes == ("Undecided after the repair (more batches would decide): a.",)


def test_other_versions_are_said() -> None:
    after = replace(report(layer("a")), tool=Tool("bnprobe", "9.9"))
    assert verify(report(layer("a")), after).notes == ("The version of bnprobe differs: 0.1.0 before, 9.9 after.",)
