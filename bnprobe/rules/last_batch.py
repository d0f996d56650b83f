"""BN210: a last batch of one sample."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import listed
from bnprobe.records import Scan, Severity, Verdict
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Rule, anatomy_of


class LastBatch(Rule):
    """The last batch of an epoch has one sample.

    What:
        The number of samples modulo the batch size; 1 fails unless the loader drops a partial last batch. It is an
        error where the loader keeps it and a layer then gets one value per channel, otherwise a warning.

    Why:
        Once per epoch, one sample is normalized with its own statistics. Behind global pooling this stops training with
        an error, after all other batches went well. Elsewhere nothing is raised, and this batch is the last to update
        the running statistics before evaluation.

    Example:
        Training stops in the last step of the first epoch with "Expected more than 1 value per channel when training".

    Remedy:
        Set drop_last=True in the training loader, or choose another batch size.

    Reference:
        PyTorch documentation of torch.utils.data.DataLoader, drop_last.
    """

    code = "BN210"
    title = "last batch of one sample"
    cause = "last_batch"
    severity = "warning"
    unit = "samples in the last batch"
    needs = "data"
    finding = "the last batch of an epoch has one sample"
    stops_training = True
    remedy = "Set drop_last=True in the training loader, or choose another batch size."

    def check(self, facts: Facts) -> Iterator[Verdict]:
        if facts.scan is None or facts.scan.synthetic or facts.images is None:
            yield self.skipped(None, "how many samples an epoch has is not known")
            return
        yield self._judge(facts, facts.scan, facts.images)

    def _judge(self, facts: Facts, scan: Scan, samples: int) -> Verdict:
        left = samples % scan.batch_size
        batches = f"{samples:,} samples in batches of {scan.batch_size}"
        if left != 1 or facts.drop_last:
            dropped = " The loader drops a partial last batch." if facts.drop_last else ""
            return self.passed(None, f"{batches} leave {left} over.{dropped}", float(left), 1.0)
        unless = "" if facts.drop_last is False else ", unless the training loader drops it"
        # Layers in training to which one sample gives one value per channel.
        single = [layer.name for layer in facts.layers.values() if layer.values_per_channel <= scan.batch_size]
        anatomies = {name: anatomy_of(facts, name) for name in single}
        stopped = [name for name, anatomy in anatomies.items() if anatomy is None or anatomy.trains_statistics]
        message = f"{batches} leave a last batch of one sample{unless}; {_effect(stopped)}."
        severity: Severity = "error" if stopped and facts.drop_last is False else self.severity
        return self.failed(None, message, float(left), 1.0, severity)


def _effect(stopped: list[str]) -> str:
    if stopped:
        layers = f"{'layer' if len(stopped) == 1 else 'layers'} {listed(stopped, 3)}"
        return f"training raises an error there, because it gives {layers} one value per channel"
    return "it is normalized with its own statistics, and updates the running statistics like a whole batch"
