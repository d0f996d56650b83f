"""What a rule declares, what it is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnprobe.records import Cause, FreeRemedy, Layer, Outcome, Severity, Verdict
from bnprobe.rules.facts import Anatomy, Facts, Need
from bnprobe.wording import either, given, option

SECTIONS = ("What", "Why", "Example", "Remedy", "Reference")
"""The headings of every rule's docstring, which is its manual, in order."""


@dataclass(frozen=True)
class Link:
    """A finding of one cause that explains a finding of another on the same layer.

    Attributes:
        cause: The other cause.
        holds: Whether the link exists on a layer; not asked where the layer was not measured.
        fits: Whether it exists with the settings of a layer, from the model alone.
    """

    cause: Cause
    holds: Callable[[Layer], bool] = lambda layer: True
    fits: Callable[[Anatomy], bool] = lambda anatomy: True

    def exists(self, name: str, facts: Facts) -> bool:
        """Whether the link exists on the layer of that name, by what is known of it."""
        layer, anatomy = facts.layers.get(name), anatomy_of(facts, name)
        return (layer is None or self.holds(layer)) and (anatomy is None or self.fits(anatomy))


class Rule(ABC):
    """One cause: when it is present, what to do about it, and how it relates to other causes.

    A rule is one class in one file, and its docstring is its manual. Everything that bnprobe says about a cause is read
    from the class: by the command line, the ranking, the reports and the documentation. Rules of bnprobe are listed in
    ``bnprobe.rules``; other packages add theirs through the entry-point group ``bnprobe.rules``.

    Attributes:
        code: Stable and unique, e.g. "BN201". Of bnprobe's own codes the first digit says what the rule looks at: 1 the
            model, 2 the data, 3 training.
        title: A few words in lower case: the heading of its findings and of its manual.
        cause: What it finds, a stable identifier, e.g. "small_batch".
        severity: Of a finding, unless the finding says otherwise.
        unit: Of the measured value.
        needs: What must be available for the rule to judge; otherwise it returns one skipped verdict with the reason.
        real_data: The rule judges real data only, not synthetic inputs.
        finding: What failing layers have in common, a clause that follows "3 of 5 layers: ".
        remedy: What to do first, a sentence.
        stops_training: Training raises an error, or no comparison is possible: findings come first in their severity.
        reports_impact: The measured effect on the output, which ranks a diagnosis, is also reported as the effect of
            this cause. False for causes that are not about batch statistics against running statistics.
        accounts_for: Shares of the mismatch that are the doing of a cause which is no share itself: of the measured
            effect on the output it gets their part, and that of findings that follow from it. Without any, all of it.
        follows_from: Causes that explain a finding of this rule on the same layer; of several, the first one counts.
        explains: Causes whose findings on the same layer a finding of this rule explains, where these have no
            explanation in their own ``follows_from``.
        follows_upstream: A finding follows from causes with an ``upstream_order`` in earlier layers.
        upstream_order: Set for causes that change a layer's own output, and so explain mismatch in later layers. Of
            several the one with the largest measured share counts, and then the one with the lowest number.
        explains_layers: Causes whose findings on any layer a finding about the whole model explains.
        follows_from_any: A finding about the whole model follows from the largest error that changes a layer's output.
        free_remedy: The remedy without training that may be all that is needed; reports suggest to measure it.
        also_tried: Further remedies without training; reports say what they give where they are surely a gain.
        other_remedy: What to do instead where that remedy was tried and is no gain, or too little; "{gain}" stands for
            which of the two.
        mended_first: Causes that are to be mended before ``other_remedy`` makes sense, on whatever layer they are.
        larger_batches: Larger batches would help; reports suggest to measure how large.
        commands: What carries out a remedy of this rule, as the remedy names it after "bnprobe ", e.g. "recalibrate";
            reports suggest it as a whole command.
    """

    code: ClassVar[str]
    title: ClassVar[str]
    cause: ClassVar[Cause]
    severity: ClassVar[Severity]
    unit: ClassVar[str]
    needs: ClassVar[Need] = "model"
    real_data: ClassVar[bool] = False
    finding: ClassVar[str]
    remedy: ClassVar[str]

    stops_training: ClassVar[bool] = False
    reports_impact: ClassVar[bool] = True
    accounts_for: ClassVar[tuple[Cause, ...]] = ()
    follows_from: ClassVar[tuple[Link, ...]] = ()
    explains: ClassVar[tuple[Link, ...]] = ()
    follows_upstream: ClassVar[bool] = False
    upstream_order: ClassVar[int | None] = None

    explains_layers: ClassVar[tuple[Cause, ...]] = ()
    follows_from_any: ClassVar[bool] = False

    free_remedy: ClassVar[FreeRemedy | None] = None
    also_tried: ClassVar[tuple[FreeRemedy, ...]] = ()
    other_remedy: ClassVar[str] = ""
    mended_first: ClassVar[tuple[Cause, ...]] = ()
    larger_batches: ClassVar[bool] = False
    commands: ClassVar[tuple[str, ...]] = ()

    def judge(self, facts: Facts) -> Iterator[Verdict]:
        """One verdict for each layer, or for the model; one skipped verdict if what the rule needs is missing."""
        reason = _missing(self.needs, facts) or (_synthetic(facts) if self.real_data else None)
        if reason is None:
            yield from self.check(facts)
        else:
            yield self.skipped(None, reason)

    @abstractmethod
    def check(self, facts: Facts) -> Iterator[Verdict]:
        """The verdicts, where everything that the rule needs is available."""

    def passed(
        self, layer: str | None, message: str, value: float | None = None, limit: float | None = None
    ) -> Verdict:
        """The cause was not found."""
        return self._verdict(layer, "passed", message, value, limit)

    def failed(
        self,
        layer: str | None,
        message: str,
        value: float | None = None,
        limit: float | None = None,
        severity: Severity | None = None,
        remedy: str | None = None,
    ) -> Verdict:
        """The cause was found."""
        return self._verdict(layer, "failed", message, value, limit, severity, remedy or self.remedy)

    def skipped(self, layer: str | None, reason: str) -> Verdict:
        """The rule could not judge; the reason is a clause without a full stop."""
        return self._verdict(layer, "skipped", f"Not judged: {reason}.", None, None, reason=reason)

    def without_statistics(self, layer: Anatomy) -> Verdict:
        """The verdict of a rule on running statistics where there are none."""
        return self.skipped(layer.name, "the layer has no running statistics")

    def _verdict(
        self,
        layer: str | None,
        outcome: Outcome,
        message: str,
        value: float | None,
        limit: float | None,
        severity: Severity | None = None,
        remedy: str = "",
        reason: str | None = None,
    ) -> Verdict:
        return Verdict(
            rule=self.code,
            cause=self.cause,
            layer=layer,
            outcome=outcome,
            severity=severity or self.severity,
            message=message,
            value=value,
            limit=limit,
            unit=self.unit,
            remedy=remedy,
            reason=reason,
        )


class MeasuredRule(Rule):
    """A rule that judges each layer that a scan measured by itself."""

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.layers.values():
            yield self._judge(layer, facts)

    @abstractmethod
    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        """The verdict on a layer."""


class AnatomyRule(Rule):
    """A rule that judges each layer by itself, as the model alone shows it."""

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.anatomy:
            yield self._judge(layer, facts)

    @abstractmethod
    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        """The verdict on a layer."""


_REQUIRED = ("code", "title", "cause", "severity", "unit", "finding", "remedy")


def check_complete(rule: Rule) -> None:
    """Refuse a rule that does not declare all that is said about it.

    Raises:
        TypeError: Names what is missing.
    """
    missing = [name for name in _REQUIRED if not isinstance(getattr(rule, name, None), str)]
    if missing:
        raise TypeError(f"The rule {type(rule).__qualname__} does not declare {', '.join(missing)}.")


def anatomy_of(facts: Facts, name: str) -> Anatomy | None:
    """The settings and contents of a layer, where known."""
    return next((anatomy for anatomy in facts.anatomy if anatomy.name == name), None)


def _missing(need: Need, facts: Facts) -> str | None:
    """Why a need is not met."""
    if need == "model":
        return None
    if need == "several processes":
        return "one process: nothing to compare" if facts.processes < 2 else None
    if facts.scan is None:
        return f"needs data: {either('run bnprobe scan', 'use bnprobe.scan')}"
    if need == "held-out data" and not facts.held_out:
        return f"needs held-out data: give {given('held-out data')}"
    if need == "training steps" and all(layer.updates is None for layer in facts.layers.values()):
        return f"needs training steps: scan with {option('--train-steps')} and a loss"
    if need == "gradients" and all(layer.backward is None for layer in facts.layers.values()):
        return f"needs gradients: scan with {option('--gradients')} and a loss"
    return None


def _synthetic(facts: Facts) -> str | None:
    synthetic = facts.scan is not None and facts.scan.synthetic
    return "needs real data: the inputs of this scan are synthetic" if synthetic else None
