"""The benchmark of the monitor: its runs are what they say, and its tables count right."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.monitor import score
from benchmarks.monitor.__main__ import main, render
from benchmarks.monitor.faults import FAULTS
from benchmarks.monitor.runs import BASE, HEALTHY, NETS, Loop, Outcome, Recipe, loop_of, run, shifted

QUICK = "mlp"


def loop() -> Loop:
    return loop_of(QUICK, 1, Recipe())


def test_there_are_as_many_runs_as_asked_for() -> None:
    assert len(HEALTHY) * sum(healthy for healthy, _ in NETS.values()) >= 200
    assert all(healthy >= faulty for healthy, faulty in NETS.values())  # each has its twin


def test_rates_follow_their_schedule() -> None:
    rates = [Recipe(rate=1.0, schedule="drops").rate_at(part) for part in (0.0, 0.49, 0.5, 0.8)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01])
    cosine = Recipe(rate=1.0, schedule="cosine")
    assert [cosine.rate_at(part) for part in (0.0, 0.05, 0.5, 1.0)] == pytest.approx([0, 0.5, 0.5, 0], abs=1e-6)


def test_moved_images_are_moved_by_a_pixel_at_most() -> None:
    image = torch.zeros(200, 1, 8, 8)
    image[:, 0, 4, 4] = 1
    places = {tuple(one[0].nonzero()[0].tolist()) for one in shifted(image)}
    assert places == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}


@pytest.mark.parametrize("size", [8, 4, 2])
def test_batches_shrink(size: int) -> None:
    made = loop()
    FAULTS[f"batches shrink to {size}"](made)
    assert len(made.batch()[1]) == size


def test_a_part_of_a_batch_is_of_one_class() -> None:
    for part, words in ((8, "a quarter"), (16, "half"), (32, "all")):
        made = loop()
        FAULTS[f"{words} of every batch of one class"](made)
        _, classes = made.batch()
        assert len(classes) == 32
        assert len(classes[:part].unique()) == 1
        assert (len(classes.unique()) == 1) == (part == 32)


def test_a_domain_shifts_and_comes_back() -> None:
    made = loop()
    plain, _ = made.batch()
    back = FAULTS["domain shifts, brightness by 1, and back"](made)
    shifted_, _ = made.batch()
    assert float(shifted_.mean() - plain.mean()) == pytest.approx(float(plain.std()), rel=0.2)
    assert callable(back)
    back()
    assert made.prepare == []


def test_one_poisoned_batch_reaches_the_running_statistics_and_no_weight() -> None:
    made = loop()
    before = nn.utils.parameters_to_vector(made.model.parameters()).clone()
    FAULTS["one batch times inf"](made)
    assert torch.equal(nn.utils.parameters_to_vector(made.model.parameters()), before)
    assert not made.norms()[0].running_mean.isfinite().all()


def test_statistics_are_updated_twice_and_gradients_stay() -> None:
    found = []
    for fault in (None, "recomputed in the backward pass", "second forward of the batch"):
        torch.manual_seed(0)
        made = loop()
        if fault:
            FAULTS[fault](made)
        batch = made.batch()
        if made.extra is not None:
            made.extra(made.model, batch)
        made.network.loss(made.model, batch).backward()
        gradient = next(made.model.parameters()).grad
        assert gradient is not None
        found.append((int(made.norms()[0].num_batches_tracked), gradient))
    assert [updates for updates, _ in found] == [1, 2, 2]
    torch.testing.assert_close(found[1][1], found[0][1])


def test_frozen_layers_are_the_first_ones() -> None:
    made = loop()
    FAULTS["first half of the layers in eval mode"](made)
    assert [norm.training for norm in made.norms()] == [False, False, True, True]


def test_a_fault_begins_after_a_third_and_is_found_and_the_run_before_it_is_its_twins() -> None:
    healthy, faulty = (run(QUICK, 1, what, HEALTHY[BASE], FAULTS.get(what), 240) for what in (BASE, FAULT))
    assert healthy.begin is None
    assert faulty.begin == 80
    assert faulty.problem is None
    assert healthy.accuracy > 0.9
    found = score.delay(faulty)
    assert found is not None
    assert found <= 100
    assert "BN201" in {rule for _, rule in faulty.findings}


FAULT = "batches shrink to 2"


def outcome(what: str, *alarms: int, begin: int | None = None, lost: float = 0.0, rule: str = "") -> Outcome:
    findings = [(step, rule) for step in alarms if rule]
    raised = [(step, ["units.0.norm"]) for step in alarms]
    return Outcome(QUICK, 1, what, 510, begin, raised, findings, 0.9 - lost, 0.0, None, 1.0)


HEALTHY_RUNS = [outcome(BASE), outcome(BASE, 50, rule="BN203"), replace(outcome("other"), alarms=[(20, ["loss"])])]
FAULTY_RUNS = [
    outcome("fault", 50, 190, 250, begin=170, lost=0.3, rule="BN201"),
    outcome("fault", 50, begin=170, lost=0.1, rule="BN203"),
    outcome("harmless", begin=170),
]


def test_false_alarms_are_counted_by_run() -> None:
    rows = {row[0]: row for row in score.false_alarms(HEALTHY_RUNS)}
    assert rows[BASE][1:6] == ["2", "1: 50.0% [1.3%, 98.7%]", "layers 1", "1: 50.0% [1.3%, 98.7%]", "BN203 1"]
    assert rows["all"][1:4] == ["3", "2: 66.7% [9.4%, 99.2%]", "layers 1, loss 1"]


def test_runs_with_an_alarm_are_listed() -> None:
    assert [row[2:6] for row in score.alarmed(HEALTHY_RUNS)[1:]] == [
        [BASE, "50", "units.0.norm", "BN203"],
        ["other", "20", "loss", ""],
    ]


def test_only_alarms_since_the_fault_detect_it() -> None:
    assert [score.delay(one) for one in FAULTY_RUNS] == [20, None, None]
    rows = {row[0]: row for row in score.detections(FAULTY_RUNS, HEALTHY_RUNS[:1])}
    assert rows["fault"] == [
        *("fault", "1 of 2", "mlp 1/2", "20 (20 to 20)", "2", "layers 1", "BN201 1", "0.200 (0.100 to 0.300)"),
    ]
    assert rows["harmless"][1:4] == ["0 of 1", "mlp 0/1", ""]
    missed = score.missed(FAULTY_RUNS, HEALTHY_RUNS[:1])
    assert missed == ["* fault: 1 of 2 runs that lost over 0.02, without an alarm."]


def test_an_alarm_is_raised_by_layers_the_loss_updates_or_inputs() -> None:
    faulty = replace(outcome("fault", begin=170), alarms=[(180, ["a.norm", "b.norm", "inputs"]), (190, ["updates"])])
    assert score.detections([faulty], HEALTHY_RUNS[:1])[1][5] == "inputs 1, layers 1"


def test_a_report_says_what_was_found_and_which_monitors_stopped() -> None:
    stopped = replace(HEALTHY_RUNS[0], problem="bnprobe.Monitor stopped at step 3")
    text = render([*HEALTHY_RUNS, stopped, *FAULTY_RUNS], 0, [], 1.0)
    assert "Stated: at most 5% of runs. Found: 2: 50.0%" in text
    assert f"* mlp, {BASE}, seed 1: bnprobe.Monitor stopped at step 3" in text


def test_the_quick_run_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quick", "--processes", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.monitor", *arguments])
    monkeypatch.chdir(Path(__file__).parents[2])  # memory is measured in processes that import benchmarks from there
    assert main() == 0
    results = (tmp_path / "RESULTS.md").read_text()
    for heading in ("False alarms", "Delay of detection", "Missed", "Cost"):
        assert f"\n## {heading}\n" in results
    assert "Monitors that stopped" not in results
    outcomes = json.loads((tmp_path / "results.json").read_text())
    assert {one["what"] for one in outcomes} == {*HEALTHY, *FAULTS}
    assert all(math.isfinite(one["accuracy"]) for one in outcomes)
