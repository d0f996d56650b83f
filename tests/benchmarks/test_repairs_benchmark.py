"""The benchmark of repairs: its data are apart, its regimes differ in one thing, and its tables count right."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.repairs import digits, finetuned, scratch, task
from benchmarks.repairs.__main__ import render
from benchmarks.repairs.arms import REPAIRS, Table, arm_of, choose, difference, joined, repairs_for, rows, verdict
from benchmarks.repairs.task import REGIMES, Regime
from bnprobe.analysis.comparison import CONTROL, mean_estimate
from bnprobe.nn import BatchRenorm2d
from bnprobe.records import Arm, Run, Score

STEPS = 2
REGIME = REGIMES[0]


def run(accuracy: float | None, seed: int = 0, ending: str = "finished", kept: int = 1) -> Run:
    return Run(seed, 1, kept, Score(0.5, accuracy), ending, "", 0.0)


def arm(name: str, *accuracies: float | None) -> Arm:
    return arm_of(name, [run(accuracy, seed) for seed, accuracy in enumerate(accuracies)])


def parameters(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_training_choosing_and_proving_share_no_digit() -> None:
    parts = task.parts()
    sizes = [len(part) for part in (parts.training, parts.choosing, parts.proving)]
    assert sizes == [320, 400, 1077]  # of 1797
    assert parts.training.targets.bincount().tolist() == [task.TRAINED_PER_CLASS] * task.CLASSES
    held_out = torch.cat([parts.choosing.inputs, parts.proving.inputs])
    assert len(held_out.flatten(1).unique(dim=0)) == 1477  # noise makes all images different, but for repeated ones
    counted = sum(part.targets.bincount() for part in (parts.training, parts.choosing, parts.proving))
    assert counted.tolist() == torch.from_numpy(load_digits().target).bincount().tolist()


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_every_regime_has_the_same_images_in_a_step_and_ten_steps_in_an_epoch(regime: Regime) -> None:
    batches = list(task.loader(regime))
    assert {len(labels) for _, labels, _ in batches} == {regime.batch_size}
    assert regime.batch_size * regime.accumulate == task.STEP_IMAGES
    assert len(batches) == 10 * regime.accumulate
    assert (
        torch.cat([labels for _, labels, _ in batches]).bincount().tolist() == [task.TRAINED_PER_CLASS] * task.CLASSES
    )


def test_only_the_last_regime_sorts_by_class() -> None:
    alone = [all(len(labels.unique()) == 1 for _, labels, _ in task.loader(regime)) for regime in REGIMES]
    assert alone == [False, False, True]


def test_training_images_are_jittered_anew_and_held_out_ones_are_not() -> None:
    loader = task.loader(REGIME)
    assert not torch.equal(*(next(iter(loader))[0] for _ in range(2)))
    one, other = (task.held_out(task.parts().proving)[0][0] for _ in range(2))
    assert torch.equal(one, other)
    assert sum(len(labels) for _, labels, _ in task.held_out(task.parts().proving)) == 1077


def test_each_batch_is_of_one_camera_of_two_and_the_second_gives_negatives() -> None:
    batches = list(task.loader(task.TWO_CAMERAS))
    assert {len(camera.unique()) for _, _, camera in batches} == {1}
    means = {int(camera[0]): float(images.mean()) for images, _, camera in batches}
    assert means[0] == pytest.approx(1 - means[1], abs=0.05)
    assert {len(camera.unique()) for _, _, camera in task.held_out(task.parts().proving, cameras=2)} == {2}


def test_arms_that_would_be_plain_bn_are_left_out() -> None:
    assert set(REPAIRS) - set(repairs_for(4)) == {"ghost", "per-domain"}
    assert repairs_for(32, domains=2) == list(REPAIRS)


def test_a_jittered_image_is_moved_by_one_pixel_at_most_and_little_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "NOISE", 0.0)
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 4] = 1
    places = {tuple(found[0, 0].nonzero()[0].tolist()) for found in (task.jittered(image) for _ in range(200))}
    assert places == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}


def test_arms_from_scratch_begin_alike_and_differ_in_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "train", lambda job, **others: _untrained(job.model))
    models = [scratch.trained.__wrapped__(name, REGIME, 0.01, 3, STEPS)[0] for name in scratch.TRAINED]
    assert all(torch.equal(parameters(models[0]), parameters(model)) for model in models[1:])
    counts = [[sum(type(part) is kind for part in model.modules()) for kind in KINDS] for model in models]
    assert counts == [[15, 0, 0], [0, 15, 0], [0, 0, 15]]


KINDS = (nn.BatchNorm2d, BatchRenorm2d, nn.GroupNorm)


def _untrained(model: nn.Module) -> scratch.TrainingOutcome:
    return scratch.TrainingOutcome(0, 0, "finished", "", 0.0, None, None, model.state_dict())


def test_recalibration_leaves_the_network_alone() -> None:
    model = scratch.start(REGIME, 0.01, 0, STEPS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    anew = scratch.recalibrated(model, REGIME)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(parameters(anew), parameters(model))
    assert not torch.allclose(anew.bn.running_mean, model.bn.running_mean)


def test_a_rate_is_the_only_thing_that_changes_between_tries() -> None:
    subject = digits.subject_of("batch2", STEPS, 1)
    changed = finetuned.at_rate(subject, 0.125)
    optimizer = changed.make_optimizer([nn.Parameter(torch.zeros(1))])
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.param_groups[0]["momentum"] == subject.train.optimizer.args["momentum"]
    assert changed.train.steps == subject.train.steps


def test_the_control_is_tried_on_the_images_for_choosing_and_leaves_the_start_alone() -> None:
    subject = digits.subject_of("batch2", STEPS, 1)
    before = parameters(subject.start).clone()
    score = finetuned.control_score(subject, 0.01)
    assert torch.equal(parameters(subject.start), before)
    images = subject.choosing.images
    assert images != subject.proving.images
    assert score.metric is not None
    assert score.metric * images == pytest.approx(round(score.metric * images), abs=1e-3)


def test_fine_tuning_begins_with_the_network_from_scratch_and_keeps_choosing_and_proving_apart() -> None:
    subject = finetuned.subject_of(REGIME, 0, 0.01, STEPS, STEPS)
    assert torch.equal(parameters(subject.model), parameters(scratch.start(REGIME, 0.01, 0, STEPS)))
    assert torch.equal(parameters(subject.model), parameters(subject.start))
    assert len(subject.recalibrated) == 15
    assert (subject.choosing.images, subject.proving.images) == (400, 1077)
    assert subject.measure == "metric"


def test_the_sample_is_trained_on_the_batches_that_harmed_it() -> None:
    sizes = {}
    for name in digits.CHECKPOINTS:
        subject = digits.subject_of(name, STEPS, 1)
        labels = [labels for _, labels in islice(subject.training.batches, 20)]
        sizes[name] = ({len(each) for each in labels}, all(len(each.unique()) == 1 for each in labels))
    assert sizes == {"batch2": ({2}, False), "sorted": ({8}, True)}


def test_the_rate_is_that_of_the_best_accuracy_then_of_the_smallest_loss() -> None:
    scores = {0.1: Score(1.0, 0.8), 0.2: Score(0.5, 0.8), 0.3: Score(0.1, 0.7), 0.4: Score(None, None)}
    choice = choose(scores, scores.__getitem__)
    assert choice.rate == 0.2
    assert choice.words() == "0.1: 0.800, 0.2: 0.800, 0.3: 0.700, 0.4: failed"


def test_differences_are_taken_run_by_run() -> None:
    found = difference(arm("one", 0.9, 0.5, 0.72), arm("control", 0.8, 0.41, 0.6))
    assert found is not None
    assert found.mean == pytest.approx(0.31 / 3)
    assert found.interval is not None
    assert found.interval[1] - found.interval[0] < 0.1  # of the arms themselves it is ten times as wide
    assert verdict(found) == "better"


def test_an_arm_of_one_run_is_held_against_every_run_of_the_control() -> None:
    found = difference(arm("as is", 0.5), arm("control", 0.7, 0.9))
    assert found is not None
    assert found.mean == pytest.approx(-0.3)
    assert difference(arm("as is", None), arm("control", 0.7, 0.9)) is None


@pytest.mark.parametrize(
    ("gains", "word"), [((0.1, 0.2, 0.15), "better"), ((-0.1, -0.2), "same"), ((-0.1, -0.11), "worse"), ((0.1,), "")]
)
def test_verdicts_need_an_interval_that_leaves_out_zero(gains: tuple[float, ...], word: str) -> None:
    assert verdict(mean_estimate(gains)) == word


def test_proofs_of_several_seeds_join_arm_by_arm() -> None:
    parts = [(arm("as is", 0.5), arm("frozen", 0.7)), (arm("as is", 0.6), arm("frozen", 0.9))]
    names = {each.name: [run.score.metric for run in each.runs] for each in joined(parts)}
    assert names == {"as is": [0.5, 0.6], "frozen": [0.7, 0.9]}


def test_a_table_names_the_control_and_runs_that_diverged() -> None:
    broken = arm_of("frozen", [run(None, 0, "diverged", kept=0), run(0.9, 1)])
    table = Table("title", "words", (arm(CONTROL, 0.5, 0.7), broken), CONTROL, {CONTROL: 0.01})
    heading, control, other = rows(table)
    assert control[:4] == [f"{CONTROL} (control)", "0.01", "2", "1"]
    assert control[4].startswith("0.600 [")
    assert other == ["frozen", "", "2", "0, 1", "not finite", "0.500", "not finite", " (1 diverged)"]
    assert len(heading) == len(control)
    assert "### title\n\nwords\n\n| arm" in render("", {"Chapter": [table]}, 1.0)
