"""The view of a run that a monitor watches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rich.cells import cell_len

from bnprobe.records import LayerSample, ModeLoss, MonitorChange, MonitorFinding, MonitorLog, MonitorSample
from bnprobe.report import RenderOptions, watch
from bnprobe.report.charts import sparkline
from bnprobe.stats.theory import equivalent_batch_size


def _layer(mismatch: float) -> LayerSample:
    return LayerSample(mismatch, equivalent_batch_size(mismatch) if math.isfinite(mismatch) else None, 0.9, 0.1)


def _sample(step: int, mismatches: list[float]) -> MonitorSample:
    layers = {f"layer{number}.bn": _layer(each) for number, each in enumerate(mismatches)}
    return MonitorSample(step, 8, 0.38, ModeLoss(0.3, 0.3 + step / 1000), layers)


FINDING = MonitorFinding(216, 200, "BN201", "small_batch", "error", ("layer3.bn",), "Too few values.", "Use more.")
LOG = MonitorLog(
    "run/monitor.jsonl",
    "0.1.0",
    "Net",
    100,
    skipped={"norm": "it is frozen"},
    samples=tuple(_sample(step, [step / 1e5 * number for number in range(12)]) for step in range(100, 1300, 100)),
    findings=(FINDING, replace(FINDING, step=316, message="Still too few.")),
    unreadable=1,
)


def _lines(log: MonitorLog, **options: int | bool) -> list[str]:
    return watch.render(log, RenderOptions(**options)).splitlines()  # type: ignore[arg-type]


def test_it_shows_the_run_the_loss_the_worst_layers_and_each_rule_once() -> None:
    lines = _lines(LOG)
    text = "\n".join(lines)
    assert lines[0] == "bnprobe 0.1.0: training of Net"
    assert "sampled  every 100 steps; the last at step 1,200, of 8 samples" in lines
    assert "skipped  1 layer: norm" in lines
    assert "damaged  1 line" in lines
    assert "  in train mode   0.3  ▁▁▁▁▁▁▁▁▁▁▁▁" in lines
    assert "  in eval mode    1.5  ▂▂▃▃▄▄▅▆▆▇▇█" in lines
    assert "Outputs of the last batch differ by 38%." in text
    rows = [line.split() for line in lines if ".bn " in line and "step" not in line]
    assert [row[0] if row[0] != "✗" else row[1] for row in rows] == [f"layer{number}.bn" for number in range(11, 2, -1)]
    assert rows[-1][:2] == ["✗", "layer3.bn"]
    assert "✗ step 216: BN201 in layer3.bn, 2 times, the last at step 316" in lines
    assert "Still too few." in text
    assert "Too few values." not in text


def test_all_layers_are_shown_where_it_is_asked_for() -> None:
    assert sum(".bn" in line for line in _lines(LOG, show_all=True)) == sum(".bn" in line for line in _lines(LOG)) + 3


def test_before_there_is_much() -> None:
    assert _lines(MonitorLog("log")) == ["– log is empty: the run has not begun."]
    begun = _lines(MonitorLog("log", "0.1.0", "Net", 100, step=300))
    assert "sampled  every 100 steps; none yet, resumed at step 300" in begun
    assert begun[-1] == "✓ Nothing was found so far."


def test_what_is_not_finite_or_not_known() -> None:
    odd = replace(_sample(5, [math.nan, math.inf, 0.0]), output=None, loss=ModeLoss(math.nan, 1.0))
    lines = _lines(replace(LOG, samples=(odd,)))
    assert ["in", "train", "mode", "–"] in [line.split() for line in lines]
    assert {line.split()[0]: line.split()[1] for line in lines if ".bn " in line and "step" not in line} == {
        "layer0.bn": "–",
        "layer1.bn": "–",
        "layer2.bn": "∞",
    }
    lines = _lines(replace(LOG, samples=(replace(odd, loss=None, layers={}),)))
    assert "The loss could not be computed again in eval mode." in lines
    assert "No layer with running statistics was called in the last sample." in lines


def test_layers_in_eval_mode_are_marked_where_there_are_any() -> None:
    held = _sample(100, [0.1, 0.2])
    layers = {**held.layers, "layer0.bn": replace(held.layers["layer0.bn"], frozen=True)}
    lines = _lines(replace(LOG, samples=(replace(held, layers=layers),)), width=100)
    rows = {line.split()[0]: line.split() for line in lines if ".bn " in line and "step" not in line}
    assert "eval" in rows["layer0.bn"]
    assert "train" in rows["layer1.bn"]
    assert "A layer in eval mode uses its running statistics" in " ".join(lines)
    assert not any("mode  " in line and "n_eq" in line for line in _lines(LOG))


def test_layers_that_the_monitor_changed_are_marked_until_it_takes_that_back() -> None:
    def row(*changes: MonitorChange) -> list[str]:
        lines = _lines(replace(LOG, changes=changes))
        (found,) = [line.split() for line in lines if " layer3.bn " in line and "step" not in line]
        return found

    freeze, undo = MonitorChange(320, "freeze", ("layer3.bn",)), MonitorChange(900, "undo", ("layer3.bn",))
    assert row()[0] == row(freeze)[0] == "✗"
    assert row(freeze)[-2] == "freeze"  # before the curve
    assert "freeze" not in row()
    assert row(freeze, undo) == row()[1:]  # the finding is of before
    later = replace(FINDING, step=1000)
    log = replace(LOG, changes=(freeze, undo), findings=(FINDING, later))
    assert watch.signs_of_layers(log) == {"layer3.bn": "✗"}


def test_few_samples_without_a_finding_are_said_to_be_few() -> None:
    log = replace(LOG, findings=(), taken=12)
    text = " ".join(" ".join(_lines(log)).split())
    assert "Nothing was found so far. After 12 samples this says little" in text
    for more in (replace(log, taken=16), replace(log, taken=0), replace(LOG, taken=12)):
        assert watch.few_samples(more) == ""


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("unicode", [False, True])
def test_it_fits(width: int, unicode: bool) -> None:
    text = watch.render(LOG, RenderOptions(width=width, unicode=unicode))
    assert max(map(cell_len, text.splitlines())) <= width
    assert unicode or text.isascii()


def test_a_curve_is_made_of_means() -> None:
    assert sparkline([0.0, 1.0, 2.0, 3.0], 0.0, 3.0, 10) == "▁▃▆█"
    assert sparkline([0.0, 1.0, 2.0, 3.0], 0.0, 3.0, 2) == "▂▇"
    assert sparkline([-9.0, math.nan, math.inf], 0.0, 1.0, 3) == "▁ █"
    assert sparkline([], 0.0, 1.0, 3) == ""
    assert sparkline([1.0], 1.0, 1.0, 3) == "▁"
