"""The parts that are there only if something was measured: gaps, remedies, backward, updates, cost."""

from __future__ import annotations

from dataclasses import replace

import fabricated_causes as causes
import fabricated_parts as parts
import pytest
from rendered import said, section

from bnprobe.records import Estimate, ExtraPass, Gap, Goal, GradientAngle, Pool, Remedy, Report, Score, Updates
from bnprobe.report import figures

LOSS = Gap(
    "loss", 0.071, 0.052, 1.88, 1.92, -0.019, 1.828, 0.04, "min", (-0.03, -0.008), (1.7, 1.956), (-0.1, 0.18), 256, 128
)


REMEDIES, BACKWARD, UPDATES = "What remedies without training", "Backward pass", "Running statistics over real"


def with_gaps(*found: Gap) -> Report:
    """A report with these gaps."""
    report = causes.lag()
    return replace(report, summary=replace(report.summary, gaps=found))


def with_remedies(*found: Remedy) -> Report:
    """A report with these remedies."""
    return replace(causes.lag(), remedies=found)


def test_gaps_lead_from_training_to_held_out_data() -> None:
    lines = section(with_gaps(LOSS), "From training")
    ends = ["0.071", "-0.019 ± 0.011", "0.052", "+1.83 ± 0.13", "1.88", "+0.04 ± 0.14", "1.92"]
    assert [" ".join(line.split()).endswith(f" {end}") for line, end in zip(lines[2:9], ends, strict=True)] == [
        True
    ] * 7
    assert "On 256 training and 128 held-out samples; ± is the 95% interval of a step." in said(with_gaps(LOSS))
    assert "The largest step is that from batch to running statistics: the loss gets worse." in said(with_gaps(LOSS))


def test_the_steps_of_two_measures_fit_80_columns_in_words() -> None:
    accuracy = Gap(
        "metric", 0.98, 0.99, 0.43, 0.41, 0.01, -0.56, -0.02, "max", (0, 0.02), (-0.6, -0.5), (-0.1, 0.1), 256
    )
    lines = section(with_gaps(LOSS, accuracy), "From training")
    assert max(map(len, lines)) <= 80
    assert "all but BatchNorm to eval mode" in " ".join(lines)


def test_where_the_page_is_too_narrow_the_measures_stand_below_each_other_under_whole_labels() -> None:
    lines = section(with_gaps(LOSS, replace(LOSS, measure="metric")), "From training", width=64)
    assert max(map(len, lines)) <= 64
    assert sum(line.startswith("  training data, BatchNorm in train mode  ") for line in lines) == 2


@pytest.mark.parametrize(
    ("goal", "known", "words"),
    [("max", True, "the loss and the metric improve."), ("min", True, "the loss improves and the metric gets worse."),
     ("max", False, "the loss improves and the metric rises.")],
)  # fmt: skip
def test_the_largest_step_says_whether_it_is_for_the_better(goal: Goal, known: bool, words: str) -> None:
    none = Gap("loss", 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, "min", samples=256)
    loss = replace(none, inconsistency=-0.4, inconsistency_interval=(-0.5, -0.3))
    metric = replace(
        none, measure="metric", goal=goal, goal_is_known=known, inconsistency=0.4, inconsistency_interval=(0.3, 0.5)
    )
    found = said(with_gaps(loss, metric))
    assert f"The largest step is that from batch to running statistics: {words}" in found


def test_where_train_mode_does_no_more_than_to_normalize_by_batch_there_is_no_step_for_it() -> None:
    calm = replace(LOSS, training=0.052, training_noise=0.0, training_noise_interval=None)
    assert "all else" not in " ".join(section(with_gaps(calm), "From training"))


def test_without_held_out_data_the_steps_end_at_inference() -> None:
    lines = section(
        with_gaps(replace(LOSS, held_out=None, generalization=None, held_out_samples=None)), "From training"
    )
    assert "held-out" not in " ".join(lines)
    assert lines[0].startswith("From training to inference")


@pytest.mark.parametrize("step", ["training_noise", "inconsistency", "generalization"])
def test_the_largest_step_is_named_only_if_it_is_significant_and_most_of_it(step: str) -> None:
    none = Gap("metric", 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, samples=256)
    words = {
        "training_noise": "all but BatchNorm to eval mode",
        "inconsistency": "to running",
        "generalization": "to held-out data",
    }
    sure = replace(none, **{step: -0.4, f"{step}_interval": (-0.5, -0.3)})
    assert f"{words[step]}" in said(with_gaps(sure)).partition("The largest step")[2]
    unsure = replace(none, **{step: -0.4, f"{step}_interval": (-0.9, 0.1)})
    for gap in (none, unsure, replace(none, **{step: -0.4})):
        assert "The largest step" not in said(with_gaps(gap))
        assert "No step is significant (95%) on these samples." in said(with_gaps(gap))
    other = "inconsistency" if step == "generalization" else "generalization"
    assert "The largest step" not in said(with_gaps(replace(sure, **{other: 0.41})))


def test_the_output_part_leaves_loss_and_metric_to_the_gaps() -> None:
    report = causes.lag()
    assert "Loss: " not in said(report)
    without = replace(report, summary=replace(report.summary, gaps=()))
    assert "Loss: 0.312 in training" in said(without)


def remedy(name: str, after: Score, before: Score | None = None) -> Remedy:
    """A remedy that was scored on 360 images."""
    return Remedy(name, ("bn1",), before or Score(1.92, 0.41), after, None, 360, "")


def test_the_best_remedy_comes_first_and_is_put_in_words() -> None:
    lines = section(causes.lag(), REMEDIES)
    assert lines[1] == "  Recalibrating takes the metric from 0.41 to 0.98."
    assert lines[3].split() == ["recalibrated", "1.92", "→", "0.08", "0.41", "→", "0.98"]
    assert [line[2:].partition("  ")[0] for line in lines[3:7]] == [
        "recalibrated", "recalibrated on held-out data", "batch statistics", "batch statistics, batches of 16",
    ]  # fmt: skip
    assert "normalized with its own statistics; baseline: loss 1.64" in said(causes.lag())


@pytest.mark.parametrize(
    ("remedies", "words"),
    [
        ([remedy("batch statistics", Score(2.5, None))], "None of them lowers the loss, which is 1.92 now."),
        (
            [remedy("recalibrated", Score(None, 0.98), Score(None, 0.41))],
            "Recalibrating takes the metric from 0.41 to 0.98.",
        ),
        ([remedy("recalibrated", Score(None, None))], "None of them could be scored."),
        (
            [remedy("batch statistics, batches of 32", Score(0.5, None))],
            "Normalizing at inference with batch statistics of batches of 32 takes the loss from 1.92 to 0.5.",
        ),
        ([remedy("something new", Score(0.5, None))], "Something new takes the loss from 1.92 to 0.5."),
        (
            [replace(remedy("recalibrated", Score(0.5, None)), loss_change=Estimate(-1.42, (-1.9, -0.9)))],
            "Recalibrating takes the loss from 1.92 to 0.5 (95%: by -1.9 to -0.9).",
        ),
        (
            [replace(remedy("recalibrated", Score(1.9, None)), loss_change=Estimate(-0.02, (-0.1, 0.06)))],
            "None of them surely lowers the loss, which is 1.92 now.",
        ),
        (
            [
                replace(remedy("batch statistics", Score(1.7, None)), loss_change=Estimate(-0.22, (-0.6, 0.16))),
                replace(remedy("recalibrated", Score(1.8, None)), loss_change=Estimate(-0.12, (-0.2, -0.04))),
            ],
            "Recalibrating takes the loss from 1.92 to 1.8 (95%: by -0.2 to -0.04); what gains more in the table is not"
            " sure.",
        ),
        (
            [replace(remedy("recalibrated", Score(1.9, None)), loss_change=Estimate(-0.02, (-0.03, -0.01)))],
            "Recalibrating takes the loss from 1.92 to 1.9 (95%: by -0.03 to -0.01), which is little.",
        ),
        (
            [remedy("recalibrated", Score(0.5, None), Score(None, None))],
            "Recalibrating takes the loss from a value that is not finite to 0.5.",
        ),
    ],
)
def test_what_a_remedy_does_not_do_is_said_too(remedies: list[Remedy], words: str) -> None:
    assert " ".join(" ".join(section(with_remedies(*remedies), REMEDIES)[1:4]).split()).startswith(words)


@pytest.mark.parametrize(
    ("goal", "known", "first", "words"),
    [
        ("max", True, "calm", "takes the metric from 0.41 to 0.9"),
        ("min", True, "sharp", "takes the metric from 0.41 to 0.2"),
        ("max", False, "sharp", "takes the loss from 1.92 to 0.1; the metric goes from 0.41 to 0.2"),
    ],
)
def test_remedies_are_ranked_by_the_metric_where_its_direction_is_known(
    goal: Goal, known: bool, first: str, words: str
) -> None:
    gap = Gap("metric", 0.9, 0.9, 0.4, 0.41, 0.0, -0.5, 0.01, goal, goal_is_known=known)
    scores = {"sharp": Score(0.1, 0.2), "calm": Score(0.5, 0.9)}
    found = [remedy(name, after, Score(1.92, 0.41)) for name, after in scores.items()]
    lines = section(replace(with_gaps(gap), remedies=tuple(found)), REMEDIES)
    assert lines[1] == f"  {first.capitalize()} {words}."
    assert lines[3].split()[0] == first


def test_a_metric_that_reads_the_same_stays_where_it_is() -> None:
    found = remedy("recalibrated", Score(0.1, 0.99999), Score(1.92, 1.0))
    gap = Gap("metric", 0.9, 0.9, 0.4, 0.41, 0.0, -0.5, 0.01, "max", goal_is_known=False)
    text = said(replace(with_gaps(gap), remedies=(found,)))
    assert "takes the loss from 1.92 to 0.1; the metric stays at 1." in text


def test_other_samples_than_those_of_the_steps_are_said_to_be_others() -> None:
    other = "Not the same samples as for the steps above (128 held-out samples): their values differ."
    report = replace(with_gaps(LOSS), remedies=(remedy("recalibrated", Score(0.5, None), Score(1.85, None)),))
    assert LOSS.held_out == 1.92
    assert other in said(report)
    assert other not in said(replace(report, remedies=(remedy("recalibrated", Score(0.5, None)),)))


def test_the_samples_of_a_half_are_said_to_be_that() -> None:
    one = Remedy("recalibrated", ("a",), Score(2.0, None), Score(1.0, None), None, 360, "")
    half = replace(one, name="micro-batch statistics, pooled", after=Score(0.5, None), images=184)
    text = said(with_remedies(one, half))
    assert "on 360 held-out samples, or on the 184 of every other batch, which chose nothing" in text
    assert "Pooling running statistics over micro-batches takes the loss from 2" in text


def test_what_was_cut_short_says_so_in_its_own_row_alone() -> None:
    """The title has the samples of the others, and a note on other values than those of the steps is not due to it."""
    whole = Remedy("recalibrated", ("a",), Score(LOSS.held_out, None), Score(1.0, None), None, 128, "all in one")
    short = replace(whole, name="instance statistics", before=Score(1.7, None), after=Score(1.8, None), images=32)
    text = said(replace(with_gaps(LOSS), remedies=(whole, replace(short, cut_short=True))))
    assert "What remedies without training would give, on 128 held-out samples" in text
    assert "which chose nothing" not in text
    assert "instance statistics: all in one; worse on 32 held-out samples, and scored on no more" in text
    assert "Not the same samples" not in text
    assert "all in one; worse" not in said(replace(with_gaps(LOSS), remedies=(whole, short)))
    lines = section(replace(with_gaps(LOSS), remedies=(whole, replace(short, cut_short=True))), REMEDIES)
    assert [line.split()[-4] for line in lines if "→" in line] == ["128", "32"]


def test_a_row_goes_from_its_baseline_to_its_score() -> None:
    """As the sentence above the table does."""
    half = Remedy("example weighing", ("a",), Score(0.134, None), Score(0.116, None), Score(0.126, None), 64, "")
    text = said(with_remedies(half))
    assert "0.126 → 0.116" in text
    assert "0.134" not in text


def test_what_a_score_is_now_is_that_of_the_most_samples() -> None:
    """The best row may be of a half."""
    whole = Remedy("recalibrated", ("a",), Score(2.33, None), Score(2.4, None), None, 64, "")
    half = replace(whole, name="instance renorm", before=Score(2.21, None), after=Score(2.3, None), images=32)
    assert "lowers the loss, which is 2.33 now" in said(with_remedies(half, whole))


def test_a_remedy_without_scores_comes_last() -> None:
    unscored, scored = remedy("a", Score(None, None)), remedy("b", Score(3.0, None))
    lines = section(with_remedies(unscored, scored), REMEDIES)
    assert [line.split()[0] for line in lines[3:5]] == ["b", "a"]


def test_the_noisiest_backward_statistics_are_listed() -> None:
    lines = section(causes.training(), BACKWARD)
    assert [line.split()[1] for line in lines[2:7]] == ["8.0", "12.0", "16.0", "20.0", "24.0"]
    assert "4 more layers with less noise" in lines[7]
    assert len(section(causes.training(), BACKWARD, show_all=True)) > len(lines)


@pytest.mark.parametrize(
    ("angle", "words"),
    [
        (GradientAngle(0.857, 0.998, 12), "population statistics is 31° (cosine 0.857, mean over 12 micro-batches)"),
        (
            GradientAngle(0.857, 0.998, 12),
            "4° (cosine 0.998) between their averages over all of these: batch noise, which averages out.",
        ),
        (
            GradientAngle(0.5, 0.6, 12),
            "53° (cosine 0.600) between their averages over all of these: a bias, if it stays with more micro-batches;"
            " averaging over steps does not remove a bias.",
        ),
    ],
)
def test_the_gradient_angle_is_put_in_words(angle: GradientAngle, words: str) -> None:
    report = causes.training()
    report = replace(report, summary=replace(report.summary, gradient_angle=angle))
    assert words in said(report)


def moved(*updates: Updates) -> Report:
    """A report of layers with these updates."""
    return parts.report([parts.layer(f"bn{index}", None, None, updates=one) for index, one in enumerate(updates)])


def test_updates_as_configured_are_one_sentence_and_others_a_table() -> None:
    fine, twice, fast = Updates(1.0, 0.1, 0.1, 0.02), Updates(2.0, 0.19, 0.1, 0.06, 1.0), Updates(1.0, 0.3, 0.1, 0.04)
    assert "Updated once per step and call, at the configured rate, in all 2 layers." in said(moved(fine, fine))
    lines = section(moved(fine, twice, fast, Updates(1.0, None, None, 0.0)), UPDATES)
    assert [line.split()[:4] for line in lines[2:4]] == [["bn1", "2", "1", "0.19"], ["bn2", "1", "0", "0.3"]]
    drift = "Largest drift: the running mean of bn1 moved by 0.06 standard deviations per step (root mean square)."
    assert " ".join(line.strip() for line in lines[-2:]) == drift


def test_a_layer_that_is_called_twice_may_be_updated_twice_with_different_batches() -> None:
    report = moved(Updates(2.0, 0.19, 0.1, 0.06))
    called_twice = replace(report, layers=(replace(report.layers[0], calls_per_forward=2),))
    assert "Updated once per step and call" in said(called_twice)
    assert "Updated once" not in said(report)


def test_extra_passes_and_regrouped_samples_have_their_cost() -> None:
    scan = replace(
        parts.SCAN,
        passes=(ExtraPass("held-out data", "eval_data is given.", 128, 0.41),),
        pool=Pool(512, 1_258_291, 256),
    )
    found = said(replace(parts.report([]), scan=scan))
    assert (
        "held-out data: 128 samples, 0.4 s (eval_data is given) samples regrouped at random: 512 samples, 1.2 MiB"
        in found
    )
    assert "1.2 MiB, in 256 micro-batches (to measure non-i.i.d. batches)" in found


@pytest.mark.parametrize(("number", "size"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5120.0 GiB")])
def test_sizes(number: int, size: str) -> None:
    assert figures.size(number) == size


def test_parts_without_anything_are_left_out() -> None:
    bare = parts.report([parts.layer("bn", None, None)])
    titles = ("From training", REMEDIES, BACKWARD, UPDATES, "Measured besides")
    assert [section(bare, title) for title in titles] == [[]] * 5
