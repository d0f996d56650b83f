"""BN213: a network that is random at inference."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import joined, listed, percent
from bnprobe.records import Severity, Verdict
from bnprobe.rules.effect import MOVES
from bnprobe.rules.facts import Facts, Randomness
from bnprobe.rules.interface import Rule

ROUNDING = 1e-3
"""Two passes over the same samples may differ by this much where the order of additions is not fixed, as on a GPU."""

DROPOUT = tuple(
    f"torch.nn.functional.{kind}" for kind in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")
)
"""Functions that drop values unless they are told that the model is in eval mode."""

_DROPOUT = "Pass training=self.training to F.dropout, or use nn.Dropout and call model.eval()."

_NAMES = {"random": "Python's random"}


class RandomAtInference(Rule):
    """Two passes in eval mode over the same samples give different outputs.

    What:
        The relative L2 distance of the outputs of two passes in eval mode over the same batch. Above 0.1% it fails; it
        is an error from 2% on. One more pass shows what draws: whether the random state of torch, of numpy or of
        Python's random moves, in which modules, and which functions of torch do it.

    Why:
        F.dropout drops values unless it is told not to: its parameter `training` is True by default, and model.eval()
        does not reach it. Noise or augmentation in forward that does not ask self.training is another reason.
        Predictions then depend on chance, and everything that is measured at inference is noisier than it need be.

    Example:
        `x = F.dropout(x, 0.5)` in forward. Validation accuracy changes from run to run, although the model is in eval
        mode.

    Remedy:
        Pass `training=self.training` to F.dropout, or use nn.Dropout; ask self.training before drawing random numbers.
        Where the randomness is intended, exempt the rule.

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
    remedy = "Ask self.training before drawing random numbers in forward."
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
        drawing = facts.randomness
        said = "" if drawing is None else f" {_in_words(drawing)}"
        remedy = _DROPOUT if drawing is not None and set(drawing.functions) & set(DROPOUT) else self.remedy
        yield self.failed(None, message + said, repeat, ROUNDING, severity, remedy)


def _in_words(found: Randomness) -> str:
    """What draws random numbers, sentences."""
    if not found.generators:
        return (
            "The random states of torch, numpy and Python do not move in a pass, so the model has a random generator of"
            " its own, or a state that passes change."
        )
    whose = [_NAMES.get(name, name) for name in found.generators]
    states = (
        f"The random state of {joined(whose)} moves"
        if len(whose) == 1
        else f"The random states of {joined(whose)} move"
    )
    places = f", in {listed(found.places, 3)}" if found.places else ""
    draw = "draws" if len(found.functions) == 1 else "draw"
    functions = f" {listed(found.functions, 3)} {draw} from it." if found.functions else ""
    return f"{states}{places}.{functions}"
