"""BN216: a layer that uses batch statistics in eval mode too."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import percent
from bnprobe.records import Severity, Verdict
from bnprobe.rules.effect import MOVES
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Rule


class BatchAtInference(Rule):
    """A layer that keeps running statistics normalizes with those of the batch in eval mode too.

    What:
        What the layer does when the model is in eval mode: it is called with training=True, or is itself still in train
        mode. It is a warning where a scan finds that the outputs for the same samples in other batches differ by less
        than 2% (relative L2).

    Why:
        The running statistics are kept up and never used. Training and inference normalize alike, so there is no
        mismatch to see; but a prediction depends on the other samples of its batch, and a batch of one sample is
        normalized with its own statistics.

    Example:
        `F.batch_norm(x, self.mean, self.var, training=True)` in a forward of its own, or a model whose train() is
        overridden so that eval() does not reach a layer. The validation score changes with the batch size.

    Remedy:
        Pass training=self.training to F.batch_norm; call eval() on the layer where the model's own does not reach it.
        Then scan again: only then are the running statistics judged. Where it is meant to be so, exempt the rule.

    Reference:
        PyTorch documentation of torch.nn.functional.batch_norm, parameter training, and of torch.nn.Module.eval.
    """

    code = "BN216"
    title = "batch statistics at inference"
    cause = "batch_at_inference"
    severity = "error"
    unit = "relative L2"
    needs = "data"
    finding = "their running statistics are not used at inference"
    remedy = "Pass training=self.training to F.batch_norm, and scan again."
    reports_impact = False
    stops_training = True

    def check(self, facts: Facts) -> Iterator[Verdict]:
        moved = None if facts.output is None else facts.output.batch_dependence
        for layer in facts.layers:
            if layer in facts.batch_at_inference:
                yield self._found(layer, facts.batch_at_inference[layer], moved)
            else:
                yield self.passed(layer, "The layer does not use batch statistics in eval mode, or keeps no others.")

    def _found(self, layer: str, in_train_mode: bool, moved: float | None) -> Verdict:
        why = "eval() of the model leaves it in train mode" if in_train_mode else "it is called with training=True"
        message = (
            "The layer uses batch statistics in eval mode too: its output for one sample depends on the others of its"
            f" batch ({why})."
        )
        remedy = "Call eval() on the layer, which eval() of the model does not reach, and scan again."
        severity: Severity = self.severity
        if moved is not None:
            message += f" In other batches, the outputs for the same samples are {percent(moved)} apart."
            severity = "error" if moved >= MOVES else "warning"
        return self.failed(layer, message, moved, MOVES, severity, remedy if in_train_mode else None)
