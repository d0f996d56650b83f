"""``freeze``: a large batch split over workers, and statistics that are frozen after part of the training.

Where a batch is split over workers, batch norm by itself uses the statistics of each worker's part. With synchronized
statistics the workers train the same network as one worker with the whole batch. Goyal et al. 2017 (arXiv 1706.02677,
section 2.3 and "Batch Normalization" in section 3) keep the statistics of a part: its size then belongs to the loss
function, whatever the number of workers. Wu & Johnson 2021 (arXiv 2105.07576) call it the normalization batch size, and
find that small ones make a network at inference another one than in training. They train the last fifth with frozen
statistics, which mends that, since training and inference are then the same function.

Networks are trained on batches of 128 that are split over 1 to 16 workers, with a learning rate that falls to 0 along
half a cosine. Statistics are frozen after a quarter, half, three quarters and nine tenths of the training, or never.
Frozen statistics are the moving averages of the first worker.

One process can stand for all workers, since each part is normalized by itself. That this is so, and that synchronized
statistics are those of the whole batch, is checked with two real processes (``bnprobe.lab.workers``), in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.lab.data import POPULATION, Images, batches, load
from bnprobe.lab.experiment import (
    SHARE,
    Budget,
    Condition,
    Experiment,
    Results,
    Values,
    above,
    below,
    formula,
    series,
    told,
    within,
    worst,
)
from bnprobe.lab.layers import PerWorkerBatchNorm
from bnprobe.lab.networks import (
    Norm,
    batch_norms,
    conv_net,
    conv_net_architecture,
    held_out_accuracy,
    keep_statistics,
    train,
)
from bnprobe.lab.workers import Work, train_together
from bnprobe.numbers import joined
from bnprobe.records import Claim, Estimate, LabChart

BATCH, STEPS, RATE = 128, 160, 0.1
WORKERS = (1, 2, 4, 8, 16)
ONE, MOST = WORKERS[0], WORKERS[-1]
"""One worker with the whole batch, which is what synchronized statistics come to; and the most workers."""

FREEZE: Mapping[str, float | None] = {"25%": 0.25, "50%": 0.5, "75%": 0.75, "90%": 0.9, "never": None}
"""After which part of the steps statistics are frozen."""
EARLY, LATE, NEVER = "25%", "75%", "never"

SIMULATED, PROCESSES = "one process for all workers", "two processes"
CHANGE = "change of outputs at inference"
SYNCHRONIZED, OWN = "synchronized against the whole batch", "own statistics against parts"

NOTHING = 0.005
"""Accuracy that counts as nothing: half a percentage point, two of the digits held out."""

ROUNDING = 1e-9
"""Relative deviation that rounding of float64 (1e-16) may grow to in a training."""


class Freeze(Experiment):
    """Numbers of workers, times of freezing, and two real processes."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """The processes first, so that a machine that cannot start them says so at once."""
        found: list[Condition] = [{"run": PROCESSES, "workers": 2, "frozen after": NEVER}]
        found += [
            {"run": SIMULATED, "workers": workers, "frozen after": freeze} for workers in WORKERS for freeze in FREEZE
        ]
        return found

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Train; or compare with the processes."""
        images = load(budget.data)
        if condition["run"] == PROCESSES:
            return _deviations(images, seed, budget.of(20, 3))
        workers, steps = int(condition["workers"]), budget.of(STEPS, 10)
        model = _network(images, workers)
        _train(model, images, steps, FREEZE[str(condition["frozen after"])], seed)
        return {
            "accuracy": held_out_accuracy(model, images.test, images.test_labels),
            "loss": _loss(model, images),
            CHANGE: _change(model, images.train[:POPULATION]),
        }

    def answer(self, results: Results, budget: Budget) -> str:
        """What small parts cost, and what freezing costs when."""
        frozen = joined(
            [
                f"{told(_arm(results, ONE, freeze).mean('accuracy'), SHARE)} after {freeze} of the training"
                for freeze in FREEZE
                if freeze != NEVER
            ]
        )
        return (
            f"Accuracy is {told(_arm(results, ONE, NEVER).mean('accuracy'), SHARE)} with synchronized statistics and"
            f" {told(_arm(results, MOST, NEVER).mean('accuracy'), SHARE)} with those of {BATCH // MOST} images for each"
            f" worker. Where synchronized ones are frozen it is {frozen}."
        )

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """What small parts cost, and what freezing costs or mends."""
        for claim, name in (
            ("with synchronized statistics train the network of one process with the whole batch", SYNCHRONIZED),
            (
                "with statistics of their own train the network of one process that normalizes the parts by themselves",
                OWN,
            ),
        ):
            yield within(
                f"Two processes {claim}.",
                "Largest relative deviation of any parameter or statistic",
                results.where(run=PROCESSES).largest(name),
                ROUNDING,
            )
        few = BATCH // MOST
        yield above(
            f"Statistics of {few} images for each worker are worse than synchronized ones.",
            f"Held-out accuracy, synchronized less {few} for each worker",
            _arm(results, ONE, NEVER).less("accuracy", _arm(results, MOST, NEVER)),
        )
        yield below(
            "Frozen for the last quarter costs nothing.",
            "Held-out accuracy of synchronized statistics, never frozen less frozen after 75%",
            _arm(results, ONE, NEVER).less("accuracy", _arm(results, ONE, LATE)),
            NOTHING,
        )
        yield above(
            f"Where each worker has {few} images, freezing for the last quarter is a gain.",
            f"Held-out accuracy with {few} for each worker, frozen after 75% less never frozen",
            _arm(results, MOST, LATE).less("accuracy", _arm(results, MOST, NEVER)),
        )
        yield above(
            "Frozen after the first quarter, while the learning rate is high, costs accuracy.",
            "Held-out accuracy of synchronized statistics, never frozen less frozen after 25%",
            _arm(results, ONE, NEVER).less("accuracy", _arm(results, ONE, EARLY)),
            NOTHING,
        )
        yield above(
            "The fewer images a worker has, the more a network differs at inference from what was trained.",
            f"Squared change of outputs over their variance, {few} for each worker less synchronized",
            _arm(results, MOST, NEVER).less(CHANGE, _arm(results, ONE, NEVER)),
        )
        yield within(
            "Frozen statistics take that difference away.",
            "Largest squared change of outputs over their variance, frozen after 75%",
            results.where(**{"frozen after": LATE}).largest(CHANGE),
            1e-9,
        )

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """Accuracy, the change at inference, and the loss."""
        names = {workers: f"{BATCH // workers} per worker" for workers in WORKERS}
        accuracy, loss = (
            tuple(
                results.series(figure, "frozen after", name, workers=count, run=SIMULATED)
                for count, name in names.items()
            )
            for figure in ("accuracy", "loss")
        )
        legend = (
            f"Statistics of so many images of a batch of {BATCH}, frozen after that part of the training;"
            f" {BATCH} is what synchronized statistics come to.",
        )
        yield LabChart("accuracy", "Held-out accuracy", "frozen after", "accuracy", accuracy, legend, bounds=SHARE)
        yield _chart_of_change([_arm(results, workers, NEVER).mean(CHANGE) for workers in WORKERS])
        yield LabChart("loss", "Held-out loss", "frozen after", "cross-entropy", loss, legend, y_scale="log")

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """How networks are trained."""
        yield (
            f"Learning rate {RATE:g} with momentum 0.9, which falls to 0 along half a cosine; trainings that diverged"
            " count with the accuracy that they have, and have no loss."
        )
        yield conv_net_architecture(budget.data)


def _arm(results: Results, workers: int, freeze: str) -> Results:
    return results.where(run=SIMULATED, workers=workers, **{"frozen after": freeze})


def _chart_of_change(found: Sequence[Estimate | None]) -> LabChart:
    sizes = [BATCH // workers for workers in WORKERS]
    smallest = found[-1]
    noise = [] if smallest is None else [formula("as 1 / n", sizes, lambda n: smallest.mean * sizes[-1] / n)]
    return LabChart(
        "change",
        "How much a network differs at inference from training",
        "images for each worker, n",
        "squared change of outputs over their variance",
        (series("never frozen", sizes, found), *noise),
        (
            "On training images, in parts as in training; 0 where statistics are frozen.",
            f"The variance of a mean over n images is as 1 / n; drawn from n = {sizes[-1]} on.",
        ),
        x_scale="log",
        y_scale="log",
    )


def _network(images: Images, workers: int) -> nn.Sequential:
    norm: Norm = partial(PerWorkerBatchNorm, workers=workers)
    return conv_net(images.train.shape[1:], images.classes, norm)


def _batches(images: Images, steps: int, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    return batches(images.train, images.train_labels, BATCH, steps, torch.Generator().manual_seed(seed))


def _train(model: nn.Sequential, images: Images, steps: int, until: float | None, seed: int) -> None:
    """Train; after a part of the steps, moving averages normalize and stay as they are."""

    def freeze(step: int, _: float) -> None:
        if until is not None and step + 1 == round(until * steps):
            for layer in batch_norms(model):
                layer.frozen = True

    train(model, _batches(images, steps, seed), RATE, freeze, decay_over=steps)


@torch.no_grad()
def _loss(model: nn.Sequential, images: Images) -> float:
    """Of held-out images, at inference."""
    return F.cross_entropy(model.eval()(images.test), images.test_labels).item()


@torch.no_grad()
def _change(model: nn.Sequential, pixels: Tensor) -> float:
    """Mean squared difference of outputs between training and inference, over their variance at inference."""
    keep_statistics(model)
    whole = pixels[: len(pixels) // BATCH * BATCH] if len(pixels) >= BATCH else pixels
    trained = torch.cat([model.train()(part) for part in whole.split(BATCH)])
    used = torch.cat([model.eval()(part) for part in whole.split(BATCH)])
    return float((trained - used).square().mean() / used.var())


# --- Two processes ----------------------------------------------------------------------------------------------------


def _deviations(images: Images, seed: int, steps: int) -> Values:
    """How far networks that two processes train are from those that one trains: largest deviation, relative."""
    given = [(pixels.double(), labels) for pixels, labels in _batches(images, steps, seed)]
    start = _network(images, 2).double().state_dict()
    ways = {SYNCHRONIZED: 1, OWN: 2}
    work = [Work(start, given, images.classes, RATE, synchronized=workers == 1) for workers in ways.values()]
    found = {}
    for (name, workers), trained in zip(ways.items(), train_together(work), strict=True):
        alone = _network(images, workers).double()
        alone.load_state_dict(start)
        train(alone, given, RATE)
        found[name] = _largest_deviation(trained, alone.state_dict())
    return found


def _largest_deviation(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of any entry, over the largest one of its tensor."""
    return worst(float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())
