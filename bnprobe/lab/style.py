"""``style``: instance renorm, between batch norm and instance norm, on images with random gain, offset and contrast.

Instance norm takes out of an image what differs from image to image by a gain and an offset of each channel, whether
that is a disturbance or the signal. Batch norm keeps both. The affine bridge between them is one number, the blend b:

    z = b z_instance + (1 - b) (r z_instance + d),

where z_instance is the image normalized with its own statistics, and r and d lead from these to the running ones
(``bnprobe.nn.InstanceRenorm2d``): b = 1 is instance norm, b = 0 gives what batch norm gives at inference, and gives it
in training too. That is not batch norm: r and d are constants to the gradient (Batch Renorm with batches of one image),
so that the gradient is that of instance norm but for a factor, and no statistics of the batch normalize.

Networks with several blends, and with batch norm, are trained on images as they are, and scored on images whose style
was drawn at random: x becomes gain * x^contrast + offset, with one draw of each for an image, of a width that is swept.
A second arm trains on images of random style, too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from bnprobe.lab.data import batches, load
from bnprobe.lab.experiment import (
    SHARE,
    Budget,
    Condition,
    Experiment,
    Results,
    Values,
    above,
    average,
    cell,
    told,
)
from bnprobe.lab.layers import BatchNorm
from bnprobe.lab.networks import Norm, conv_net, conv_net_architecture, held_out_accuracy, train
from bnprobe.nn import InstanceRenorm2d
from bnprobe.numbers import joined
from bnprobe.records import Claim, LabChart, LabTable

BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
WIDTHS = (0.0, 0.3, 0.6)
"""Standard deviation of log gain, of the offset in units of the images' own, and twice that of log contrast."""

PLAIN, STYLED = "images as they are", "images of random style"
BATCH_NORM, RUNNING, HALF, INSTANCE = "batch norm", "blend 0: running statistics", "blend 0.5", "blend 1: instance norm"
NORMS: Mapping[str, Norm] = {
    BATCH_NORM: BatchNorm,
    **{
        name: functools.partial(InstanceRenorm2d, blend=blend)
        for name, blend in zip((RUNNING, "blend 0.25", HALF, "blend 0.75", INSTANCE), BLENDS, strict=True)
    },
}

BATCH, STEPS, RATE = 32, 400, 0.2
"""At a tenth of this rate the blends have not learned the training images by the end, and are less accurate for it."""

POINT = 0.01
"""A loss of accuracy of less than one point counts as none."""


class Style(Experiment):
    """Blends and batch norm, trained on plain images and on images of random style."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """Layers and training data."""
        return [{"trained on": trained, "norm": norm} for trained in (PLAIN, STYLED) for norm in NORMS]

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Train, and score on held-out images of each width of style."""
        images = load(budget.data)
        model = conv_net(images.train.shape[1:], images.classes, NORMS[str(condition["norm"])])
        width = WIDTHS[-1] if condition["trained on"] == STYLED else 0.0
        draws = torch.Generator().manual_seed(seed)
        steps = batches(images.train, images.train_labels, BATCH, budget.of(STEPS, 20), draws)
        losses: list[float] = []
        styled = ((restyled(pixels, width, draws), labels) for pixels, labels in steps)
        train(model, styled, RATE, lambda _, loss: losses.append(loss))
        test = torch.Generator().manual_seed(1000 + seed)  # the same styles for every condition
        return {
            f"accuracy at width {width}": held_out_accuracy(
                model, restyled(images.test, width, test), images.test_labels
            )
            for width in WIDTHS
        } | {"training loss": average(losses[-max(len(losses) // 10, 1) :])}

    def answer(self, results: Results, budget: Budget) -> str:
        """What each does where styles do not differ, and where they differ most."""
        plain = results.where(**{"trained on": PLAIN})
        none, most = (f"accuracy at width {width}" for width in (WIDTHS[0], WIDTHS[-1]))
        scores = [
            f"{' and '.join(told(plain.where(norm=norm).mean(each), SHARE) for each in (none, most))} ({norm})"
            for norm in (BATCH_NORM, HALF, INSTANCE)
        ]
        return f"Accuracy without style, and on the widest, which training did not show: {joined(scores)}."

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """What the blend is worth, where style is a disturbance and where there is none."""
        plain, styled = (results.where(**{"trained on": each}) for each in (PLAIN, STYLED))
        batch_norm, instance_norm, half = (plain.where(norm=norm) for norm in (BATCH_NORM, INSTANCE, HALF))
        none, most = (f"accuracy at width {width}" for width in (WIDTHS[0], WIDTHS[-1]))
        without, widest = "Held-out accuracy without style", f"Held-out accuracy at width {WIDTHS[-1]}"
        yield above(
            "On styles that training did not show, instance norm is better than batch norm.",
            f"{widest}, instance norm less batch norm",
            instance_norm.less(most, batch_norm),
        )
        yield above(
            "Where styles do not differ, instance norm costs accuracy.",
            f"{without}, batch norm less instance norm",
            batch_norm.less(none, instance_norm),
        )
        yield above(
            "Half of each is better than batch norm on new styles.",
            f"{widest}, blend 0.5 less batch norm",
            half.less(most, batch_norm),
        )
        yield above(
            "Half of each is better than instance norm where styles do not differ.",
            f"{without}, blend 0.5 less blend 1",
            half.less(none, instance_norm),
        )
        yield above(
            "Where styles do not differ, to train with running statistics (blend 0) costs less than a point of accuracy"
            " against batch norm, which has them at inference alone.",
            f"{without}, blend 0 less batch norm",
            plain.where(norm=RUNNING).less(none, batch_norm),
            -POINT,
        )
        yield above(
            "Batch norm trained on random styles is better on them than instance norm trained without.",
            f"{widest}, batch norm trained on styles less instance norm trained without",
            styled.where(norm=BATCH_NORM).less(most, instance_norm),
        )

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """Accuracy on each width of style, for both kinds of training."""
        widths = {f"accuracy at width {width}": f"style of width {width}" if width else "no style" for width in WIDTHS}
        for name, trained in (("plain", PLAIN), ("styled", STYLED)):
            yield LabChart(
                name,
                f"Trained on {trained}",
                "weight of the image's own statistics",
                "held-out accuracy",
                results.where(**{"trained on": trained}).several_series("norm", widths),
                ("Width: standard deviation of log gain and of the offset, and twice that of log contrast.",),
                bounds=SHARE,
            )

    def tables(self, results: Results, budget: Budget) -> Iterator[LabTable]:
        """How far each has learned what it was trained on."""
        arms = {trained: results.where(**{"trained on": trained}) for trained in (PLAIN, STYLED)}
        yield LabTable(
            "Training loss at the end",
            ("weight of the image's own statistics", *arms),
            tuple(
                (name, *(cell(arm.where(norm=name).mean("training loss")) for arm in arms.values())) for name in NORMS
            ),
            ("Mean over the last tenth of the steps. Where it is high, the network was still learning.",),
        )

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """What blend 0 is, and the network."""
        yield (
            "Blend 0 is not batch norm: running statistics normalize in training too, and the gradient takes r and d as"
            " constants, as Batch Renorm does, here with batches of one image. So it is r times that of instance norm,"
            " which does not show what the mean and the gain of an image do to the loss."
        )
        yield conv_net_architecture(budget.data)


def restyled(images: Tensor, width: float, draws: torch.Generator) -> Tensor:
    """Each image with a gain, an offset and a contrast of its own: gain * sign(x) |x|^contrast + offset.

    Args:
        images: Standardized, shape (images, channels, height, width).
        width: Standard deviation of log gain and offset, and twice that of log contrast; 0: the images as they are.
        draws: Draws the styles.
    """
    if not width:
        return images
    gain, contrast, offset = (width * torch.randn(len(images), 1, 1, 1, generator=draws) for _ in range(3))
    return gain.exp() * images.sign() * images.abs() ** (contrast / 2).exp() + offset
