"""``style``: instance renorm, between batch norm and instance norm, on images with random gain, offset and contrast.

Instance norm takes out of an image what differs from image to image by a gain and an offset of each channel, whether
that is a disturbance or the signal. Batch norm keeps both. The affine bridge between them is one number, the blend b:

    z = b z_instance + (1 - b) (r z_instance + d),

where z_instance is the image normalized with its own statistics, and r and d lead from these to the running ones
(``bnprobe.nn.InstanceRenorm2d``): b = 1 is instance norm, b = 0 is batch norm at inference.

Networks with several blends, and with batch norm, are trained on images as they are, and scored on images whose style
was drawn at random: x becomes gain * x^contrast + offset, with one draw of each for an image, of a width that is swept.
A second arm trains on images of random style, too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bnprobe.lab.data import batches, load
from bnprobe.lab.experiment import Budget, Condition, Experiment, Findings, Results, Values, above
from bnprobe.lab.layers import BatchNorm
from bnprobe.lab.networks import Norm, conv_net, held_out_accuracy, train
from bnprobe.nn import InstanceRenorm2d
from bnprobe.records import LabChart

BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
WIDTHS = (0.0, 0.3, 0.6)
"""Standard deviation of log gain, of the offset in units of the images' own, and twice that of log contrast."""

PLAIN, STYLED = "images as they are", "images of random style"
BATCH_NORM = "batch norm"
NORMS: Mapping[str, Norm] = {
    BATCH_NORM: BatchNorm,
    **{f"blend {blend:g}": functools.partial(InstanceRenorm2d, blend=blend) for blend in BLENDS},
}
INSTANCE, HALF = "blend 1", "blend 0.5"

BATCH, STEPS, RATE = 32, 400, 0.02


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
        train(model, ((restyled(pixels, width, draws), labels) for pixels, labels in steps), RATE)
        test = torch.Generator().manual_seed(1000 + seed)  # the same styles for every condition
        return {
            f"accuracy at width {width}": held_out_accuracy(
                model, restyled(images.test, width, test), images.test_labels
            )
            for width in WIDTHS
        }

    def conclude(self, results: Results, budget: Budget) -> Findings:
        """What the blend is worth, where style is a disturbance and where there is none."""
        plain, styled = results.where(**{"trained on": PLAIN}), results.where(**{"trained on": STYLED})
        none, most = (f"accuracy at width {width}" for width in (WIDTHS[0], WIDTHS[-1]))
        batch_norm, instance_norm, half = (plain.where(norm=norm) for norm in (BATCH_NORM, INSTANCE, HALF))
        return Findings(
            claims=(
                above(
                    "On styles that training did not show, instance norm is better than batch norm.",
                    f"Held-out accuracy at width {WIDTHS[-1]}, instance norm less batch norm",
                    instance_norm.less(most, batch_norm),
                ),
                above(
                    "Where styles do not differ, instance norm costs accuracy.",
                    "Held-out accuracy without style, batch norm less instance norm",
                    batch_norm.less(none, instance_norm),
                ),
                above(
                    "Half of each is better than batch norm on new styles.",
                    f"Held-out accuracy at width {WIDTHS[-1]}, blend 0.5 less batch norm",
                    half.less(most, batch_norm),
                ),
                above(
                    "Half of each is better than instance norm where styles do not differ.",
                    "Held-out accuracy without style, blend 0.5 less blend 1",
                    half.less(none, instance_norm),
                ),
                above(
                    "Batch norm trained on random styles is better on them than instance norm trained without.",
                    f"Held-out accuracy at width {WIDTHS[-1]}, batch norm trained on styles less instance norm"
                    " trained without",
                    styled.where(norm=BATCH_NORM).less(most, instance_norm),
                ),
            ),
            charts=(
                _chart("plain", "Trained on images as they are", plain),
                _chart("styled", "Trained on images of random style", styled),
            ),
        )


def _chart(name: str, title: str, results: Results) -> LabChart:
    series = (
        results.series(f"accuracy at width {width}", "norm", f"style of width {width}" if width else "no style")
        for width in WIDTHS
    )
    return LabChart(
        name,
        title,
        "weight of the image's own statistics",
        "held-out accuracy",
        tuple(series),
        ("Width: standard deviation of log gain and of the offset, and twice that of log contrast.",),
    )


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
