"""Every remedy gives what really doing it to a copy of the model gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import bnprobe
from bnprobe.config.spec import ScanSettings
from bnprobe.errors import UsageError
from bnprobe.measure.batch import MicroBatch, join, pick
from bnprobe.measure.forward_pass import Blend, Blending, Pass, Recorded
from bnprobe.measure.further import micro_batch_statistics
from bnprobe.measure.physical_batch import Batching
from bnprobe.measure.population import Population, steady_population
from bnprobe.measure.reader import Reader
from bnprobe.measure.restore import untouched
from bnprobe.measure.scan_loop import probe
from bnprobe.measure.session import PathName, Session, UserFunctions, no_progress
from bnprobe.measure.trial import WEIGHTS, MicroBatchStatistics, Trial
from bnprobe.measure.what_if import what_if
from bnprobe.nn import domain
from bnprobe.records import Estimate, Goal, Remedy, Score
from bnprobe.repairs.domains import recalibrate_domains
from support.fingerprint import fingerprint
from support.networks import Dense, Flat, MinibatchStd, Residual, Siamese, images, unsettled
from support.running import REAL, norms, running, twin_of

SIZE = 4


def labelled(count: int, *shape: int, seed: int = 2, shift: float = 0.0) -> list[Any]:
    """Micro-batches whose images are sorted by brightness, with labels that follow from it, file names and a number."""
    flat = torch.cat(images(count, SIZE, *shape, seed=seed)) + shift
    flat = flat + torch.linspace(-1, 1, count * SIZE).reshape(-1, *[1] * len(shape))
    labels = (flat.flatten(1).mean(1) > shift).long()
    parts = zip(flat.split(SIZE), labels.split(SIZE), strict=True)
    return [
        {"x": x, "y": y, "names": [f"{k}-{i}" for i in range(SIZE)], "scale": 2.0} for k, (x, y) in enumerate(parts)
    ]


def forward(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"] * batch["scale"])


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(forward(model, batch), batch["y"])


def metric(model: nn.Module, batch: Any) -> float:
    """No mean over images: that of a larger batch is another number."""
    return float(forward(model, batch).max())


FUNCTIONS = UserFunctions(forward, loss, metric)


def plain_loss(model: nn.Module, batch: Any) -> Tensor:
    """On the batch's own tensors: single samples need no forward pass of their own."""
    return F.cross_entropy(model(batch["x"]), batch["y"])


PLAIN = UserFunctions(None, plain_loss)


def scored(model: nn.Module, batches: Sequence[Any]) -> Score:
    with torch.no_grad():
        values = [(float(loss(model, batch)), metric(model, batch)) for batch in batches]
    return Score(*(sum(column) / len(values) for column in zip(*values, strict=True)))


def close(score: Score | None, rel: float = 1e-4) -> Score:
    assert score is not None
    return Score(pytest.approx(score.loss, rel=rel), pytest.approx(score.metric, rel=rel))


def recalibrated(model: nn.Module, batches: Sequence[Any]) -> nn.Module:
    """All images as one batch, torch's own update with momentum 1: mean and unbiased variance of everything."""
    twin = copy.deepcopy(model).train()
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    for norm in norms(twin):
        norm.momentum = 1.0
    with torch.no_grad():
        forward(twin, join(list(batches)))
    return twin.eval()


class OneByOne(nn.Module):
    """A network that runs every sample by itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.network(sample) for sample in x.split(1)])


def counted(batches: Sequence[Any], sizes: Sequence[int] | None = None) -> list[MicroBatch]:
    return [MicroBatch(batch, SIZE if sizes is None else sizes[k]) for k, batch in enumerate(batches)]


def remedies(
    model: nn.Module, training: Sequence[Any], evaluation: Sequence[Any], at_once: int = 99, emulate: bool = True
) -> dict[str, Remedy]:
    with running(model, evaluation, SIZE, FUNCTIONS) as (session, emulation):
        batching = Batching(SIZE, emulation if emulate else REAL, at_once)
        found = what_if(session, counted(training), counted(evaluation), batching)
    return {remedy.name: remedy for remedy in found.remedies}


SHAPES: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "flat": (Flat, (6,)),
    "residual": (Residual, (3, 6, 6)),
    "dense": (Dense, (3, 6, 6)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_remedies_agree_with_really_doing_it(name: str) -> None:
    make, shape = SHAPES[name]
    model, training, evaluation = unsettled(make()), labelled(10, *shape), labelled(8, *shape, seed=5, shift=1)
    found = remedies(model, training, evaluation)
    # a flat sample gives one value per channel
    several = ["instance statistics", "instance renorm", "example weighing"] if len(shape) > 1 else []
    larger = "batch statistics, batches of 16"
    assert list(found) == ["recalibrated", "evaluation statistics", "batch statistics", *several, larger]
    for name in several[1:]:
        check_conversion(found.pop(name), model, training, evaluation)
    before = scored(twin_of(model), evaluation)
    everything = range(len(norms(model)))
    names = tuple(name for name, module in model.named_modules() if module in norms(model))
    assert {remedy.before for remedy in found.values()} == {found["recalibrated"].before}
    assert found["recalibrated"].before == close(before)
    assert found["recalibrated"].after == close(scored(recalibrated(model, training), evaluation))
    assert found["evaluation statistics"].after == close(scored(recalibrated(model, evaluation), evaluation))
    assert found["batch statistics"].after == close(scored(twin_of(model, *everything), evaluation))
    joined = [join(evaluation[:4]), join(evaluation[4:])]
    assert found[larger].after == close(scored(twin_of(model, *everything), joined))
    assert found[larger].control == close(scored(twin_of(model), joined))
    if several:
        assert found["instance statistics"].after == close(scored(OneByOne(twin_of(model, *everything)), evaluation))
    for remedy in found.values():
        assert remedy.after.loss != pytest.approx(before.loss, rel=1e-3)
        assert remedy.layers == names
        assert remedy.images == 32
        baseline = remedy.control or remedy.before
        for measure, change in (("loss", remedy.loss_change), ("metric", remedy.metric_change)):
            assert change is not None
            assert change.mean == pytest.approx(getattr(remedy.after, measure) - getattr(baseline, measure), abs=1e-9)
            assert change.interval is not None
    assert [name for name, remedy in found.items() if remedy.control is not None] == [larger]
    assert found["recalibrated"].detail == "pooled mean and unbiased variance of 40 training samples"


def check_conversion(remedy: Remedy, model: nn.Module, training: list[Any], evaluation: list[Any]) -> None:
    """It gives what ``bnprobe.convert`` gives, on every other batch, from recalibrated statistics unless worse."""
    half = evaluation[::2]
    start = recalibrated(model, training) if remedy.recalibrated else twin_of(model)
    to = {"instance renorm": "instance-renorm", "example weighing": "example-weighing"}[remedy.name]
    converted = bnprobe.convert(start, to=to, blend=remedy.blend).eval()
    assert remedy.after == close(scored(converted, half))
    assert remedy.before == close(scored(twin_of(model), half))
    assert (remedy.control or remedy.before) == close(scored(start, half))
    assert remedy.images == SIZE * len(half)


def test_the_weight_of_example_weighing_is_the_best_on_the_batches_that_score_nothing() -> None:
    model, training, evaluation = unsettled(Residual()), labelled(10, 3, 6, 6), labelled(9, 3, 6, 6, seed=5)
    remedy = remedies(model, training, evaluation)["example weighing"]
    start = recalibrated(model, training) if remedy.recalibrated else twin_of(model)
    scores = {
        weight: scored(bnprobe.convert(start, to="example-weighing", blend=weight).eval(), evaluation[1::2])
        for weight in WEIGHTS
    }
    assert remedy.blend == max(scores, key=lambda weight: scores[weight].metric)  # of which larger is better
    assert len({score.metric for score in scores.values()}) == len(WEIGHTS)
    assert remedy.detail.endswith("the best on 16 other held-out samples")
    assert "example weighing" not in remedies(model, training, evaluation[:1])  # nothing is left to choose by


def distance(model: nn.Module, batch: Any) -> Tensor:
    """From the outputs that are wanted."""
    return (model(batch["x"]) - batch["wanted"]).square().mean()


def off_by(factor: float, *parts: list[Any]) -> nn.Module:
    """A network whose running variances are off, on data that want the outputs of what fits all of it."""
    fitting = recalibrated(unsettled(Residual()), [batch for part in parts for batch in part])
    for part in parts:
        for batch in part:
            batch["wanted"] = fitting(batch["x"]).detach()
    for norm in norms(fitting):
        norm.running_var *= factor
    return fitting


def test_no_larger_weight_is_tried_once_one_is_worse() -> None:
    """Where passes are dear."""
    training, evaluation = labelled(10, 3, 6, 6), labelled(9, 3, 6, 6, seed=5)
    for factor, brief, best, tried in (
        (1.0, True, "0.125", "0.125, 0.25"),
        (1.0, False, "0.125", "0.125, 0.25, 0.5, 0.75"),
        (4.0, True, "0.5", "0.125, 0.25, 0.5, 0.75"),
    ):
        model = off_by(factor, training, evaluation)
        with running(model, evaluation, SIZE, UserFunctions(None, distance)) as (session, emulation):
            found = what_if(session, [], counted(evaluation), Batching(SIZE, emulation, 99), brief=brief).remedies
        remedy = next(each for each in found if each.name == "example weighing")
        assert remedy.blend == float(best)
        assert remedy.detail.endswith(f"with weight {best}, of {tried} the best on 16 other held-out samples")


WORSE, UNSURE, BETTER = Estimate(1.0, (0.5, 1.5)), Estimate(0.1, (-0.3, 0.5)), Estimate(-1.0, (-1.5, -0.5))
LESS = Estimate(-0.1, (-0.5, 0.3))


@pytest.mark.parametrize(
    ("loss_change", "metric_change", "goal", "known", "nothing"),
    [
        (WORSE, None, "max", True, True),
        (UNSURE, None, "max", True, False),
        (WORSE, LESS, "max", True, True),
        (WORSE, UNSURE, "max", True, False),  # the metric may yet be surely better
        (WORSE, UNSURE, "min", True, True),
        (WORSE, LESS, "min", True, False),
        (WORSE, BETTER, "min", True, False),
        (WORSE, BETTER, "min", False, True),  # where nobody said what is better in the metric, the loss decides
        (LESS, BETTER, "max", True, False),  # the loss may yet be surely better
        (UNSURE, BETTER, "max", True, True),
        (None, BETTER, "max", False, True),
        (None, WORSE, "max", False, False),
    ],
)
def test_what_promises_nothing_is_worse_by_every_measure(
    loss_change: Estimate | None, metric_change: Estimate | None, goal: Goal, known: bool, nothing: bool
) -> None:
    score = Score(1.0, 1.0)
    remedy = Remedy("any", (), score, score, None, 8, "", loss_change, metric_change)
    with running(unsettled(Flat()), images(2, SIZE, 6), SIZE) as (session, emulation):
        trial = Trial(session, Batching(SIZE, emulation, 1), goal, known, "held-out", [])
    assert trial._promises_nothing(remedy) == nothing


def test_where_passes_are_dear_what_is_worse_on_a_part_is_scored_on_no_more() -> None:
    """The part is from all over the data, which is sorted. What is not worse is scored on all, as in other trials."""
    training, evaluation = labelled(10, 3, 6, 6), labelled(64, 3, 6, 6, seed=5)
    model = off_by(4.0, training, evaluation)
    with running(model, evaluation, SIZE, UserFunctions(None, distance)) as (session, emulation):
        how = (counted(training), counted(evaluation), Batching(SIZE, emulation, 99))
        usual, brief = (
            {each.name: each for each in what_if(session, *how, larger=False, brief=dear).remedies}
            for dear in (False, True)
        )
    assert list(usual) == list(brief)
    short = {name for name, remedy in brief.items() if remedy.cut_short}
    assert short == {"batch statistics", "instance statistics"}
    for name, remedy in brief.items():
        whole = evaluation[::2] if name in ("instance renorm", "example weighing") else evaluation
        part = whole[::4] if name in short else whole
        assert remedy.images == SIZE * len(part)
        values = [float(distance(model, batch).detach()) for batch in part]
        assert remedy.before.loss == pytest.approx(sum(values) / len(values), rel=1e-4)
        if name in short:
            assert remedy.loss_change.interval[0] > 0
        else:
            assert remedy.after.loss == pytest.approx(usual[name].after.loss, rel=1e-6)
            assert remedy.loss_change.mean == pytest.approx(usual[name].loss_change.mean, rel=1e-6)


@pytest.mark.parametrize("of", ["moments", "outputs"])
def test_rows_of_one_sample_are_blended_one_by_one(of: Blending) -> None:
    """As the converted layer does, which knows of no samples; with and without other micro-batches beside them."""

    class Frames(nn.Module):
        """Two rows per sample."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x.flatten(0, 1))).unflatten(0, (-1, 2))

    model, batches = unsettled(Frames()), images(3, SIZE, 2, 3, 6, 6)
    to = {"moments": "example-weighing", "outputs": "instance-renorm"}[of]
    converted = bnprobe.convert(model, to=to, blend=0.3).eval()
    with torch.no_grad():
        expected = converted(torch.cat(batches))
    with running(model, batches, SIZE) as (session, _):
        for size in (SIZE, 3 * SIZE):
            pass_ = Pass(3 * SIZE, size, blend=Blend(frozenset({0}), 0.3, of))
            output, _ = session.forward("eval", torch.cat(batches), pass_)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def without_each_quarter(model: nn.Module, training: list[Any]) -> list[nn.Module]:
    """Recalibrated on three quarters of the micro-batches."""
    return [
        recalibrated(model, [batch for place, batch in enumerate(training) if place % 4 != part]) for part in range(4)
    ]


def moved_without_each_quarter(model: nn.Module, training: list[Any]) -> list[nn.Module]:
    """Recalibrated on all micro-batches, and moved as statistics of quarters, pooled, move without one of these."""
    quarters = [norms(recalibrated(model, training[part::4])) for part in range(4)]
    twins = [recalibrated(model, training) for _ in quarters]
    for part, twin in enumerate(twins):
        for place, norm in enumerate(norms(twin)):
            given = [(each[place].running_mean, each[place].running_var) for each in quarters]
            whole, others = (
                (means.mean(0), (variances + (means - means.mean(0)) ** 2).mean(0))
                for means, variances in (
                    map(torch.stack, zip(*chosen, strict=True)) for chosen in (given, given[:part] + given[part + 1 :])
                )
            )
            norm.running_mean += (others[0] - whole[0]) * (norm.running_var / whole[1]).sqrt()
            norm.running_var *= others[1] / whole[1]
    return twins


@pytest.mark.parametrize(
    ("twins_of", "population"),
    [
        (without_each_quarter, None),
        (without_each_quarter, 160),
        (without_each_quarter, 40),
        (moved_without_each_quarter, None),
    ],
)
def test_a_sure_gain_covers_the_choice_of_the_training_data(
    twins_of: Callable[[nn.Module, list[Any]], list[nn.Module]], population: int | None
) -> None:
    """By statistics without each quarter, of which every one scores every fourth held-out micro-batch.

    Where passes are dear, the statistics are put together from those of the quarters.
    """
    model, training, evaluation = unsettled(Residual()), labelled(10, 3, 6, 6), labelled(12, 3, 6, 6, seed=5)
    for norm in norms(model):
        norm.running_var *= 1e-4  # so that the gain is sure
    for batch in (*training, *evaluation):
        batch["scale"] = 1.0
    with running(model, evaluation, SIZE, PLAIN) as (session, emulation):
        how = (counted(training), counted(evaluation), Batching(SIZE, emulation, 99))
        brief = twins_of is moved_without_each_quarter
        found = next(iter(what_if(session, *how, population=population, brief=brief).remedies)).loss_change
    twins = twins_of(model, training)
    values = np.array([np.mean([scored(twin, [batch]).loss for batch in evaluation[::4]]) for twin in twins])
    variance = 3 / 4 * ((values - values.mean()) ** 2).sum() * (1 - (40 / population if population else 0))
    whole, samples = recalibrated(model, training), join(list(evaluation))
    with torch.no_grad():
        after, before = (
            F.cross_entropy(each(samples["x"]), samples["y"], reduction="none").double().numpy()
            for each in (whole, twin_of(model))
        )
    change = after - before
    among = stats.t.ppf(0.975, len(change) - 1) * change.std(ddof=1) / math.sqrt(len(change))
    half = math.hypot(among, stats.t.ppf(0.975, 3) * math.sqrt(variance))
    assert among > 0
    assert found is not None
    assert found.interval == pytest.approx((change.mean() - half, change.mean() + half), rel=1e-3)


def test_statistics_of_micro_batches_without_a_part_are_those_of_the_others() -> None:
    """As a scan gathers them for its what-if, of a layer that sees the data as they are."""
    batches = [x.double() for x in images(10, SIZE, 3, 6, 6)]
    settings = ScanSettings(device="cpu", batches=10)
    session = Session.open(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), settings)
    with session.installed():
        evidence = probe(session, Reader([x.float() for x in batches], SIZE), settings, no_progress)
    assert evidence is not None
    given = micro_batch_statistics(session, evidence)
    assert len(given.parts) == 4
    for part, (averaged, pooled) in enumerate(given.parts):
        rest = [x for place, x in enumerate(batches) if place % 16 % 4 != part]
        biased = torch.stack([x.var((0, 2, 3), correction=0) for x in rest]).mean(0)
        torch.testing.assert_close(averaged[0][1], biased, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pooled[0][1], torch.cat(rest).var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pooled[0][0], torch.cat(rest).mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_statistics_of_micro_batches_are_tried_where_they_are_unlike_the_others() -> None:
    model, training, evaluation = unsettled(Residual()), labelled(10, 3, 6, 6), labelled(8, 3, 6, 6, seed=5)

    def found(averaged: float, pooled: float) -> dict[str, Remedy]:
        with running(model, evaluation, SIZE, FUNCTIONS) as (session, emulation):
            given = [
                {index: (norm.running_mean.double(), norm.running_var.double() * factor)}
                for factor in (averaged, pooled)
                for index, norm in enumerate(norms(model))
            ]
            statistics = MicroBatchStatistics({**given[0], **given[1]}, {**given[2], **given[3]}, "some")
            how = (counted(training), counted(evaluation), Batching(SIZE, emulation, 99))
            tried = what_if(session, *how, micro_batch=statistics)
        return {each.name: each for each in tried.remedies if each.name.startswith("micro-batch")}

    names = ["micro-batch statistics, pooled", "micro-batch statistics, averaged"]
    assert list(found(3.0, 9.0)) == names
    assert list(found(3.0, 3.1)) == names[:1]
    twin = twin_of(model)
    for norm in norms(twin):
        norm.running_var *= 9
    assert found(3.0, 9.0)[names[0]].after == close(scored(twin, evaluation))


class TwoKinds(nn.Module):
    """One layer for two kinds of data, and another for both."""

    def __init__(self, said: bool) -> None:
        super().__init__()
        self.bn, self.conv, self.last, self.head = (
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Linear(4, 2),
        )
        self.said = said

    def forward(self, x: Tensor) -> Tensor:
        both = []
        for kind, values in enumerate((x, 3 * x + 2)):
            with domain(kind) if self.said else nullcontext():
                both.append(self.bn(values))
        return self.head(self.last(self.conv(both[0] * both[1])).relu().mean((2, 3)))


@pytest.mark.parametrize("said", [True, False])
def test_calls_on_different_data_get_statistics_of_their_own(said: bool) -> None:
    """What ``bnprobe convert --to per-domain`` gives, which takes that the domains are said."""
    model, training, evaluation = unsettled(TwoKinds(said)), labelled(10, 3, 6, 6), labelled(8, 3, 6, 6, seed=5)
    remedy = remedies(model, training, evaluation)["statistics per call"]
    start = recalibrated(model, training) if remedy.recalibrated else twin_of(model)
    start.said = True
    converted = bnprobe.convert(start, ["bn"], to="per-domain", domains=2).eval()
    recalibrate_domains(converted, training, forward, torch.device("cpu"))
    assert remedy.after == close(scored(converted, evaluation[::2]))
    assert (remedy.layers, remedy.domains) == (("bn",), 2 if said else None)
    assert remedy.detail.startswith("each domain" if said else "each call")
    assert "statistics per call" not in remedies(unsettled(Residual()), training, evaluation)


def test_the_change_of_the_loss_is_paired_by_sample_with_its_interval() -> None:
    model, training, evaluation = unsettled(Residual()), labelled(10, 3, 6, 6), labelled(8, 3, 6, 6, seed=5)
    training = [{**batch, "scale": 1.0} for batch in training]
    with running(model, evaluation, SIZE, PLAIN) as (session, emulation):
        found = what_if(session, counted(training), counted(evaluation), Batching(SIZE, emulation, 4))
        change = found.remedies[0].loss_change
    whole = join(evaluation)
    with torch.no_grad():
        one, other = (
            F.cross_entropy(network(whole["x"]), whole["y"], reduction="none").double()
            for network in (recalibrated(model, training), twin_of(model))
        )
    half = 2.0395 * (one - other).std() / 32**0.5  # Student's t of 31 degrees of freedom
    assert change is not None
    assert change.mean == pytest.approx(float((one - other).mean()), rel=1e-3)
    assert change.interval == pytest.approx((change.mean - float(half), change.mean + float(half)), rel=1e-3)


def test_held_out_batches_of_another_size_and_of_changing_sizes() -> None:
    """Batch statistics are those of batches of the scanned size, where the held-out batches divide into such."""
    model, training, evaluation = unsettled(Residual()), labelled(10, 3, 6, 6), labelled(8, 3, 6, 6, seed=5)
    with running(model, evaluation, SIZE, PLAIN) as (session, emulation):
        tried = what_if(session, counted(training), counted(evaluation), Batching(SIZE, emulation, 99))
        usual = {each.name: each for each in tried.remedies}
    everything = join(evaluation)
    for sizes in ((16, 16), (16, 12, 4)):
        starts = [sum(sizes[:position]) for position in range(len(sizes))]
        others = [
            pick(everything, [*range(start, start + size)], 32) for start, size in zip(starts, sizes, strict=True)
        ]
        with running(model, evaluation, SIZE, PLAIN) as (session, emulation):
            batching, scoring = Batching(SIZE, emulation, 99), Batching(16, emulation, 99)
            tried = what_if(session, counted(training), counted(others, sizes), batching, scoring)
            found = {remedy.name: remedy for remedy in tried.remedies}
        assert found["recalibrated"].images == 32
        for name in ("recalibrated", "evaluation statistics", "batch statistics"):
            assert found[name].after.loss == pytest.approx(usual[name].after.loss, rel=1e-4)


def test_on_training_data_statistics_of_the_evaluation_data_say_nothing() -> None:
    model, training = unsettled(Residual()), labelled(10, 3, 6, 6)
    with running(model, training, SIZE, FUNCTIONS) as (session, emulation):
        batching = Batching(SIZE, emulation, 99)
        tried = what_if(
            session, counted(training[:6]), counted(training[6:]), batching, scored_on="training", larger=False
        )
    found = tried.remedies
    assert [remedy.name for remedy in found] == [
        "recalibrated",
        "batch statistics",
        "instance statistics",
        "instance renorm",
        "example weighing",
    ]
    assert {remedy.scored_on for remedy in found} == {"training"}


def test_real_micro_batches_where_images_cannot_be_mixed() -> None:
    model, training, evaluation = unsettled(MinibatchStd()), labelled(10, 3, 5, 5), labelled(8, 3, 5, 5, seed=5)
    found = remedies(model, training, evaluation)
    assert list(found) == [
        "recalibrated",
        "evaluation statistics",
        "batch statistics",
        "instance renorm",
        "example weighing",
    ]
    everything = range(len(norms(model)))
    assert found["batch statistics"].after == close(scored(twin_of(model, *everything), evaluation))
    twin = copy.deepcopy(model).train()
    seen: dict[int, list[Tensor]] = {index: [] for index in everything}
    for index, norm in enumerate(norms(twin)):
        norm.register_forward_pre_hook(lambda module, inputs, index=index: seen[index].append(inputs[0].double()))
    with torch.no_grad():
        for batch in training:
            forward(twin, batch)
        for index, norm in enumerate(norms(twin)):
            values = torch.cat(seen[index]).transpose(0, 1).flatten(1)
            norm.running_mean.copy_(values.mean(1))
            norm.running_var.copy_(values.var(1))
    by_batch = scored(twin.eval(), evaluation)
    by_layer = scored(bnprobe.recalibrate(copy.deepcopy(model), training, path="eval", forward=forward), evaluation)
    assert by_layer.loss != pytest.approx(by_batch.loss, rel=1e-3)
    assert found["recalibrated"].after == close(max(by_batch, by_layer, key=lambda score: score.metric))


@pytest.mark.parametrize("at_once", [2, 3])
def test_a_sorted_loader_does_not_spoil_the_statistics(at_once: int) -> None:
    """Images are drawn at random for each physical batch: with several of these it is nearly one batch of all."""
    model, training, evaluation = unsettled(Residual()), labelled(64, 3, 6, 6), labelled(8, 3, 6, 6, seed=5)
    found = remedies(model, training, evaluation, at_once)["recalibrated"].after
    expected = scored(recalibrated(model, training), evaluation)
    assert found == close(expected, 0.02)
    sorted_ = remedies(model, training, evaluation, emulate=False)["recalibrated"].after
    assert abs(sorted_.loss - expected.loss) > 3 * abs(found.loss - expected.loss)


def test_a_loss_that_asks_the_model_for_more_gets_the_remedy() -> None:
    def other(model: nn.Module, batch: Any) -> Tensor:
        return forward(model, batch).square().mean() + model(batch["x"] + 1).std()

    model, training, evaluation = unsettled(Flat()), labelled(10, 6), labelled(8, 6, seed=5)
    with running(model, evaluation, SIZE, UserFunctions(forward, other)) as (session, emulation):
        found = what_if(session, counted(training), counted(evaluation), Batching(SIZE, emulation, 4)).remedies
    twin = twin_of(model, 0, 1)
    with torch.no_grad():
        expected = [sum(float(other(each, b)) for b in evaluation) / 8 for each in (twin_of(model), twin)]
    by_batch = next(remedy for remedy in found if remedy.name == "batch statistics")
    assert [by_batch.before.loss, by_batch.after.loss] == [pytest.approx(value, rel=1e-4) for value in expected]
    assert by_batch.after.metric is None


class Frozen(Residual):
    """Its own train() keeps the first layer in eval mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.bn1.eval()
        return self


class AllFrozen(Residual):
    """Its own train() keeps every layer in eval mode."""

    def train(self, mode: bool = True) -> AllFrozen:
        super().train(mode)
        for norm in norms(self):
            norm.eval()
        return self


def of_class(kind: type[nn.Module], model: nn.Module) -> nn.Module:
    """A copy that trains all its layers."""
    twin = kind()
    twin.load_state_dict(model.state_dict())
    return twin


def test_frozen_layers_are_recalibrated_in_a_trial_of_their_own() -> None:
    model, training, evaluation = unsettled(Frozen()), labelled(10, 3, 6, 6), labelled(8, 3, 6, 6, seed=5)
    found = remedies(model, training, evaluation)
    usual, with_frozen = found["recalibrated"], found["recalibrated with frozen layers"]
    assert (usual.layers, with_frozen.layers) == (("bn2",), ("bn1", "bn2"))
    assert found["batch statistics"].layers == ("bn2",)
    assert usual.after == close(scored(recalibrated(model, training), evaluation))
    everything = recalibrated(of_class(Residual, model), training)
    assert with_frozen.after == close(scored(everything, evaluation))
    assert with_frozen.control == usual.after != usual.before
    assert with_frozen.loss_change is not None
    assert with_frozen.loss_change.mean == pytest.approx(with_frozen.after.loss - usual.after.loss, abs=1e-9)


def test_where_all_layers_are_frozen_the_model_as_loaded_is_the_baseline() -> None:
    model, training, evaluation = unsettled(AllFrozen()), labelled(10, 3, 6, 6), labelled(8, 3, 6, 6, seed=5)
    with running(model, evaluation, SIZE, FUNCTIONS) as (session, emulation):
        tried = what_if(session, counted(training), counted(evaluation), Batching(SIZE, emulation, 99))
    everything = recalibrated(of_class(Residual, model), training)
    [found] = tried.remedies
    assert (found.name, found.layers, found.control) == ("recalibrated with frozen layers", ("bn1", "bn2"), None)
    assert found.after == close(scored(everything, evaluation))
    for name, own, other in zip(("bn1", "bn2"), norms(model), norms(everything), strict=True):
        std = (own.running_var + own.eps).sqrt()
        shift, ratio = (other.running_mean - own.running_mean) / std, (other.running_var + own.eps).sqrt() / std
        distance = (shift.square() + (ratio - 1).square()).mean()
        assert tried.frozen[name] == pytest.approx(float(distance), rel=1e-3)


def test_layers_without_running_statistics_are_left_alone() -> None:
    training, evaluation = labelled(10, 3, 6, 6), labelled(8, 3, 6, 6, seed=5)
    assert remedies(unsettled(Residual(track_running_stats=False)), training, evaluation) == {}


def test_the_calls_of_a_shared_layer_are_one_population() -> None:
    model, pairs = unsettled(Siamese(False)), images(6, SIZE, 2, 3, 6, 6)
    with running(model, pairs, SIZE) as (session, emulation):
        population, _ = steady_population(session, counted(pairs), Batching(SIZE, emulation, 99))
    twin, seen = copy.deepcopy(model).train(), []
    twin.body[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        twin(torch.cat(pairs))
    values = torch.cat(seen).transpose(0, 1).flatten(1)
    mean, variance = population.statistics()[0]
    torch.testing.assert_close(mean, values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance, values.var(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [36, 38])
@pytest.mark.parametrize("network", [Residual, lambda: Siamese(False), lambda: Siamese(True)])
def test_batches_that_run_together_each_have_their_own_statistics(
    network: Callable[[], nn.Module], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a small network run together, also where there are batches of two sizes; a large one runs them apart."""
    model, inputs = unsettled(network()), [3, 6, 6] if network is Residual else [2, 3, 6, 6]
    pairs = [MicroBatch(part, len(part)) for part in torch.cat(images(10, SIZE, *inputs))[:count].split(2)]
    sizes: list[tuple[int, int]] = []
    run = Session.forward

    def forward(session: Session, path: PathName, batch: Any, pass_: Pass) -> Any:
        sizes.append((pass_.samples, pass_.batch_size))
        return run(session, path, batch, pass_)

    with running(model, [pair.data for pair in pairs], 2) as (session, emulation):
        monkeypatch.setattr(Session, "forward", forward)
        together, _ = steady_population(session, pairs, Batching(2, emulation, 2))
        of_together = list(sizes)
        sizes.clear()
        monkeypatch.setattr("bnprobe.measure.population.plan_small", lambda footprint, device: 1)
        apart, _ = steady_population(session, pairs, Batching(2, emulation, 2))
    assert len(of_together) < len(sizes) == math.ceil(count / 4)
    assert all(samples == size for samples, size in sizes)
    batches = [size for samples, size in of_together for _ in range(samples // size)]
    assert batches == [size for _, size in sizes]
    assert together.values() == apart.values()
    assert together.updates() == apart.updates()
    for one, other in zip(together.statistics().values(), apart.statistics().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_dropout_is_off_while_statistics_are_taken() -> None:
    class Dropping(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.drop(x))

    model, training, evaluation = unsettled(Dropping()), labelled(10, 3, 6, 6), labelled(8, 3, 6, 6, seed=5)
    found = remedies(model, training, evaluation)["recalibrated"].after
    assert found == close(scored(recalibrated(model, training), evaluation))


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    model, training, evaluation = unsettled(Residual()).train(), labelled(6, 3, 6, 6), labelled(8, 3, 6, 6, seed=5)
    before = fingerprint(model)
    statistics = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms(model)]
    with untouched(model), running(model, evaluation, SIZE, FUNCTIONS) as (session, emulation):
        what_if(session, counted(training), counted(evaluation), Batching(SIZE, emulation, 4))
        for norm, (mean, variance) in zip(norms(model), statistics, strict=True):
            assert torch.equal(norm.running_mean, mean)
            assert torch.equal(norm.running_var, variance)
    assert fingerprint(model) == before


def test_without_training_batches() -> None:
    found = remedies(unsettled(Flat()), [], labelled(2, 6))
    assert list(found) == ["evaluation statistics", "batch statistics"]


def test_nothing_to_compare_by() -> None:
    batches = labelled(2, 6)
    with (
        running(unsettled(Flat()), batches, SIZE, UserFunctions(forward)) as (session, emulation),
        pytest.raises(UsageError, match=r"Add loss\(model, batch\) or metric\(model, batch\)"),
    ):
        what_if(session, counted(batches), counted(batches), Batching(SIZE, emulation, 1))
    with (
        running(unsettled(Flat()), batches, SIZE, FUNCTIONS) as (session, emulation),
        pytest.raises(UsageError, match=r"load_eval_data\(batch_size\)"),
    ):
        what_if(session, counted(batches), [], Batching(SIZE, emulation, 1))


def test_images_of_different_size_keep_their_batches() -> None:
    batches = [
        {"x": torch.randn(SIZE, 3, size, size), "y": torch.zeros(SIZE, dtype=torch.int64), "scale": 1.0}
        for size in (5, 6, 7, 5)
    ]
    with running(unsettled(Residual()), batches[:1] * 2, SIZE, FUNCTIONS) as (session, emulation):
        assert emulation.trusted
        found = what_if(session, counted(batches), counted(batches), Batching(SIZE, emulation, 4)).remedies
    assert [remedy.name for remedy in found] == [
        "recalibrated",
        "evaluation statistics",
        "batch statistics",
        "instance statistics",
        "instance renorm",
        "example weighing",
    ]
    assert all(remedy.after.loss is not None for remedy in found)


def test_pick_takes_whatever_counts_the_images() -> None:
    batch = {"x": torch.arange(3), "names": ["a", "b", "c"], "pair": (torch.eye(3), 7), "weights": [torch.ones(3)]}
    found = pick(batch, [2, 0], 3)
    assert found["x"].tolist() == [2, 0]
    assert found["names"] == ["c", "a"]
    assert found["pair"][0].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert found["pair"][1] == 7
    assert found["weights"][0].tolist() == [1, 1]


def test_populations_of_unequal_size_merge_exactly() -> None:
    values = torch.randn(10, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1]) + 100
    population = Population()
    for part in values.split([1, 6, 3]):
        variance, mean = torch.var_mean(part, 0, correction=0, keepdim=True)
        population.add({(0, 0): Recorded(mean, variance, len(part), len(part), True, 0)})
    mean, variance = population.statistics()[0]
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(variance, values.var(0))


def test_a_pass_says_whose_statistics_each_layer_uses() -> None:
    """Layer by layer: its micro-batch's, other ones, its own; what is recorded says which."""
    model, batches = unsettled(Dense()), images(4, SIZE, 3, 6, 6)
    twin = twin_of(model, 0)
    other = torch.full((8,), 0.3, dtype=torch.float64), torch.full((8,), 2.0, dtype=torch.float64)
    norms(twin)[1].running_mean.copy_(other[0])
    norms(twin)[1].running_var.copy_(other[1])
    with torch.no_grad():
        expected = torch.cat([twin(batch) for batch in batches])
    with running(model, batches, SIZE) as (session, _):
        by_batch = {"by_batch": frozenset({0}), "statistics": {0: other, 1: other}}
        for per_sample in (True, False):
            pass_ = Pass(4 * SIZE, SIZE, per_sample=per_sample, **by_batch)
            output, _ = session.forward("eval", torch.cat(batches), pass_)
            torch.testing.assert_close(output, expected)
            assert [record.by_batch for record in pass_.records.values()] == [True, False, False, False]
            rows = [record.mean.shape[0] for record in pass_.records.values()]
            assert rows == [4, *[16 if per_sample else 4] * 3]
