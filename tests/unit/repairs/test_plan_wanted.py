from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

import bnprobe
from bnprobe.errors import RepairError
from bnprobe.nn.batch_renorm import BatchRenorm2d
from bnprobe.records import Diagnosis, Report
from bnprobe.repairs import wanted_by_globs, wanted_from_report
from support.networks import Flat, Residual, images, unsettled
from unit.repairs.models import Branches


@pytest.fixture(scope="module")
def report() -> Report:
    """Of Residual, of which bn2 alone is flagged, for two reasons."""
    made = bnprobe.scan(unsettled(Residual()), images(8, 2, 3, 8, 8), 2, num_batches=8)
    first, second = made.layers
    small, lag = (
        Diagnosis(cause, "BN2", "error", ("bn2",), None, "", "") for cause in ("small_batch", "lag")
    )  # fmt: skip
    layers = (replace(first, flagged=False), replace(second, flagged=True))
    return replace(made, layers=layers, diagnoses=(small, lag))


def test_flagged_layers_are_wanted_with_the_worse_figure_and_the_first_cause(report: Report) -> None:
    layer = report.layers[1]
    worse = min(path.equivalent_batch_size for path in (layer.train, layer.eval))
    wanted = wanted_from_report(report, Residual())
    assert wanted == {"bn2": f"flagged: n_eq {worse:.3g}, below 32 (small batch)"}


def test_a_flagged_layer_without_figure_or_cause_is_wanted_too(report: Report) -> None:
    layers = (report.layers[0], replace(report.layers[1], train=None, eval=None))
    assert wanted_from_report(replace(report, layers=layers, diagnoses=()), Residual()) == {
        "bn2": "flagged: n_eq not measurable (values overflow)"
    }


def test_a_report_from_another_model_is_refused(report: Report) -> None:
    with pytest.raises(RepairError, match=r"from another model \(Residual\): layer bn1 \(BatchNorm2d\) is not in"):
        wanted_from_report(report, Flat())
    with pytest.raises(RepairError, match="bn1 is BatchNorm2d there and BatchNorm3d here"):
        wanted_from_report(report, Residual(3))
    wider = Residual()
    wider.bn2 = nn.BatchNorm2d(8)
    with pytest.raises(RepairError, match="bn2 has 4 channels there and 8 here"):
        bnprobe.convert(wider, report)


def test_where_no_layer_is_flagged_those_are_wanted_that_an_error_advises_to_convert(report: Report) -> None:
    layers = tuple(replace(layer, flagged=False) for layer in report.layers)
    advised = Diagnosis(
        "single_image", "BN209", "error", ("bn1",), None, "", "Fine-tune (bnprobe convert --to frozen)."
    )
    of_the_model = replace(advised, cause="inconsistency", rule="BN211", layers=())
    other = replace(advised, cause="lag", rule="BN203", layers=("bn2",), remedy="Recalibrate (bnprobe recalibrate).")
    for diagnoses, wanted in (
        ((advised, other), {"bn1": "one sample at a time"}),
        ((of_the_model,), {"bn1": "worse at inference", "bn2": "worse at inference"}),
        ((replace(advised, severity="warning"), other), {}),
    ):
        assert wanted_from_report(replace(report, layers=layers, diagnoses=diagnoses), Residual()) == wanted


def test_convert_takes_a_report(report: Report) -> None:
    converted = bnprobe.convert(Residual(), report)
    assert type(converted.bn1) is nn.BatchNorm2d
    assert type(converted.bn2) is BatchRenorm2d
    clean = replace(report, layers=tuple(replace(layer, flagged=False) for layer in report.layers))
    with pytest.raises(RepairError, match="The report flags no layer"):
        bnprobe.convert(Residual(), clean)


def test_globs_match_any_name_of_a_layer() -> None:
    model = Branches()
    assert wanted_by_globs(model, ["path.*"]) == {"bn": "matches path.*"}
    assert wanted_by_globs(model, ["keyed.first", "*"]) == {
        "bn": "matches *",
        "listed.0": "matches *",
        "keyed.first": "named",
    }
    assert wanted_by_globs(nn.BatchNorm2d(3), ["(root)"]) == {"(root)": "named"}


def test_a_glob_that_matches_nothing_is_refused_with_the_nearest() -> None:
    with pytest.raises(RepairError, match=r'No BN layer is called or matches "bm1"; the nearest name is "bn1"\.'):
        wanted_by_globs(Residual(), ["bn2", "bm1"])


def test_a_module_named_that_is_no_norm_is_left_to_the_plan() -> None:
    assert wanted_by_globs(Residual(), ["conv"]) == {"conv": "named"}
    with pytest.raises(RepairError, match=r"conv \(Conv2d\) is not a Batch Normalization layer\."):
        bnprobe.convert(Residual(), ["conv"])
