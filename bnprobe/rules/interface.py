"""The seam of the rules: what a rule declares, what it is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from bnprobe.facts import Anatomy, Facts, Need
from bnprobe.records import Cause, Outcome, Severity, Verdict

SECTIONS = ("What", "Why", "Example", "Remedy", "Reference")
"""The headings of every rule's docstring, which is its manual, in order."""


class Rule(ABC):
    """One cause: when it is present, and what to do about it.

    A rule is one file with one class, and one line in ``bnprobe.rules.RULES``. Its docstring is its manual.

    Attributes:
        code: Stable, e.g. "BN201"; the first digit says what it looks at: 1 the model, 2 the data, 3 training.
        title: A few words.
        cause: What it finds.
        severity: Of a finding, unless the finding says otherwise.
        unit: Of the value measured.
        needs: What must be there for it to judge; without it there is one verdict, skipped, with the reason.
        real_data: Made-up images tell it nothing.
        finding: What layers that fail have in common, a clause that follows "3 of 5 layers: ".
        remedy: What to do first, a sentence.
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

    def judge(self, facts: Facts) -> Iterator[Verdict]:
        """One verdict for each layer, or for the model; one that is skipped if what the rule needs is missing."""
        reason = _missing(self.needs, facts) or (_made_up(facts) if self.real_data else None)
        if reason is None:
            yield from self.check(facts)
        else:
            yield self.skipped(None, reason)

    @abstractmethod
    def check(self, facts: Facts) -> Iterator[Verdict]:
        """The verdicts, where all that the rule needs is there."""

    def passed(
        self, layer: str | None, message: str, value: float | None = None, limit: float | None = None
    ) -> Verdict:
        """The cause is not there."""
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
        """The cause is there."""
        return self._verdict(layer, "failed", message, value, limit, severity, remedy or self.remedy)

    def skipped(self, layer: str | None, reason: str) -> Verdict:
        """The rule could not judge; the reason is a clause, without a full stop."""
        return self._verdict(layer, "skipped", f"Not judged: {reason}.", None, None, reason=reason)

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


def anatomy_of(facts: Facts, name: str) -> Anatomy | None:
    """What a layer is set to, where known."""
    return next((anatomy for anatomy in facts.anatomy if anatomy.name == name), None)


def _missing(need: Need, facts: Facts) -> str | None:
    """Why a need is not met."""
    if need == "model":
        return None
    if need == "several processes":
        return "one process: nothing to compare" if facts.processes < 2 else None
    if facts.scan is None:
        return "needs data: run bnprobe scan"
    if need == "evaluation data" and not facts.evaluation:
        return "needs evaluation data: give eval_data in the spec or load_eval_data in the model file"
    if need == "training steps" and all(layer.updates is None for layer in facts.layers.values()):
        return "needs training steps: scan with --train-steps and a loss"
    if need == "gradients" and all(layer.backward is None for layer in facts.layers.values()):
        return "needs gradients: scan with --gradients and a loss"
    return None


def _made_up(facts: Facts) -> str | None:
    synthetic = facts.scan is not None and facts.scan.synthetic
    return "synthetic images: only real data can show it" if synthetic else None
