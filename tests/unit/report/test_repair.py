"""What the report of a repair says, and that it fits its page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fabricated_scans import FILES, files, scans
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from safetensors.torch import save_file
from torch import nn

import bnprobe
from bnprobe.records import Estimate, LayerChange, RepairRecord, RequirementResult
from bnprobe.report import RenderOptions, render
from bnprobe.report.figures import estimate, estimates
from bnprobe.report.page import Page
from bnprobe.report.repair import Files, RepairReport, gain, worse_than_as_is
from support import repairs

WIDE = RenderOptions(width=400, verbose=True)
TO_PASTE = "    "
"""How lines begin that are pasted as a whole and therefore never broken."""


def text_of(record: RepairRecord, name: str = "better", options: RenderOptions = WIDE) -> str:
    before, after = scans(name)
    return render(RepairReport(record, before, after, files(record, after)), "terminal", options)


AWKWARD = ("[red]", "a" * 300, "\x1b[2J", "two\nlines", "\u7d22\u5f15" * 30, "\\", "=", "x y")


@settings(max_examples=30)
@given(
    names=st.lists(st.one_of(st.text(min_size=1), st.sampled_from(AWKWARD)), min_size=1, max_size=4, unique=True),
    width=st.integers(40, 120),
    unicode=st.booleans(),
)
def test_a_plan_of_layers_of_any_name_fits(names: list[str], width: int, unicode: bool) -> None:
    changes = tuple(LayerChange(name, (name,), "BatchNorm2d", name, f"matches {name}", name) for name in names)
    text = render(repairs.plan(changes=changes), "terminal", RenderOptions(width=width, unicode=unicode))
    assert "\x1b" not in text
    assert unicode or text.isascii()
    assert max(map(cell_len, text.splitlines())) <= width


def test_a_gain_below_single_precision_is_called_rounding() -> None:
    found = repairs.same().proof
    assert found is not None
    for gained in (Estimate(-2.4e-9, (-3e-9, 1e-9)), Estimate(-2.4e-9, None)):
        [said] = gain(replace(found, gain=gained))
        assert "Gain over BN fine-tuned in the loss: 0, to rounding (" in said
    [said] = gain(replace(found, gain=Estimate(-2.4e-9, (-0.01, 0.01))))
    assert "rounding" not in said


def test_a_gain_that_is_not_shown_is_said_plainly() -> None:
    text = text_of(repairs.same())
    assert "\n! No significant gain (95%) of batch-renorm over plain BN fine-tuned the same way.\n" in text
    assert "Gain over BN fine-tuned in the loss: +0.001 ± 0.012 (positive: better; 95%, paired over 3 seeds)." in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("better", "✓ batch-renorm is better than plain BN fine-tuned the same way."),
        ("diverged", "– batch-renorm could not be compared with plain BN fine-tuned the same way."),
        ("recalibrated", "✓ The recalibrated model is better than the model as it is."),
        ("group_norm", "? Whether group-norm is better than plain BN fine-tuned the same way is not decided."),
        ("failed", "✗ 2 of 3 requirements are not met. frozen is worse than plain BN fine-tuned the same way."),
        ("unscored", "– Converted. Nothing was scored, so the gain is not known."),
    ],
)
def test_the_verdict_of(name: str, said: str) -> None:
    assert f"\n{said}\n" in text_of(repairs.RECORDS[name](), name)


def test_a_conversion_that_is_the_recalibrated_model_at_inference_is_not_called_better() -> None:
    record = repairs.better()
    assert record.proof is not None
    proof = replace(record.proof, control="recalibrated", conclusion="same", over_as_is=Estimate(0.1, (0.05, 0.15)))
    text = " ".join(text_of(replace(record, proof=proof)).split())
    assert "! At inference batch-renorm is the recalibrated model: what it gains is recalibration's." in text
    assert "Gain over as is in the" in text
    assert "batch-renorm is better" not in text


def test_which_held_out_samples_score_is_said() -> None:
    record = repairs.better()
    assert record.proof is not None
    proof = replace(record.proof, which="every other batch of 8, which chose no weights")
    assert "\nComparison on 180 held-out samples (every other batch of 8, which chose no weights): mean" in text_of(
        replace(record, proof=proof)
    )


def test_a_repair_that_recalibration_beats_is_no_success() -> None:
    record = repairs.better()
    assert record.proof is not None
    best, nothing = Estimate(0.99, (0.98, 1.0)), Estimate(0.01, (0.005, 0.02))
    arms = [replace(arm, metric=best, loss=nothing) if arm.name == "recalibrated" else arm for arm in record.proof.arms]
    proof = replace(record.proof, arms=tuple(arms), below_recalibrated=True)
    text = " ".join(text_of(replace(record, proof=proof)).split())
    assert "! batch-renorm is better than plain BN fine-tuned the same way." in text
    assert "Recalibrating alone is better, metric 0.99 against 0.971 and loss 0.01 against" in text


def test_a_repair_that_its_own_conversion_beats_is_no_success() -> None:
    record = repairs.better()
    assert record.proof is not None
    alone = repairs.untrained("batch-renorm untrained", 0.01, 0.99)
    proof = replace(record.proof, arms=(*record.proof.arms, alone), below_converted=True)
    text = " ".join(text_of(replace(record, proof=proof)).split())
    assert "! batch-renorm is better than plain BN fine-tuned the same way." in text
    assert "The conversion without training is better, metric 0.99 against 0.971 and loss 0.01 against" in text
    assert "leave out --finetune." in text


def test_layers_that_no_scan_measures_have_no_flags() -> None:
    record, (before, after) = replace(repairs.better(), flagged_after=None), scans("better")
    assert after is not None
    kept = replace(after, layers=after.layers[:2])
    number = f"{record.flagged_before} before"
    others = f"{after.summary.flagged or 'none'} of the 2 layers measured after"
    for scanned, flagged, said in (
        (kept, None, f"{number}, {others}; a scan cannot measure the converted ones."),
        (kept, 0, f"{number}, {others}; the converted ones give the same output in training and at inference by"),
        (None, None, f"{number}; the repaired model was not scanned."),
        (None, 0, f"{number}; the repaired model was not scanned."),
    ):
        found = replace(record, flagged_after=flagged)
        text = " ".join(render(RepairReport(found, before, scanned, files(found, scanned)), "terminal", WIDE).split())
        assert f"Flagged layers: {said}" in text
        assert (flagged is None and scanned is not None) == ("exit code 1, because nothing is known" in text)


def test_without_a_control_nothing_is_claimed() -> None:
    record = repairs.better()
    assert record.proof is not None
    alone = replace(record.proof, control=None, gain=None, conclusion="not_compared", message="")
    text = text_of(replace(record, proof=alone))
    assert "– batch-renorm: scored, but not compared with a baseline." in text
    assert "Gain" not in text
    assert "baseline:" not in text


def test_arms_that_are_marked() -> None:
    rows = [line for line in text_of(repairs.better()).splitlines() if re.match(r"^.{3}\S.*(finished|0\.908)$", line)]
    assert [(line[0], line[3:16].strip()) for line in rows] == [
        (" ", "recalibrated"),
        ("b", "BN fine-tuned"),
        ("→", "batch-renorm"),
        (" ", "frozen"),
    ]


def test_how_runs_ended_and_why() -> None:
    text = text_of(repairs.diverged(), "diverged")
    assert re.search(r"b  BN fine-tuned .* 450  early stop\n", text)
    assert re.search(r"→  batch-renorm .* 200–500  212–500  1 diverged\n", text)
    assert re.search(r"   gated +– +– +0 +41–43  diverged\n", text)
    assert "gated, seed 1: The loss was NaN at step 42: the output of layer3.0.bn2 was the first" in text
    assert "batch-renorm clipped 21% of r and 0.4% of d in the last tenth of its steps." in text


def test_many_runs_that_diverged_are_counted() -> None:
    record = repairs.diverged()
    assert record.proof is not None
    gated = record.proof.arms[-1]
    more = replace(gated, name="frozen")
    record = replace(record, proof=replace(record.proof, arms=(*record.proof.arms, more)))
    assert "\n  and 4 more runs; --all shows all.\n" in text_of(record)
    assert "frozen, seed 2: The loss" in text_of(record, options=replace(WIDE, show_all=True))


def test_a_value_is_shown_with_as_many_digits_as_tell_it_from_its_limit() -> None:
    required = (
        RequirementResult("metric>=0.97", 0.969999, False),
        RequirementResult("loss<=0.25", 0.23664, True),
        RequirementResult("flagged==0", None, False),
    )
    text = text_of(replace(repairs.better(), requirements=required))
    assert "✗ metric>=0.97: 0.969999\n" in text
    assert "✓ loss<=0.25: 0.2366\n" in text
    assert "✗ flagged==0: not measured\n" in text


def test_the_flags_of_every_layer_are_compared() -> None:
    text = text_of(repairs.recalibrated(), "recalibrated")
    assert re.search(r"\n✓  layer2.0.downsample.1 +1.0 → 343 .* 38.9 .*→ 0.004  no longer flagged\n", text)
    assert re.search(r"\n✗  layer3.0.bn1 .* still flagged\n", text)
    assert "Flagged layers: 6 → 5.\n" in text
    said = "not the scores (exit code 1 while a layer is flagged, and 5 still are): bnprobe verify"
    assert said in " ".join(text.split())
    assert "Flagged layers: 6 before; the repaired model was not scanned.\n" in text_of(
        repairs.group_norm(), "group_norm"
    )


def test_a_large_network_shows_the_layers_that_were_worst() -> None:
    short = text_of(repairs.large(), "large")
    assert "48 more layers (48 not flagged); --all shows all.\n" in short
    assert short.count("no longer flagged\n") == 9
    complete = text_of(repairs.large(), "large", replace(WIDE, show_all=True))
    assert len(re.findall(r"\n✓  features", complete)) == 60


# --- Digits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "half", "shown"),
    [
        (0.97142, 0.0063, "0.971 ± 0.006"),
        (0.97142, 0.0013, "0.9714 ± 0.0013"),
        (0.97142, 0.035, "0.971 ± 0.035"),
        (0.97142, 0.036, "0.97 ± 0.04"),
        (1.9431, 0.55, "1.9 ± 0.6"),
        (1.9431, 55.0, "2 ± 55"),
        (0.0, 0.002, "0.0000 ± 0.0020"),
        (-0.00001, 0.02, "0.000 ± 0.020"),
        (0.97142, 0.0, "0.971 ± 0"),
        (0.97142, 1e-7, "0.971 ± 1e-07"),
        (3.2e7, 1e6, "3.2e+07 ± 1e+06"),
        (0.97142, None, "0.971"),
    ],
)
def test_no_more_digits_than_the_interval_allows(mean: float, half: float | None, shown: str) -> None:
    interval = None if half is None else (mean - half, mean + half)
    assert estimate(Estimate(mean, interval)) == shown


def test_a_gain_carries_its_sign() -> None:
    assert estimate(Estimate(0.0251, (0.0185, 0.0317)), with_sign=True) == "+0.025 ± 0.007"
    assert estimate(Estimate(-0.011, None), with_sign=True) == "-0.011"
    assert estimate(Estimate(0.00001, (-0.01, 0.01)), with_sign=True) == "0.000 ± 0.010"


@pytest.mark.parametrize("unicode", [True, False])
def test_estimates_one_below_the_other_have_their_points_in_line(unicode: bool) -> None:
    cells = estimates([Estimate(12.3, None), Estimate(0.5, (0.46, 0.54)), None], Page(80, unicode))
    assert len({cell.index(".") for cell in cells[:2]}) == 1
    assert len({cell_len(cell) for cell in cells}) == 1


# --- Using the weights ------------------------------------------------------------------------------------------------


def python_of(text: str) -> str:
    """The lines of Python that the report prints."""
    after = text.partition("In Python:\n")[2].splitlines()
    end = next(index for index, line in enumerate([*after, ""]) if not line.startswith(TO_PASTE))
    return "\n".join(line.strip() for line in after[:end])


def test_the_lines_of_python_load_the_weights(tmp_path: Path) -> None:
    trained, model = (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)) for _ in range(2))
    path = tmp_path / 'odd "name".safetensors'
    save_file(trained.state_dict(), path)
    code = python_of(text_of(replace(repairs.better(), weights=str(path))))
    assert len(code.splitlines()) == 3
    exec(code, {"model": model})
    assert all(torch.equal(model.state_dict()[key], value) for key, value in trained.state_dict().items())


def test_a_model_that_does_not_deploy_is_converted_first() -> None:
    text = text_of(repairs.group_norm(), "group_norm")
    code = python_of(text)
    compile(code, "printed", "exec")
    assert 'record = json.loads(Path("repaired.record.json").read_bytes())' in code
    assert 'model = bnprobe.convert(model, layers, to="group-norm", groups=32)\nweights = ' in code
    assert "convert the model to group-norm first, then load them." in " ".join(text.split())
    assert "bnprobe export" not in text


def test_the_lines_of_python_make_the_repaired_model_again(tmp_path: Path) -> None:
    trained, model = (nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)) for _ in "ab")
    repaired = bnprobe.convert(trained, ["1", "3"], to="group-norm", groups=2).eval()
    weights, written = tmp_path / "repaired.safetensors", tmp_path / "repaired.record.json"
    save_file(repaired.state_dict(), weights)
    converted = tuple(LayerChange(name, (), "BatchNorm2d", "GroupNorm", "as asked for") for name in "13")
    made = repairs.plan(to="group-norm", changes=converted, deploys=False)
    for changes in (converted, converted * 2):  # written out, or read from the record
        record = replace(repairs.better(), plan=replace(made, changes=changes), weights=str(weights))
        record = replace(record, settings={"repair": {"groups": 2}})
        written.write_text(render(RepairReport(record), "json"), encoding="utf-8")
        names = {"model": model}
        exec(python_of(render(RepairReport(record, files=Files(str(written))), "terminal", WIDE)), names)
        images = torch.randn(2, 1, 6, 6)
        assert torch.equal(names["model"].eval()(images), repaired(images))


def test_few_layers_are_named_in_the_lines_of_python() -> None:
    record = repairs.group_norm()
    assert record.plan is not None
    record = replace(record, plan=replace(record.plan, changes=record.plan.changes[:2]))
    assert 'layers = ["layer2.0.bn1", "layer2.0.bn2"]' in python_of(text_of(record, "group_norm"))


@pytest.mark.parametrize(
    ("command", "target"),
    [
        ("bnprobe convert spec.yaml --finetune", "spec.yaml"),
        ("torchrun -m bnprobe convert 'my model.py' --finetune", "'my model.py'"),
        ("bnprobe convert --finetune spec.yaml", "sample_configs/digits/model.py:load_model"),
        (None, "sample_configs/digits/model.py:load_model"),
    ],
)
def test_the_next_commands_name_what_the_command_named(command: str | None, target: str) -> None:
    text = text_of(replace(repairs.better(), command=command))
    assert f"    bnprobe export {target} --checkpoint repaired.safetensors" in text
    assert "    bnprobe verify repaired.before.json repaired.after.json\n" in text


def test_the_export_gets_the_options_that_choose_model_and_data() -> None:
    typed = "bnprobe convert m.py --key ema --batch-size=4 --model-arg width=3 --seed 1 --goal min --finetune -o r.pt"
    text = text_of(replace(repairs.better(), command=typed))
    options = "--batch-size=4 --model-arg width=3 --seed 1"
    assert f"    bnprobe export m.py --checkpoint repaired.safetensors {options}\n" in text


def test_a_layer_that_is_undecided_now_is_not_called_healed() -> None:
    before, after = scans("recalibrated")
    assert before is not None
    assert after is not None
    name = next(layer.name for layer in before.layers if layer.flagged)
    layers = tuple(
        replace(layer, flagged=False, undecided=True) if layer.name == name else layer for layer in after.layers
    )
    report = RepairReport(repairs.recalibrated(), before, replace(after, layers=layers))
    assert re.search(rf"\n\?  {re.escape(name)} .* undecided now\n", render(report, "terminal", WIDE))


def test_what_was_not_written_is_not_named() -> None:
    record = repairs.better()
    text = render(RepairReport(record, files=Files(record=FILES.record)), "terminal", WIDE)
    assert "bnprobe verify" not in text
    assert "scan before" not in text
    assert "No weights were written." in text_of(repairs.failed())
    assert "load_file" not in text_of(repairs.failed())


@pytest.mark.parametrize("width", [60, 80])
def test_the_names_of_models_are_not_cut(width: int) -> None:
    record = repairs.RECORDS["better"]()
    first, *others = record.proof.arms
    long = replace(record.proof, arms=(replace(first, name="BN recalibrated afterwards"), *others))
    assert "BN recalibrated afterwards " in text_of(replace(record, proof=long), options=RenderOptions(width=width))


def test_layers_that_have_become_something_else_stay_in_the_table() -> None:
    before, after = scans("better")
    assert before is not None
    assert after is not None
    first, rest = before.layers[0], tuple(layer for layer in after.layers if layer.name != before.layers[0].name)
    changes = (LayerChange(first.name, (first.name,), "BatchNorm2d", "GroupNorm", "flagged"),)
    record = replace(repairs.better(), plan=repairs.plan(changes=changes))
    text = render(RepairReport(record, before, replace(after, layers=rest)), "terminal", RenderOptions(show_all=True))
    table = text.partition("Mismatch before and after")[2].partition("\n\n")[0].splitlines()
    assert [line.endswith("now GroupNorm") for line in table if line[3:].startswith(f"{first.name} ")] == [True]
    assert len(table) == 2 + len(before.layers)


def test_what_was_forced_does_not_ask_to_be_forced() -> None:
    forced, refused = (worse_than_as_is(replace(repairs.failed(), weights=weights)) for weights in ("w.pt", None))
    assert ("--force" in forced, "--force" in refused) == (False, True)
