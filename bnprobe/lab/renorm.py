"""``renorm``: the three experiments of Ioffe 2017, batches of 32, small ones, and ones of few classes.

As there (section 4), a step is taken by several workers: each normalizes its own batch, and the gradient is the mean
over all. So whatever the size of the batches, every arm takes the same steps over the same images with the same
learning rate. All that differs is which images a layer takes its statistics from: in i.i.d. batches the images of a
step are divided as they come, in sorted ones by class, so that a batch holds few classes. (The batches of the
paper's section 4.3 held two images of each of 16 classes out of 1000.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from bnprobe.lab.data import Images, batches, load
from bnprobe.lab.experiment import (
    SHARE,
    Budget,
    Condition,
    Experiment,
    Results,
    Values,
    above,
    series,
    told,
)
from bnprobe.lab.layers import (
    SCHEDULE,
    BatchNorm,
    BatchRenorm,
    batch_moments,
    corrections,
    group_norm,
    opening,
    per_channel,
    set_limits,
    standardize,
)
from bnprobe.lab.networks import conv_net, conv_net_architecture, held_out_accuracy, train
from bnprobe.records import Claim, LabChart

SIZES = (32, 4, 2)
STEP = 256
"""Images of a step, over all workers."""

STEPS, PRETRAINING = 80, 100
RATE, FINE_TUNING_RATE = 0.05, 0.02

SCRATCH, FINE_TUNED = "from scratch", "fine-tuned"
MIXED, SORTED = "i.i.d.", "sorted by class"
BATCH_NORM, RENORM, OPEN = "batch norm", "Batch Renorm", "Batch Renorm, limits open at once"
GROUP_NORM, FROZEN = "group norm", "frozen statistics"
ALONE = (GROUP_NORM, FROZEN)
"""Normalize each image by itself: to them it is all the same which images are in a batch."""

POINT = 0.01
"""A loss of accuracy of less than one point counts as none."""


class WorkersRenorm(BatchRenorm):
    """Batch Renorm (Ioffe 2017, algorithm 1) on several workers, each with its part of the input.

    Each worker normalizes with the statistics of its own part; the moving averages, which all share, move once a step,
    toward the mean of the workers' statistics. With r_max = 1 and d_max = 0 it is batch norm.

    Args:
        channels: Dimension 1 of the input.
        batch: Samples of each worker.
        r_max, d_max: Limits of the correction.
        frozen: Whether the moving averages normalize in training too, and stay as they are.
    """

    def __init__(self, channels: int, batch: int, r_max: float, d_max: float, frozen: bool = False) -> None:
        super().__init__(channels, r_max=r_max, d_max=d_max)
        self.batch, self.frozen = batch, frozen

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        if not self.training or self.frozen:
            return super().forward(x)
        workers = len(x) // self.batch
        # Side by side: a worker's channels are channels of their own, so that equations stay those of one worker.
        beside = x.unflatten(0, (workers, self.batch)).transpose(0, 1).flatten(1, 2)
        mean, variance = batch_moments(beside)
        shared = self.running_mean.repeat(workers), self.running_var.repeat(workers)
        r, d = corrections(mean.detach(), variance.detach(), *shared)
        r, d = r.clamp(1 / self.r_max, self.r_max), d.clamp(-self.d_max, self.d_max)
        normalized = standardize(beside, mean, variance) * per_channel(r, beside) + per_channel(d, beside)
        means, variances = (each.detach().reshape(workers, -1).mean(0) for each in (mean, variance))
        self.track(means, variances, beside.numel() // beside.shape[1])
        return self.affine(normalized.unflatten(1, (workers, -1)).transpose(0, 1).flatten(0, 1))


NORMS: Mapping[str, Callable[[int, int], nn.Module]] = {
    BATCH_NORM: lambda channels, batch: WorkersRenorm(channels, batch, r_max=1.0, d_max=0.0),
    RENORM: lambda channels, batch: WorkersRenorm(channels, batch, r_max=1.0, d_max=0.0),  # the schedule opens them
    OPEN: lambda channels, batch: WorkersRenorm(channels, batch, r_max=3.0, d_max=5.0),
    GROUP_NORM: lambda channels, batch: group_norm(channels),
    FROZEN: lambda channels, batch: WorkersRenorm(channels, batch, r_max=1.0, d_max=0.0, frozen=True),
}
"""Make the normalization of so many channels on workers with so many images."""


class Renorm(Experiment):
    """Each normalization with each batch size, on both kinds of batches, from both starts."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """What is compared; what sees no batch, once."""
        return [
            {"start": start, "norm": norm, "batches": kind, "batch": size}
            for start in (SCRATCH, FINE_TUNED)
            for norm in NORMS
            for kind in (MIXED, SORTED)
            for size in SIZES
            if norm not in ALONE or (kind, size) == (MIXED, SIZES[0])
        ]

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Train, and score in eval mode on images that were held out."""
        images = load(budget.data)
        size, norm = int(condition["batch"]), str(condition["norm"])
        fine_tuned = condition["start"] == FINE_TUNED
        model = conv_net(images.train.shape[1:], images.classes, lambda channels: NORMS[norm](channels, size))
        if fine_tuned:
            model.load_state_dict(_pretrained(images, seed, budget), strict=False)  # group norm has no averages
        steps = budget.of(STEPS, 3)
        losses: list[float] = []
        schedule = opening(steps)

        def after_step(step: int, loss: float) -> None:
            losses.append(loss)
            if norm == RENORM:
                set_limits(model, *schedule.at(step + 1))

        draws = torch.Generator().manual_seed(seed)
        drawn = batches(images.train, images.train_labels, STEP, steps, draws)
        if condition["batches"] == SORTED:
            drawn = map(_sorted, drawn)
        train(model, drawn, FINE_TUNING_RATE if fine_tuned else RATE, after_step)
        last = losses[-max(steps // 10, 1) :]
        return {
            "accuracy": held_out_accuracy(model, images.test, images.test_labels),
            "training loss": sum(last) / len(last),
        }

    def answer(self, results: Results, budget: Budget) -> str:
        """The accuracy of Batch Renorm and batch norm where batches are small, and where they are alike."""

        def both(size: int, kind: str) -> str:
            arms = ((norm, _arm(results, norm, size, kind)) for norm in (RENORM, BATCH_NORM))
            return " and ".join(f"{told(arm.mean('accuracy'), SHARE)} with {norm}" for norm, arm in arms)

        large, small, smallest = SIZES
        return (
            f"From scratch, accuracy is {both(smallest, MIXED)} in i.i.d. batches of {smallest}; {both(large, SORTED)}"
            f" in batches of {large} sorted by class; {both(small, SORTED)} in sorted ones of {small}."
        )

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """The claims of the paper, of group norm, and of fine-tuning."""
        large, small, smallest = SIZES
        yield from _claims_of_the_paper(results)
        yield _more(
            f"With batches of {smallest}, group norm is more accurate than batch norm (Wu & He 2018).",
            _arm(results, GROUP_NORM, smallest),
            _arm(results, BATCH_NORM, smallest),
        )
        yield _more(
            f"In fine-tuning with batches of {small}, Batch Renorm is more accurate than batch norm.",
            _arm(results, RENORM, small, MIXED, FINE_TUNED),
            _arm(results, BATCH_NORM, small, MIXED, FINE_TUNED),
        )
        yield _more(
            f"In fine-tuning with batches of {large} sorted by class, frozen statistics are more accurate than batch"
            " norm.",
            _arm(results, FROZEN, large, SORTED, FINE_TUNED),
            _arm(results, BATCH_NORM, large, SORTED, FINE_TUNED),
        )

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """Accuracy against the batch size, for both kinds of batches and both starts."""
        no_statistics = (
            "Frozen statistics are 0 and 1 here: nothing is normalized, and each channel is scaled and shifted."
        )
        left_out = (
            "Frozen statistics are those of the chart before; they are left out, so that the others can be told apart."
        )
        before = (
            f"Trained on the images turned by a quarter, by batch norm with batches of {SIZES[0]}, then fine-tuned on"
            " the images upright with a new last layer. Frozen statistics are those of before."
        )
        without_frozen = [norm for norm in NORMS if norm != FROZEN]
        for name, start, kind, norms, legend in (
            ("scratch-sorted", SCRATCH, SORTED, NORMS, no_statistics),
            ("scratch-iid", SCRATCH, MIXED, without_frozen, left_out),
            ("fine-tuned-sorted", FINE_TUNED, SORTED, NORMS, before),
            ("fine-tuned-iid", FINE_TUNED, MIXED, NORMS, before),
        ):
            accuracies = (
                series(norm, SIZES, [_arm(results, norm, size, kind, start).mean("accuracy") for size in SIZES])
                for norm in norms
            )
            yield LabChart(
                name,
                f"Accuracy {start}, batches {kind}",
                "images of a batch",
                "share of right answers, held out",
                tuple(accuracies),
                (legend,),
                x_scale="log",
                bounds=SHARE,
            )

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """What all arms have in common."""
        yield (
            f"Every arm takes the same steps, each over the same {STEP} images with the same learning rate: a batch is"
            " what a layer takes its statistics from, and the gradient is the mean over the batches of a step, as with"
            " the workers of the paper (section 4)."
        )
        yield (
            "Group norm and frozen statistics see no batch: they were measured once for each start, and are the same in"
            " all charts of it."
        )
        yield conv_net_architecture(budget.data)
        yield "The moving averages have momentum 0.1 and move once a step, toward the mean over its batches."
        yield SCHEDULE


def _claims_of_the_paper(results: Results) -> Iterator[Claim]:
    large, small, smallest = SIZES
    yield _more(
        f"With batches of {large}, Batch Renorm costs less than a point of accuracy against batch norm (Ioffe 2017,"
        " section 4.1: it costs nothing).",
        _arm(results, RENORM, large),
        _arm(results, BATCH_NORM, large),
        -POINT,
    )
    for size, kind, which, section in (
        (small, MIXED, "", " (section 4.2)"),
        (smallest, MIXED, "", ""),
        (large, SORTED, " sorted by class", " (section 4.3)"),
        (small, SORTED, " sorted by class", ""),
    ):
        yield _more(
            f"With batches of {size}{which}, Batch Renorm is more accurate than batch norm{section}.",
            _arm(results, RENORM, size, kind),
            _arm(results, BATCH_NORM, size, kind),
        )
    yield _more(
        f"With batches of {large} sorted by class, Batch Renorm loses less than a point against i.i.d. batches (section"
        " 4.3: it loses nothing).",
        _arm(results, RENORM, large, SORTED),
        _arm(results, RENORM, large),
        -POINT,
    )
    yield _more(
        f"With batches of {large} sorted by class, limits that open over training are better than ones that are open at"
        " once (section 3).",
        _arm(results, RENORM, large, SORTED),
        _arm(results, OPEN, large, SORTED),
    )


def _more(text: str, one: Results, other: Results, limit: float = 0.0) -> Claim:
    return above(text, "Difference of accuracy", one.less("accuracy", other), limit)


def _arm(results: Results, norm: str, size: int, kind: str = MIXED, start: str = SCRATCH) -> Results:
    """What sees no batch was trained once for each start."""
    of_norm = results.where(norm=norm, start=start)
    return of_norm if norm in ALONE else of_norm.where(batch=size, batches=kind)


def _pretrained(images: Images, seed: int, budget: Budget) -> dict[str, Tensor]:
    """What a network with batch norm has learned from batches of 32 of the images turned by a quarter.

    Its last layer is left out: it knew the images as they were turned.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        turned = images.train.rot90(1, (2, 3))
        model = conv_net(turned.shape[1:], images.classes, BatchNorm)
        draws = torch.Generator().manual_seed(seed)
        train(model, batches(turned, images.train_labels, SIZES[0], budget.of(PRETRAINING, 3), draws), RATE)
    last = f"{len(model) - 1}."
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(last)}


def _sorted(step: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The images of a step, those of a class one after the other."""
    pixels, labels = step
    order = torch.argsort(labels, stable=True)
    return pixels[order], labels[order]
