"""BN209: one image per batch."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Facts
from bnprobe.records import Layer, Verdict
from bnprobe.rules.interface import Rule, anatomy_of


class SingleImage(Rule):
    """Batches of one image: in training the layer is an instance norm, at inference it is not.

    What:
        Images per micro-batch, for layers that get several values of each; the limit is 1. An error where the layer is
        flagged, else a warning. A layer that stays in eval mode during training passes.

    Why:
        With one image, batch statistics are the image's own: training removes each image's brightness and contrast,
        channel by channel, and inference with running statistics does not. It raises no error, which makes it hard to
        find.

    Example:
        Segmentation of volumes with one volume per GPU: fine in training mode, useless in evaluation mode.

    Remedy:
        Larger batches or synchronized BN; or use instance or group norm in both modes, which is what was trained:
        `bnprobe convert --to instance-renorm` with `blend: 1` in the spec's repair section, or `--to group-norm`.

    Reference:
        Ulyanov, Vedaldi and Lempitsky 2016, arXiv 1607.08022 (instance norm). Wu and He 2018, arXiv 1803.08494,
        section 3.
    """

    code = "BN209"
    title = "one image per batch"
    cause = "single_image"
    severity = "warning"
    unit = "images per batch"
    needs = "data"
    finding = "batches of one image make it an instance norm in training, but not at inference"
    remedy = "Use larger batches or synchronized BN, or instance or group norm, which is what was trained."

    def check(self, facts: Facts) -> Iterator[Verdict]:
        size = 0 if facts.scan is None else facts.scan.batch_size
        for layer in facts.layers.values():
            yield self._judge(layer, facts, size)

    def _judge(self, layer: Layer, facts: Facts, size: int) -> Verdict:
        anatomy = anatomy_of(facts, layer.name)
        trained = anatomy is None or anatomy.trains_statistics
        if size > 1 or layer.values_per_channel == 1 or not trained:
            return self.passed(layer.name, "In training it is no instance norm.", float(size), 1.0)
        message = "Each batch is one image, which in training is normalized with its own mean and variance."
        return self.failed(layer.name, message, float(size), 1.0, "error" if layer.flagged else self.severity)
