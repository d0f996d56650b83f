"""BN212: weights that were trained in eval mode."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import listed
from bnprobe.records import Layer, Verdict
from bnprobe.rules import effect
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Rule
from bnprobe.rules.shares import STATISTICS_CAUSES, is_cause, is_of_composition, is_off_at_inference, share_of

PART_OF_STATISTICS = 0.5
"""The part of a layer's mismatch that wrong statistics must hold: what is noise of small batches says nothing here."""


class TrainedInEval(Rule):
    """The running statistics are not those of the data, yet the network is better with them: the weights belong to
    them.

    What:
        It fails where loss or metric are surely better with running statistics than with batch statistics, although
        some layer's running statistics differ from those of its data, and that difference holds most of its mismatch D.
        Where recalibrated statistics were tried on held-out data, they must not be better.

    Why:
        A layer in eval mode is a fixed scale and shift. Weights that are trained in this state fit the statistics that
        the layers had at that time, whatever these are. Statistics of the data are then the wrong ones, and so is
        everything that takes them: train mode, and recalibration.

    Example:
        `model.eval()` is called for a validation after the first steps, and `model.train()` is never called again. The
        loss is 0.06 at inference and 1.46 in train mode; recalibration takes accuracy from 0.97 to 0.89.

    Remedy:
        Keep the running statistics: the network can be deployed as it is. Do not recalibrate it. To fine-tune it, hold
        the statistics as they are (`bnprobe convert --to frozen`), or train it again in train mode.

    Reference:
        PyTorch documentation of torch.nn.Module.train. Wu and Johnson 2021, arXiv 2105.07576, section 4 (freezing the
        statistics).
    """

    code = "BN212"
    title = "trained with fixed statistics"
    cause = "trained_in_eval"
    severity = "warning"
    unit = ""
    needs = "data"
    real_data = True
    finding = "the weights belong to the running statistics, not to those of the data"
    remedy = (
        "Keep the running statistics: deploy the network as it is, and fine-tune it only with frozen statistics"
        " (bnprobe convert --to frozen). If this was not intended, call model.train() before every training epoch."
    )
    reports_impact = False
    explains_layers = (*STATISTICS_CAUSES, "frozen_mismatch", "momentum_convention")

    def check(self, facts: Facts) -> Iterator[Verdict]:
        found = effect.inconsistency(facts.gaps, facts.chance)
        change = found.main
        if change is None:
            yield self.skipped(None, effect.UNSCORED)
            return
        words = f"On training batches {change.words(*effect.STATISTICS)}"
        new = {layer.name for layer in facts.anatomy if layer.untouched}
        layers = [name for name, layer in facts.layers.items() if name not in new and _has_other_statistics(layer)]
        elsewhere = _recalibration_is_no_harm(facts) or effect.is_at_chance(facts.chance)
        if found.standing != "better" or not layers or elsewhere:
            yield self.passed(None, f"{words}.", -change.harm, change.floor)
            return
        held = "all layers" if len(layers) == len(facts.layers) > 1 else listed(layers, 3)
        yield self.failed(
            None,
            f"{words}, although the running statistics of {held} are far from those of the data. Most likely reason:"
            f" the network was trained in eval mode (model.train() was not called again, or layers were frozen).",
            -change.harm,
            change.floor,
        )


def _has_other_statistics(layer: Layer) -> bool:
    """Whether it is flagged for statistics that are not those of the data, and not for what batches are.

    Batches that are not i.i.d. make train mode the worse side, and leave statistics of the last batches behind.
    """
    if not layer.flagged or not is_off_at_inference(layer) or layer.eval is None or layer.shares is None:
        return False
    if is_cause(layer, "composition") and is_of_composition(layer):
        return False
    return (share_of(layer, "lag") or 0.0) + (
        share_of(layer, "propagation") or 0.0
    ) > PART_OF_STATISTICS * layer.eval.mismatch


def _recalibration_is_no_harm(facts: Facts) -> bool:
    """Whether statistics of the data were tried and do as well: then train mode suffers from the noise of batches."""
    remedy = effect.tried(facts.remedies, "recalibrated")
    return remedy is not None and effect.of_remedy(remedy, facts.gaps, facts.chance).standing in ("better", "same")
