"""The networks of ``tests/cases``, after people's reports: the installed command gives the answer that is known.

``tests/cases/README.md`` says what each is and what the right answer is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bnprobe.records import Report
from bnprobe.report import RenderOptions, render
from bnprobe.report.json import load_as
from functional.command import CLEAN, ERROR, FINDINGS, REPOSITORY, Result, Workspace

CASES = REPOSITORY / "tests" / "cases"
JSON = ("--format", "json")
Scan = Callable[[str], Result]


@dataclass(frozen=True)
class Case:
    """What a scan of a case must say.

    Attributes:
        name: Folder or file below ``tests/cases``.
        batch_size: What its owner would type.
        code: Exit code.
        causes: One of these is the first diagnosis; empty: there is no error.
        says: Words of the report.
        never_says: Words that are not in it.
    """

    name: str
    batch_size: int
    code: int
    causes: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    never_says: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


REPORTED = (
    Case("02-varlen-bs1", 1, FINDINGS, ("single_image",)),
    Case(
        "04-gan-ema-nobuffers",
        64,
        FINDINGS,
        ("never_trained",),
        says=("bnprobe recalibrate model",),
        never_says=("untrained",),
    ),
    Case("10-adapt-alternate", 8, FINDINGS, ("composition", "shared_domains")),
    Case("11b-two-calls-weak", 32, FINDINGS, ("shared_domains", "composition"), never_says=("✓ Every layer",)),
    Case("12-nan-stats", 32, FINDINGS, ("non_finite",), says=("recalibrate",)),
    Case("14-last-batch", 4, FINDINGS, ("last_batch",)),
    Case("15-rl-actor-bs1", 1, FINDINGS, ("single_value",), says=("eval()",)),
    Case("16-train-forgotten", 32, CLEAN, ("trained_in_eval",), never_says=("Recalibrate the running",)),
    Case("17-audio-padding", 16, FINDINGS, says=("padding",)),
    Case("18-iic-no-tracking", 64, FINDINGS, ("no_running_stats",), says=("bnprobe recalibrate",)),
    Case("19-eps-port", 64, FINDINGS, ("lag",), says=("eps is 1e-05, and was 0.001",)),
    Case(
        "22-dropout-in-forward",
        64,
        FINDINGS,
        says=("andom at inference",),
        never_says=("random layers off", "noise off"),
    ),
    Case("25-ema-too-young", 64, FINDINGS, never_says=("need no training",)),
    Case("32-eval-forgotten", 32, FINDINGS, never_says=("--batch-size 434",)),
    Case("shift/class_mix.py", 32, CLEAN, never_says=("preprocessing",)),
    Case("shift/padded.py", 32, FINDINGS, ("data_shift",)),
    Case("shift/small_eval.py", 32, FINDINGS, ("data_shift",)),
    Case("shift/floor.py", 32, FINDINGS, ("lag",), never_says=("independent values",)),
    Case("minimal/aux.py", 8, CLEAN, never_says=("overflow", "frozen", "could not be measured")),
    Case("minimal/bn107.py", 8, CLEAN, never_says=("BN107): ",)),
    Case("minimal/chaos.py", 2, FINDINGS, never_says=("rounding errors too much",)),
    Case("minimal/embed.py", 8, FINDINGS, never_says=("predicted class",)),
    Case("minimal/syncbn_like.py", 8, CLEAN, never_says=("untrained",)),
    Case("minimal/unused.py", 8, CLEAN),
)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all cases, in which the command runs."""
    folder = tmp_path_factory.mktemp("reported") / "cases"
    return Path(shutil.copytree(CASES, folder, ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture(scope="module")
def scan(cases: Path) -> Scan:
    """Scan a case as its owner would, once for all tests of what was found."""

    @cache
    def scanned(name: str) -> Result:
        place, model = _in(cases, name)
        (case,) = [case for case in REPORTED if case.name == name]
        return place.run("scan", model, "--batch-size", str(case.batch_size), *JSON)

    return scanned


def _in(cases: Path, name: str) -> tuple[Workspace, str]:
    """The folder of a case, and its model file."""
    place = cases / name
    return (Workspace(place), "model.py") if place.is_dir() else (Workspace(place.parent), place.name)


def _report(result: Result, code: int) -> dict[str, Any]:
    assert result.code == code, result
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _first(report: dict[str, Any]) -> str:
    return report["diagnoses"][0]["cause"] if report["diagnoses"] else ""


@pytest.mark.parametrize("case", REPORTED, ids=str)
def test_a_scan_gives_the_known_answer(scan: Scan, case: Case) -> None:
    scanned = scan(case.name)
    report = _report(scanned, case.code)
    text = render(load_as(Report, scanned.stdout), options=RenderOptions(width=400, show_all=True))
    if case.causes:
        assert _first(report) in case.causes
        assert report["diagnoses"][0]["severity"] == ("error" if case.code == FINDINGS else "warning")
    elif case.code == CLEAN:
        assert not any(found["severity"] == "error" for found in report["diagnoses"])
    for words in case.says:
        assert words in text
    for words in case.never_says:
        assert words not in text
    _says_no_clean_verdict_of_a_fallen_metric(report, text)


def _says_no_clean_verdict_of_a_fallen_metric(report: dict[str, Any], text: str) -> None:
    """Whatever the case: metric or loss surely worse at inference is never clean."""
    for gap in report["summary"]["gaps"]:
        interval = gap["inconsistency_interval"]
        if interval is None or interval[1] is None:
            continue
        worse = interval[0] > 0 if gap["goal"] == "min" else interval[1] < 0
        large = abs(gap["inconsistency"]) > 0.1 * abs(gap["training"])
        assert not (worse and large and report["diagnoses"] == []), text


def test_batches_of_one_image_are_scored_on_enough_of_them(scan: Scan) -> None:
    report = _report(scan("02-varlen-bs1"), FINDINGS)
    metric = next(gap for gap in report["summary"]["gaps"] if gap["measure"] == "metric")
    assert metric["samples"] >= 100
    assert metric["held_out_samples"] == 60
    low, high = metric["inconsistency_interval"]
    assert low < metric["inconsistency"] < high < 0


FEW = """
from model import *


def load_data(batch_size=1):
    return DataLoader(Seqs(40, 1), batch_size, shuffle=True)


def load_eval_data(batch_size=1):
    return DataLoader(Seqs(20, 2), batch_size)
"""
"""The network of single images with fewer of them: a repair scans twice."""


@pytest.mark.parametrize("command", ["recalibrate", "convert"])
def test_batches_of_one_image_are_repaired_as_they_are(cases: Path, command: str) -> None:
    place, _ = _in(cases, "02-varlen-bs1")
    place.write("few.py", FEW)
    output = f"{command}.safetensors"
    result = place.run(command, "few.py", "--batch-size", "1", "--output", output, "--force")
    assert result.code in (CLEAN, FINDINGS), result
    assert (place.folder / output).exists()


def test_parameters_without_buffers_are_repaired(cases: Path) -> None:
    place, model = _in(cases, "04-gan-ema-nobuffers")
    assert place.run("lint", model).code == FINDINGS
    weights = ("--checkpoint", "params_only.pt")
    result = place.run("recalibrate", model, "--batch-size", "64", *weights, "--goal", "min", "-o", "new.safetensors")
    assert result.code == CLEAN, result
    after = place.run("scan", model, "--batch-size", "64", "--checkpoint", "new.safetensors", *JSON)
    assert _report(after, CLEAN)["summary"]["flagged"] == 0


def test_a_cause_of_a_small_part_is_no_second_error(scan: Scan) -> None:
    report = _report(scan("10-adapt-alternate"), FINDINGS)
    others = [found for found in report["diagnoses"][1:] if found["severity"] == "error"]
    assert {found["cause"] for found in others} <= {"data_shift"}  # the evaluation data is one of the two domains
    assert all(found["impact"] is None for found in others)


def test_the_shared_layers_of_two_calls_are_named(scan: Scan) -> None:
    report = _report(scan("11b-two-calls-weak"), FINDINGS)
    assert set(report["diagnoses"][0]["layers"]) == {"body.1", "body.4", "body.7"}


def test_statistics_that_are_nan_are_repaired(cases: Path, scan: Scan) -> None:
    place, model = _in(cases, "12-nan-stats")
    report = _report(scan("12-nan-stats"), FINDINGS)
    assert [layer["name"] for layer in report["layers"]] == ["1", "4", "7"]
    assert report["summary"]["gaps"][0]["measure"] == "metric"  # the loss is not finite at inference
    assert place.run("recalibrate", model, "--batch-size", "32", "-o", "new.safetensors").code == CLEAN
    after = place.run("scan", model, "--batch-size", "32", "--checkpoint", "new.safetensors", *JSON)
    assert "non_finite" not in {found["cause"] for found in _report(after, CLEAN)["diagnoses"]}


def test_a_new_network_is_not_called_untrained_in_anger(scan: Scan) -> None:
    report = _report(scan("14-last-batch"), FINDINGS)
    severities = {found["cause"]: found["severity"] for found in report["diagnoses"]}
    assert severities.get("never_trained", "info") == "info"


def test_weights_that_belong_to_the_running_statistics_keep_them(cases: Path, scan: Scan) -> None:
    place, model = _in(cases, "16-train-forgotten")
    report = _report(scan("16-train-forgotten"), CLEAN)
    assert not any("ecalibrate" in found["remedy"] for found in report["diagnoses"][:1])
    frozen = place.run("convert", model, "--batch-size", "32", "--to", "frozen", "-o", "frozen.safetensors")
    assert frozen.code == CLEAN, frozen
    before, after = torch.load(place.folder / "w.pt"), load_file(place.folder / "frozen.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if "running" in name)


def test_held_out_data_is_read_as_it_is_served(scan: Scan) -> None:
    report = _report(scan("17-audio-padding"), FINDINGS)
    assert next(gap["held_out_samples"] for gap in report["summary"]["gaps"]) == 150


def test_statistics_are_made_where_there_are_none(cases: Path) -> None:
    place, model = _in(cases, "18-iic-no-tracking")
    assert place.run("recalibrate", model, "--batch-size", "64", "-o", "new.safetensors").code == CLEAN
    assert "1.running_mean" in load_file(place.folder / "new.safetensors")


def test_no_remedy_for_bn_is_the_fix_of_weights_at_chance(scan: Scan) -> None:
    report = _report(scan("25-ema-too-young"), FINDINGS)
    assert "Look at the weights" in report["diagnoses"][0]["remedy"]
    assert not any("bnprobe recalibrate" in found["remedy"] for found in report["diagnoses"])


@pytest.mark.parametrize("model", ["model_tuple.py", "model_pyg.py"])
def test_graphs_in_other_containers(cases: Path, model: str) -> None:
    if model == "model_pyg.py":
        pytest.importorskip("torch_geometric")
    place, _ = _in(cases, "32-eval-forgotten")
    report = _report(place.run("scan", model, "--batch-size", "32", *JSON), FINDINGS)
    assert report["scan"]["batch_size"] == 32


@pytest.mark.parametrize(
    ("name", "batch_size", "emulated"),
    [("pack.py", 2, None), ("chaos.py", 2, True), ("mixup.py", 8, False), ("func_bn.py", 8, None)],
)
def test_what_cannot_be_joined_runs_one_by_one(cases: Path, name: str, batch_size: int, emulated: bool | None) -> None:
    place, model = _in(cases, f"minimal/{name}")
    result = place.run("scan", model, "--batch-size", str(batch_size), *JSON)
    assert result.code in (CLEAN, FINDINGS), result
    assert emulated in (None, _report(result, result.code)["scan"]["emulated"])


def test_own_norms_are_listed_and_measured(cases: Path) -> None:
    place, model = _in(cases, "minimal/own_norms.py")
    result = place.run("scan", model, "--batch-size", "16", *JSON)
    report = _report(result, result.code)
    listed = {layer["name"] for layer in report["layers"]} | {layer["name"] for layer in report["skipped"]}
    assert {"a", "b", "c"} <= listed
    assert {"a", "b"} <= {layer["name"] for layer in report["layers"]}


@pytest.mark.parametrize("model", ["expanded.py", "sparse.py", "tiny.py"])
def test_odd_buffers(cases: Path, model: str) -> None:
    place, _ = _in(cases, f"faults/{model}")
    result = place.run("scan", model, "--batch-size", "4", *JSON)
    assert result.code in (CLEAN, FINDINGS), result


def test_a_loss_without_a_return(cases: Path) -> None:
    place, model = _in(cases, "faults/noreturn.py")
    message = place.run("scan", model, "--batch-size", "4").error(ERROR)
    assert "loss(model, batch)" in message
    assert "None" in message


@pytest.mark.parametrize("script", ["changed.py", "empty_buffer.py", "mutated.py"])
def test_scripts_that_broke_a_scan(cases: Path, script: str) -> None:
    place, _ = _in(cases, f"faults/{script}")
    result = place.run_script(script)
    assert result.code == 0, result
    lines = result.stdout.splitlines()
    if script == "changed.py":
        assert len(lines) == 4
        assert all("changed: 0 of" in line for line in lines)
    elif script == "empty_buffer.py":
        assert lines
        assert all(line.endswith("ok") for line in lines)
    else:
        figures = [line.split("D train")[1].split()[0] for line in lines if "D train" in line]
        assert len(figures) == 2
        assert len(set(figures)) == 1
