"""BN210: a last batch of one image."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Facts
from bnprobe.records import Scan, Severity, Verdict
from bnprobe.rules.interface import Rule, anatomy_of
from bnprobe.rules.wording import listed


class LastBatch(Rule):
    """The last batch of an epoch has one image.

    What:
        The number of images modulo the batch size; 1 fails unless the loader drops a partial last batch. An error where
        the loader keeps it and a layer then gets one value per channel, else a warning.

    Why:
        Once per epoch, one image is normalized with itself. Behind global pooling that stops training with an error,
        after all other batches went well; elsewhere it is silent, and it is the batch that running statistics end
        with before evaluation.

    Example:
        Training stops in the last step of the first epoch with "Expected more than 1 value per channel when training".

    Remedy:
        drop_last=True in the training loader, or another batch size.

    Reference:
        PyTorch documentation of torch.utils.data.DataLoader, drop_last.
    """

    code = "BN210"
    title = "last batch of one image"
    cause = "last_batch"
    severity = "warning"
    unit = "images in the last batch"
    needs = "data"
    finding = "the last batch of an epoch has one image"
    remedy = "Set drop_last=True in the training loader, or choose another batch size."

    def check(self, facts: Facts) -> Iterator[Verdict]:
        if facts.scan is None or facts.scan.synthetic or facts.images is None:
            yield self.skipped(None, "the number of images in the data is not known")
            return
        yield self._judge(facts, facts.scan, facts.images)

    def _judge(self, facts: Facts, scan: Scan, images: int) -> Verdict:
        left = images % scan.batch_size
        if left != 1 or facts.drop_last:
            dropped = " The loader drops a partial last batch." if facts.drop_last else ""
            return self.passed(None, f"{images:,} images leave {left} over.{dropped}", float(left), 1.0)
        unless = "" if facts.drop_last is False else ", unless the training loader drops it"
        message = (
            f"{images:,} images in batches of {scan.batch_size} leave a last batch of one image{unless};"
            f" {_effect(stopped := _stopped_by(facts, scan))}."
        )
        severity: Severity = "error" if stopped and facts.drop_last is False else self.severity
        return self.failed(None, message, float(left), 1.0, severity)


def _stopped_by(facts: Facts, scan: Scan) -> list[str]:
    """Layers to which one image brings one value per channel, and which are trained."""
    single = [layer.name for layer in facts.layers.values() if layer.values_per_channel <= scan.batch_size]
    anatomies = {name: anatomy_of(facts, name) for name in single}
    return [name for name, anatomy in anatomies.items() if anatomy is None or anatomy.trains_statistics]


def _effect(stopped: list[str]) -> str:
    if stopped:
        return f"training stops there at {listed(stopped)}, which then gets one value per channel"
    return "it is normalized with itself, and weighs in the running statistics like a whole batch"
