"""BN213: a network that is random at inference."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import percent
from bnprobe.records import Severity, Verdict
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Rule

ROUNDING = 1e-3
"""Two passes over the same samples may differ by this much where the order of additions is not fixed, as on a GPU."""

MOVES = 0.02
"""From here on the outputs really change."""


class RandomAtInference(Rule):
    """Two passes in eval mode over the same samples give different outputs.

    What:
        The relative L2 distance of the outputs of two passes in eval mode over the same batch. Above 0.1% it fails; it
        is an error from 2% on.

    Why:
        F.dropout drops values unless it is told not to: its parameter `training` is True by default, and model.eval()
        does not reach it. Noise that is added in forward without asking self.training is another reason. Predictions
        then depend on chance, and everything that is measured at inference is noisier than it need be.

    Example:
        `x = F.dropout(x, 0.5)` in forward. Validation accuracy changes from run to run, although the model is in eval
        mode.

    Remedy:
        Pass `training=self.training` to F.dropout, or use nn.Dropout; ask self.training before adding noise. Where the
        randomness is intended, exempt the rule.

    Reference:
        PyTorch documentation of torch.nn.functional.dropout, parameter training.
    """

    code = "BN213"
    title = "random at inference"
    cause = "random_at_inference"
    severity = "error"
    unit = "relative L2"
    needs = "data"
    finding = "two passes in eval mode over the same samples give different outputs"
    remedy = "Pass training=self.training to F.dropout, or use nn.Dropout; ask self.training before adding noise."
    reports_impact = False
    stops_training = True

    def check(self, facts: Facts) -> Iterator[Verdict]:
        repeat = None if facts.output is None else facts.output.repeat
        if repeat is None:
            yield self.skipped(None, "inference was not run twice")
            return
        message = f"Two passes in eval mode over the same samples give outputs that are {percent(repeat)} apart."
        if repeat <= ROUNDING:
            yield self.passed(None, message, repeat, ROUNDING)
            return
        severity: Severity = "error" if repeat >= MOVES else "warning"
        dropout = " Most likely reason: F.dropout without training=self.training, which model.eval() does not turn off."
        yield self.failed(None, message + dropout, repeat, ROUNDING, severity)
