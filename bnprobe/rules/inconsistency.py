"""BN211: loss or metric are worse at inference."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import number
from bnprobe.records import Cause, Layer, Severity, Verdict
from bnprobe.rules import effect
from bnprobe.rules.effect import Effect
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Rule
from bnprobe.rules.shares import COMPOSITION_P, are_domains_apart, mismatch_limit, share_limit, share_of


class Inconsistency(Rule):
    """Loss or metric are surely worse with running statistics than with batch statistics, on the same samples.

    What:
        The change of loss and metric on training batches from batch statistics to running statistics, with all else in
        eval mode (no dropout, and no heads or losses of training alone). It fails where the 95% interval of the change
        excludes zero, at least five micro-batches were scored, and the change is larger than 2 points of a metric
        between 0 and 1; otherwise than 5% of the value. A metric counts where its goal is stated (`--goal`) or the loss
        does not surely contradict that larger is better. Where another error explains it, it is reported as a
        consequence of that; otherwise this finding says what was ruled out.

    Why:
        This is what a user of the network notices. The mismatch D says how far normalized values move, not what the
        network makes of it: layers that are within their limits can still add up, and a network that reads the answer
        from the statistics of its batch fails at inference with a mismatch that is hardly measurable.

    Example:
        Matching and other pairs go through one network in two calls. The statistics of each call tell which pairs it
        holds. Accuracy is 0.94 in training and 0.46 at inference, and no layer is flagged.

    Remedy:
        Look at what the samples of a batch have in common in training but not at inference: pairs in separate calls,
        samplers that sort, padding. Fine-tuning with frozen statistics (`bnprobe convert --to frozen --finetune`)
        trains the weights on what they get at inference.

    Reference:
        Wu and Johnson 2021, arXiv 2105.07576, sections 3 and 6 (inconsistency, leakage).
    """

    code = "BN211"
    title = "worse at inference"
    cause = "inconsistency"
    severity = "error"
    unit = ""
    needs = "data"
    real_data = True
    finding = "loss or metric are worse with running statistics than with batch statistics"
    remedy = (
        "Look for what a batch tells in training and not at inference (pairs in separate calls, sorted samples,"
        " padding); fine-tune with frozen statistics (bnprobe convert --to frozen --finetune), so that the weights are"
        " trained on what they get at inference."
    )
    commands = ("convert --to frozen --finetune",)
    follows_from_any = True

    def check(self, facts: Facts) -> Iterator[Verdict]:
        found = effect.inconsistency(facts.gaps, facts.chance)
        change = found.main
        if change is None:
            yield self.skipped(None, effect.UNSCORED)
            return
        worse = effect.surely_worse(facts)
        if worse is None:
            words = f"On training batches {change.words(*effect.STATISTICS)}"
            yield self.passed(None, f"{words}{_why_not(found, facts)}.", change.harm, change.floor)
            return
        words = f"On training batches {worse.words(*effect.STATISTICS)}"
        ruled_out = "; ".join(_ruled_out(facts))
        not_known = f" No cause was found. Ruled out: {ruled_out}." if ruled_out else " No cause was found."
        severity: Severity | None = "info" if facts.is_new else None  # what is not trained yet says nothing
        yield self.failed(None, f"{words}.{not_known}", worse.harm, worse.floor, severity)


def _why_not(found: Effect, facts: Facts) -> str:
    """Why a change is no finding, a clause; empty where it is no harm."""
    if found.is_no_worse:
        return ""
    if effect.is_scored_on_few(facts):
        few = f"fewer than {effect.FEWEST_SCORED} micro-batches are too few to judge by"
        return f"; {few}, since each has one mean and variance"
    return "; the change is not known precisely enough to call it significant"


def _ruled_out(facts: Facts) -> Iterator[str]:
    """Causes that were measured and cannot be it, clauses."""
    layers = list(facts.layers.values())
    if facts.output is not None and facts.output.repeat == 0:
        yield "randomness at inference (two passes agree)"
    remedy = effect.tried(facts.remedies, "recalibrated")
    if remedy is not None:
        gain = effect.of_remedy(remedy, facts.gaps, facts.chance)
        change = gain.main
        if gain.is_no_gain and change is not None:
            yield f"stale statistics (recalibrated, {change.words('before', 'after')} on {remedy.scored_on} data)"
    elif (lag := _largest(layers, "lag")) is not None and _is_within(layers, "lag"):
        yield f"stale statistics (at most D = {number(lag)} in a layer)"
    noise = _largest(layers, "small_batch")
    if noise is not None and all((share_of(each, "small_batch") or 0) <= mismatch_limit(each) for each in layers):
        yield f"small batches (at most D = {number(noise)} in a layer)"
    tested = [layer.composition for layer in layers if layer.composition is not None]
    if tested and all(found.p_value >= COMPOSITION_P for found in tested):
        yield "non-i.i.d. batches (the samples of a batch are no more alike than others)"
    dropout = _largest(layers, "dropout")
    if dropout is not None and _is_within(layers, "dropout"):
        yield f"dropout (at most D = {number(dropout)} in a layer)"
    if all(layer.calls_per_forward == 1 for layer in layers):
        yield "layers shared by several inputs (every layer is called once)"
    elif not are_domains_apart(facts):
        yield "layers shared by several inputs (their calls do not differ significantly)"


def _is_within(layers: list[Layer], cause: Cause) -> bool:
    """Whether a share is within the limit of every layer; each may have one of its own."""
    return all((share_of(layer, cause) or 0.0) <= share_limit(layer) for layer in layers)


def _largest(layers: list[Layer], cause: Cause) -> float | None:
    known = [share for layer in layers if (share := share_of(layer, cause)) is not None]
    return max([*known, 0.0]) if len(known) == len(layers) and known else None
