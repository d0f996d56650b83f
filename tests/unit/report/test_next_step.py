"""The closing words, and above all: the suggested command exists and does what the words say."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import fabricated_causes as causes
import fabricated_reports as fabricated
import pytest
from fabricated_documents import document
from fabricated_parts import SCAN, report
from hypothesis import given
from hypothesis import strategies as st

from bnprobe.records import FROZEN, Estimate, Gap, Remedy, Report, Score, Smallest
from bnprobe.report.diagnoses import closing as verdict
from bnprobe.report.next_step import advised_step, scan_of, sweep_step, with_options
from bnprobe.report.page import RenderOptions, broken
from bnprobe.report.scan import render
from bnprobe.report.sweep import render as render_sweep
from bnprobe.rules import RULES
from bnprobe.stats.theory import mismatch_iid

COMMAND = "bnprobe scan model.py --batch-size 2"


@pytest.mark.parametrize(
    ("report", "headline", "command"),
    [
        (
            fabricated.healthy(),
            "Every layer behaves as if the batch were at least 32 values, in training and at inference.",
            f"{COMMAND} --format json --output report.json",
        ),
        (
            fabricated.flagged(),
            "6 of 9 layers are flagged: training and inference normalize differently.",
            f"{COMMAND} --batch-sizes 2,4,8,16,32,64",
        ),
        (
            fabricated.batch_sizes(),
            "5 of 8 layers are flagged: training and inference normalize differently.",
            "bnprobe scan model.py --batch-size 16",
        ),
        (
            fabricated.no_batch_size_helps(),
            "1 of 2 layers is flagged: training and inference normalize differently.",
            f"{COMMAND} --format json --output report.json",
        ),
        (
            fabricated.undecided(),
            "No layer is flagged, but 2 of 3 layers are undecided.",
            f"{COMMAND} --max-batches 512",
        ),
        (
            replace(fabricated.undecided(), scan=replace(SCAN, stopped="requested")),
            "No layer is flagged, but 2 of 3 layers are undecided.",
            f"{COMMAND} --batches 512",
        ),
        (
            replace(fabricated.undecided(), scan=replace(SCAN, stopped="data_exhausted")),
            "No layer is flagged, but 2 of 3 layers are undecided.",
            f"{COMMAND} --format json --output report.json",
        ),
        (
            fabricated.partial(),
            "1 of 2 layers is flagged: training and inference normalize differently.",
            COMMAND,
        ),
        (report([]), "No layer could be judged.", None),
    ],
)
def test_headline_and_next_command(report: Report, headline: str, command: str | None) -> None:
    end = verdict(report, COMMAND)
    assert (end.headline, end.step.command) == (headline, command)


@pytest.mark.parametrize(
    ("name", "headline", "command"),
    [
        ("lag", "6 of 9 layers are flagged: training and inference normalize differently.", "bnprobe explain BN203"),
        (
            "training",
            "No layer is flagged for its mismatch, but 1 problem was found.",
            "bnprobe explain BN301",
        ),
        (
            "data_shift",
            "No layer is flagged for its mismatch, but 2 problems were found.",
            "bnprobe explain BN206",
        ),
    ],
)
def test_a_diagnosis_says_what_is_next(name: str, headline: str, command: str) -> None:
    end = verdict(fabricated.REPORTS[name](), COMMAND)
    assert (end.headline, end.step.command) == (headline, command)


def test_a_batch_size_is_enough_where_noise_is_within_its_own_limit() -> None:
    report = fabricated.batch_sizes()
    layers = [
        replace(layer, batch_sizes=tuple(replace(each, limit=mismatch_iid(14.0)) for each in layer.batch_sizes))
        for layer in report.layers
    ]
    step = verdict(replace(report, layers=tuple(layers)), COMMAND).step
    assert step.why == "At batch size 8 no layer is under its limit at inference. To check training too:"


def stale(remedy: str = "", **scan: Any) -> Report:
    """A report whose first diagnosis is that of stale statistics, with the remedy of the rule."""
    report = fabricated.REPORTS["lag"]()
    first = replace(report.diagnoses[0], remedy=remedy or RULES["BN203"].remedy)
    return replace(report, diagnoses=(first, *report.diagnoses[1:]), scan=replace(report.scan, **scan))


def test_the_command_of_the_first_remedy_has_the_options_that_load_the_same_model_and_data() -> None:
    report = stale(checkpoint="runs/7 b/best.pt")
    command = "bnprobe scan --what-if --checkpoint 'runs/7 b/best.pt' --batches=8 model.py:net --key ema --all"
    assert verdict(report, command).step.command == (
        "bnprobe recalibrate --checkpoint 'runs/7 b/best.pt' model.py:net --key ema -o best-recalibrated.safetensors"
    )


def test_what_no_command_can_do_is_explained() -> None:
    for found in (stale("Set eps=0.001 in all BN layers."), stale(synthetic=True)):
        assert verdict(found, COMMAND).step.command == "bnprobe explain BN203"


def tried(name: str, after: float, **changes: Any) -> Remedy:
    """A remedy that takes a metric of 0.4 to another value, ± 0.01."""
    change = Estimate(after - 0.4, (after - 0.41, after - 0.39))
    layers = tuple(layer.name for layer in fabricated.flagged().layers)
    blend = {"instance statistics": 1.0, "example weighing": 0.25}.get(name)
    made = Remedy(name, layers, Score(None, 0.4), Score(None, after), None, 256, "", None, change, blend=blend)
    return replace(made, **changes)


CONVERSION = "Normalize every sample with its own statistics (bnprobe convert --to instance-renorm --blend 1)."
RECALIBRATION = "Recalibrate the running statistics (bnprobe recalibrate)."


def of_small_batches(*remedies: Remedy, first: str = CONVERSION, second: str = RECALIBRATION) -> Report:
    report = fabricated.flagged()
    gap = Gap("metric", 0.9, 0.9, 0.4, None, 0.0, -0.5, None, goal="max", inconsistency_interval=(-0.51, -0.49))
    one = replace(report.diagnoses[0], rule="BN201", cause="small_batch", severity="error", remedy=first)
    other = replace(one, rule="BN203", cause="lag", remedy=second)
    return replace(
        report, diagnoses=(one, other), remedies=remedies, summary=replace(report.summary, gaps=(gap,), chance=())
    )


def test_the_remedy_that_gains_most_of_those_that_are_named_comes_next() -> None:
    instance, usual = tried("instance statistics", 0.8), tried("recalibrated", 0.6)
    convert = "bnprobe convert model.py --batch-size 2 --to instance-renorm --blend 1 --layers '*'"
    recalibrate = "bnprobe recalibrate model.py --batch-size 2"
    sizes = f"{COMMAND} --batch-sizes 2,4,8,16,32,64"
    for found, command in (
        (of_small_batches(instance, usual), f"{convert} -o batch2-repaired.safetensors"),
        (
            of_small_batches(tried("instance statistics", 0.5), usual),
            f"{recalibrate} -o batch2-recalibrated.safetensors",
        ),
        (of_small_batches(usual), f"{recalibrate} -o batch2-recalibrated.safetensors"),
        (of_small_batches(instance, first="Train with larger batches.", second=""), sizes),  # the remedies name it not
        (of_small_batches(tried("recalibrated", 0.4)), sizes),
        (of_small_batches(tried("batch statistics", 0.9)), sizes),  # nothing carries it out
    ):
        assert verdict(found, COMMAND).step.command == command


def test_a_blend_that_gains_on_recalibrated_statistics_comes_before_these() -> None:
    """They are its control, on fewer samples, whatever they score on all."""
    usual, change = tried("recalibrated", 0.8), Estimate(0.15, (0.14, 0.16))
    blend = tried("example weighing", 0.75, recalibrated=True, control=Score(None, 0.6), metric_change=change)
    said = "Convert the layers (bnprobe convert --to example-weighing --blend 0.25)."
    command = verdict(of_small_batches(usual, blend, first=said), COMMAND).step.command
    assert command is not None
    assert "--to example-weighing --blend 0.25" in command


def test_a_command_that_goes_on_is_another_one() -> None:
    frozen = "Recalibrate the frozen layers, too (bnprobe recalibrate --include-frozen)."
    report = of_small_batches(tried("recalibrated", 0.8), first="", second=frozen)
    assert verdict(report, COMMAND).step.command == f"{COMMAND} --batch-sizes 2,4,8,16,32,64"
    report = of_small_batches(tried("recalibrated with frozen layers", 0.8), first="", second=frozen)
    assert "recalibrate model.py --batch-size 2 --include-frozen" in (verdict(report, COMMAND).step.command or "")


def test_a_goal_that_the_remedy_asks_for_is_stated_next() -> None:
    report = of_small_batches(first="First say which metric is better (--goal): ...")
    step = verdict(report, COMMAND).step
    assert (step.why, step.command) == ("If a larger metric is better (else --goal min):", f"{COMMAND} --goal max")


def test_training_is_suggested_only_with_a_loss_and_held_out_data() -> None:
    report = fabricated.REPORTS["training"]()
    diagnosis = replace(
        report.diagnoses[0], rule="BN211", layers=(), remedy="Fine-tune (bnprobe convert --to frozen --finetune)."
    )
    unscored = replace(report, diagnoses=(diagnosis,), summary=replace(report.summary, gaps=()))
    assert verdict(unscored, COMMAND).step.command == "bnprobe explain BN211"
    gap = Gap("loss", 0.1, 0.1, 0.9, 1.0, 0.0, 0.8, 0.1)
    scored = replace(unscored, summary=replace(unscored.summary, gaps=(gap,)))
    assert verdict(scored, COMMAND).step.command == (
        "bnprobe convert model.py --batch-size 2 --to frozen --finetune --layers '*' -o batch2-repaired.safetensors"
    )


def test_a_hint_leaves_a_clean_verdict_clean_and_an_interrupted_scan_is_finished_first() -> None:
    healthy, hint = fabricated.healthy(), fabricated.REPORTS["lag"]().diagnoses[1]
    assert hint.severity == "info"
    assert verdict(replace(healthy, diagnoses=(hint,)), COMMAND) == verdict(healthy, COMMAND)
    error = replace(hint, severity="error")
    partial = replace(healthy, diagnoses=(error,), scan=replace(healthy.scan, partial=True, stopped="interrupted"))
    assert verdict(partial, COMMAND).step.command == COMMAND


def test_an_error_beside_undecided_layers_is_the_result() -> None:
    report = fabricated.undecided()
    error = replace(fabricated.REPORTS["lag"]().diagnoses[0], rule="BN213", cause="random_at_inference")
    end = verdict(replace(report, diagnoses=(error,)), COMMAND)
    assert (end.sign, end.headline) == ("✗", "No layer is flagged for its mismatch, but 1 problem was found.")
    assert "2 layers are undecided." in end.sentences
    assert end.step.command == "bnprobe explain BN213"


def test_the_diagnoses_replace_the_sentence_on_the_worst_layer() -> None:
    flagged = fabricated.flagged()
    assert verdict(flagged, COMMAND).worst == ""
    assert verdict(replace(flagged, diagnoses=()), COMMAND).worst.startswith("Worst is")


def test_the_worst_layers_are_named_worst_first() -> None:
    assert verdict(fabricated.batch_sizes(), COMMAND).worst == (
        "Worst is layer3.0.downsample.1: in training it behaves as if the batch were 2.0 values, and its limit is"
        " 14.3, between 14 for noise of batches and 32 for all else. Next worst: layer3.0.bn2 (n_eq 2.4),"
        " layer3.0.bn1 (n_eq 3.0)."
    )


def test_undecided_layers_come_with_the_path_and_interval_that_straddle_the_limit() -> None:
    assert verdict(fabricated.undecided(), COMMAND).sentences == (
        "block.1.bn: n_eq in training is 25.4 to 58.9 (95%), and its limit is 32.",
        "block.0.bn: n_eq in training is 26.5 to 49.0 (95%), and its limit is 32.",
    )


def test_a_mismatch_that_no_batch_size_explains_is_not_put_as_a_batch_size() -> None:
    worst = verdict(fabricated.no_batch_size_helps(), COMMAND).worst
    assert worst == "Worst is bn2: in training it differs more than small batches can explain, D = 2.25."


def test_a_layer_below_its_limit_by_noise_alone_is_within_it_but_not_above() -> None:
    report = fabricated.healthy()
    noisy = replace(report.layers[0], eval=replace(report.layers[0].eval, mismatch=0.075, equivalent_batch_size=20.4))
    found = verdict(replace(report, layers=(noisy, *report.layers[1:])), COMMAND).headline
    assert found == (
        f"Every layer is within its limit; the smallest n_eq is 20.4, in {noisy.name}, whose limit is 14.2,"
        " between 14 for noise of batches and 32 for all else."
    )


def test_an_overflowed_path_is_the_worst() -> None:
    worst = verdict(fabricated.overflow(), COMMAND).worst
    assert worst.startswith("Worst is bn2, which could not be measured at inference.")


def test_what_weakens_the_result_is_said() -> None:
    report = fabricated.skipped()
    report = replace(report, scan=replace(report.scan, synthetic=True))
    assert verdict(report, COMMAND).sentences == (
        "1 layer could not be measured in both modes.",
        "10 layers skipped.",
        "The inputs were generated: this shows structure and batch noise, not your data (exit 0).",
    )


def test_frozen_layers_are_told_apart_and_statistics_that_do_not_fit_are_not_passed_over_in_silence() -> None:
    layer = max(fabricated.flagged().layers, key=lambda each: each.eval.mismatch if each.eval else 0.0)
    frozen = replace(layer, train=None, flagged=False, undecided=False, note=f"{FROZEN}in eval mode", shares=None)
    found = report([frozen])
    found = replace(found, summary=replace(found.summary, gaps=()), diagnoses=())
    end = verdict(found, COMMAND)
    assert end.headline == "No layer could be judged."
    assert end.sentences[0] == "1 layer is frozen: both modes use the running statistics."
    assert end.sentences[1].startswith(f"The running statistics of 1 layer do not fit the data, worst {layer.name}")
    assert "– 1 frozen, alike in both modes" in render(found, RenderOptions(command=COMMAND))
    gap = Gap("metric", 0.9, 0.9, 0.9, None, 0.0, 0.0, None)
    scored = replace(found, summary=replace(found.summary, gaps=(gap,)))
    assert len(verdict(scored, COMMAND).sentences) == 1


def test_after_a_sweep_comes_a_scan_at_the_size_that_is_enough() -> None:
    sweep: Any = document("sweep", "sizes")
    command = (
        "bnprobe sweep model.py --checkpoint w.pt --batch-size 2 --batch-sizes 1,2,16 --format html --output s.html"
    )
    step = sweep_step(sweep, command)
    assert step.command == "bnprobe scan model.py --checkpoint w.pt --batch-size 16"
    assert step.why in render_sweep(sweep, RenderOptions(command=command))
    without = replace(sweep, smallest=Smallest(None, None))
    assert sweep_step(without, command).command == "bnprobe scan model.py --checkpoint w.pt --batch-size 2"
    assert sweep_step(replace(sweep, layers=sweep.layers[:1]), command) is None


def test_batch_sizes_beyond_the_images_measured_come_with_more_batches() -> None:
    report = fabricated.flagged()
    few = replace(report, scan=replace(report.scan, batches=16, images=32))
    assert verdict(few, COMMAND).step.command == f"{COMMAND} --batch-sizes 2,4,8,16,32,64 --batches 128"
    exhausted = replace(few, scan=replace(few.scan, stopped="data_exhausted"))
    assert verdict(exhausted, COMMAND).step.command == f"{COMMAND} --batch-sizes 2,4,8,16,32"


def test_an_option_that_is_there_is_replaced_in_either_spelling() -> None:
    command = "bnprobe scan 'my model.py' --batch-size=2 --batches 8 --seed 1"
    changed = with_options(command, {"--batch-size": "16", "--batches": "32"})
    assert changed == "bnprobe scan 'my model.py' --seed 1 --batch-size 16 --batches 32"


@given(
    before=st.permutations(
        [("spec.yaml",), ("--what-if",), ("--batch-size", "2"), ("--batches=8",), ("--all",), ("--output=a",)]
    ),
    options=st.dictionaries(st.sampled_from(["--batch-size", "--batches"]), st.sampled_from(["4", "16"])),
    what_if=st.booleans(),
)
def test_options_are_replaced_wherever_they_stand_and_the_other_words_stay(
    before: list[tuple[str, ...]], options: dict[str, str], what_if: bool
) -> None:
    if what_if:
        options = {**options, "--what-if": ""}
    gone = {*options, "--all", "--output"}
    others = [word for words in before if words[0].split("=")[0] not in gone for word in words]
    added = [word for option, value in options.items() for word in ([option, value] if value else [option])]
    command = shlex.join(["bnprobe", "scan", *(word for words in before for word in words)])
    assert shlex.split(with_options(command, options)) == ["bnprobe", "scan", *others, *added]


def test_nothing_is_said_twice_and_no_report_is_replaced() -> None:
    typed = "bnprobe scan a.py --max-batches 16 --verbose --format html --format=json --output-dir out --force"
    few = replace(fabricated.flagged(), scan=replace(SCAN, batches=16, images=32))
    assert verdict(few, typed).step.command == "bnprobe scan a.py --batch-sizes 2,4,8,16,32,64 --batches 128"
    assert verdict(fabricated.healthy(), typed).step.command == (
        "bnprobe scan a.py --max-batches 16 --format json --output report.json"
    )
    assert verdict(fabricated.partial(), typed).step.command == "bnprobe scan a.py --max-batches 16"
    sizes = verdict(fabricated.batch_sizes(), f"{COMMAND} --batch-sizes 2,4,8,16").step.command
    assert sizes == "bnprobe scan model.py --batch-size 16"


def test_the_scans_of_a_repair_are_commands_of_their_own() -> None:
    typed = "bnprobe convert a.yaml --finetune --steps 4 --key ema --seed=1 --resume -o x.safetensors --to frozen"
    assert scan_of(typed) == "bnprobe scan a.yaml --key ema --seed=1"
    assert scan_of(typed, "x.safetensors") == "bnprobe scan a.yaml --seed=1 --checkpoint x.safetensors"


def test_a_remark_on_flagged_layers_is_followed_where_that_can_be() -> None:
    """On synthetic inputs, where every finding is a remark."""
    found = fabricated.REPORTS["lag"]()
    remarks = tuple(replace(diagnosis, severity="info") for diagnosis in found.diagnoses)
    found = replace(found, diagnoses=remarks, scan=replace(found.scan, synthetic=True))
    assert verdict(found, COMMAND).step.command == "bnprobe explain BN203"


@pytest.mark.parametrize("width", [20, 40, 76])
def test_a_broken_command_is_the_same_command_to_a_shell(width: int) -> None:
    command = "bnprobe scan 'my model.py' --batch-size 16 --batch-sizes 2,4,8,16 --exclude 'head.*' --all"
    lines = broken(command, width)
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(command)
    assert max(map(len, lines)) <= max(width, len("--batch-sizes 2,4,8,16 \\"))


def test_a_conversion_that_surely_helps_is_a_whole_command() -> None:
    """For the layers that were tried: by the glob of all where these are all that the model has."""
    report = replace(causes.lag(), skipped=())
    names = tuple(layer.name for layer in report.layers)
    change = Estimate(0.4, (0.39, 0.41))
    tried = Remedy(
        "example weighing", names, Score(None, 0.4), Score(None, 0.8), None, 60, "", None, change, blend=0.25
    )
    step = advised_step(replace(report, remedies=(tried,)), "bnprobe scan spec.yaml --what-if --batch-size 2")
    assert step is not None
    assert step.command is not None
    start = "bnprobe convert spec.yaml --batch-size 2 --to example-weighing --blend 0.25"
    assert step.command.startswith(f"{start} --layers '*' -o ")
    some = advised_step(replace(report, remedies=(replace(tried, layers=names[:1]),)), "bnprobe scan spec.yaml")
    assert some is not None
    assert f"--blend 0.25 --layers {names[0]} -o " in (some.command or "")
    unsure = replace(tried, metric_change=Estimate(0.4, (-0.1, 0.9)))
    assert advised_step(replace(report, remedies=(unsure,)), "bnprobe scan spec.yaml") is None
