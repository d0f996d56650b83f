"""The parts that are there only if something was measured: gaps, remedies, backward, updates, cost."""

from __future__ import annotations

from dataclasses import replace

import fabricated_causes as causes
import fabricated_parts as parts
import pytest
from rich.text import Text

from bnprobe.records import ExtraPass, Gap, GradientAngle, Pool, Remedy, Report, Score, Updates
from bnprobe.reports import FORMATS, RenderOptions, figures, training
from bnprobe.reports.cost import cost
from bnprobe.reports.gaps import gaps
from bnprobe.reports.layout import Page
from bnprobe.reports.whatif import best_first, best_in_words, whatif

PAGE = Page(80, unicode=True)
LOSS = Gap("loss", 0.071, 0.052, 1.88, 1.92, -0.019, 1.828, 0.04)


def text(lines: list[Text]) -> str:
    """The lines as one."""
    return "\n".join(line.plain.rstrip() for line in lines)


def flat(lines: list[Text]) -> str:
    """The words, however they are wrapped."""
    return " ".join(text(lines).split())


def test_gaps_lead_from_training_to_held_out_data() -> None:
    lines = text(gaps([LOSS], PAGE)).split("\n")
    assert [line.split()[-1] for line in lines[2:9]] == ["0.071", "-0.019", "0.052", "+1.83", "1.88", "+0.04", "1.92"]
    assert "The largest step in the loss is the train/test inconsistency" in flat(gaps([LOSS], PAGE))


def test_without_held_out_data_the_steps_end_at_inference() -> None:
    said = text(gaps([replace(LOSS, held_out=None, generalization=None)], PAGE))
    assert "held-out" not in said
    assert said.startswith("From training to inference")


@pytest.mark.parametrize("step", ["training_noise", "inconsistency", "generalization"])
def test_the_largest_step_is_named_and_only_if_it_is_most_of_it(step: str) -> None:
    none = Gap("metric", 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    words = {"training_noise": "training noise", "inconsistency": "inconsistency", "generalization": "generalization"}
    assert f"{words[step]}" in flat(gaps([replace(none, **{step: -0.4})], PAGE)).partition("The largest step")[2]
    assert "The largest step" not in flat(gaps([none], PAGE))
    assert "The largest step" not in flat(gaps([replace(none, **{step: 0.01})], PAGE))


def test_the_output_part_leaves_loss_and_metric_to_the_gaps() -> None:
    report = causes.lag()
    assert "Loss: " not in FORMATS["terminal"](report, RenderOptions())
    without = replace(report, summary=replace(report.summary, gaps=()))
    assert "Loss: 0.312 on the train path" in FORMATS["terminal"](without, RenderOptions())


def remedy(name: str, after: Score, before: Score | None = None) -> Remedy:
    """A remedy that was scored on 360 images."""
    return Remedy(name, ("bn1",), before or Score(1.92, 0.41), after, None, 360, "")


def test_the_best_remedy_comes_first_and_is_put_in_words() -> None:
    remedies = causes.lag().remedies
    assert [made.name for made in best_first(remedies)] == [
        "recalibrated", "evaluation statistics", "batch statistics", "batch statistics, batches of 16",
    ]  # fmt: skip
    assert best_in_words(best_first(remedies)) == "Recalibrating takes the loss from 1.92 to 0.08."
    lines = text(whatif(remedies, PAGE)).split("\n")
    assert lines[3].split() == ["recalibrated", "1.92", "→", "0.08", "0.41", "→", "0.98"]
    assert "to be held against loss 1.64" in flat(whatif(remedies, PAGE))


@pytest.mark.parametrize(
    ("remedies", "words"),
    [
        ([remedy("batch statistics", Score(2.5, None))], "None of them lowers the loss, which is 1.92 as it is."),
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
    ],
)
def test_what_a_remedy_does_not_do_is_said_too(remedies: list[Remedy], words: str) -> None:
    assert best_in_words(best_first(remedies)) == words


def test_a_remedy_without_scores_comes_last() -> None:
    unscored, scored = remedy("a", Score(None, None)), remedy("b", Score(3.0, None))
    assert best_first([unscored, scored]) == [scored, unscored]


def test_the_noisiest_backward_statistics_are_listed() -> None:
    lines = text(training.backward(causes.training(), PAGE, show_all=False)).split("\n")
    assert [line.split()[1] for line in lines[2:7]] == ["8.0", "12.0", "16.0", "20.0", "24.0"]
    assert "4 more layers with less noise" in lines[7]
    assert len(training.backward(causes.training(), PAGE, show_all=True)) > len(lines)


@pytest.mark.parametrize(
    ("angle", "said"),
    [
        (GradientAngle(0.857, 0.998, 12), "turned by 31°"),
        (GradientAngle(0.857, 0.998, 12), "4° are left (cosine 0.998): batch noise, which averages out."),
        (
            GradientAngle(0.5, 0.6, 12),
            "53° are left (cosine 0.600): a bias if it stays with more micro-batches;"
            " averaging over steps does not remove a bias.",
        ),
    ],
)
def test_the_gradient_angle_is_put_in_words(angle: GradientAngle, said: str) -> None:
    report = causes.training()
    report = replace(report, summary=replace(report.summary, gradient_angle=angle))
    assert said in flat(training.backward(report, PAGE, show_all=False))


def moved(*updates: Updates) -> Report:
    """A report of layers with these updates."""
    return parts.report([parts.layer(f"bn{index}", None, None, updates=one) for index, one in enumerate(updates)])


def test_updates_as_configured_are_one_sentence_and_others_a_table() -> None:
    fine, twice, fast = Updates(1.0, 0.1, 0.1, 0.02), Updates(2.0, 0.19, 0.1, 0.06, 1.0), Updates(1.0, 0.3, 0.1, 0.04)
    said = flat(training.updates(moved(fine, fine), PAGE, show_all=False))
    assert "Updated once per step and call, at the configured rate, in all 2 layers." in said
    lines = text(training.updates(moved(fine, twice, fast, Updates(1.0, None, None, 0.0)), PAGE, False)).split("\n")
    assert [line.split()[:4] for line in lines[2:4]] == [["bn1", "2", "1", "0.19"], ["bn2", "1", "0", "0.3"]]
    assert lines[-1] == "  Largest drift in one step: 0.06 running standard deviations, in bn1."


def test_a_layer_that_is_called_twice_may_be_updated_twice_with_different_batches() -> None:
    report = moved(Updates(2.0, 0.19, 0.1, 0.06))
    called_twice = replace(report, layers=(replace(report.layers[0], calls_per_forward=2),))
    assert "Updated once per step and call" in flat(training.updates(called_twice, PAGE, show_all=False))
    assert "Updated once" not in flat(training.updates(report, PAGE, show_all=False))


def test_extra_passes_and_the_pool_have_their_cost() -> None:
    scan = replace(
        parts.SCAN,
        passes=(ExtraPass("evaluation data", "eval_data is given.", 128, 0.41),),
        pool=Pool(512, 1_258_291, 256),
    )
    said = flat(cost(scan, PAGE))
    assert "evaluation data: 128 images, 0.4 s (eval_data is given) pool: 512 images, 1.2 MiB" in said
    assert said.endswith("regrouped at random into 256 micro-batches")
    assert cost(parts.SCAN, PAGE) == []


@pytest.mark.parametrize(("number", "size"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5120.0 GiB")])
def test_sizes(number: int, size: str) -> None:
    assert figures.size(number) == size


def test_parts_without_anything_are_left_out() -> None:
    bare = parts.report([parts.layer("bn", None, None)])
    assert [
        gaps([], PAGE),
        whatif([], PAGE),
        training.backward(bare, PAGE, False),
        training.updates(bare, PAGE, False),
    ] == [[]] * 4
