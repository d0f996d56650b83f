"""What is scanned, what bnprobe said of it, and what came of its advice."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.faults.cases import Case, healthy_case
from benchmarks.faults.controls import CONTROLS
from benchmarks.faults.damage import Damage, damage_of
from benchmarks.faults.faults import FAULTS, STRENGTHS
from benchmarks.faults.follow import follow
from benchmarks.faults.networks import NETWORKS
from benchmarks.faults.proofs import shown
from bnprobe.analysis.diagnosis import diagnose, has_findings, judge
from bnprobe.config.spec import RulesSpec
from bnprobe.errors import BnprobeError
from bnprobe.measure.layers import anatomy, find_layers
from bnprobe.records import Diagnosis, Report, Verdict
from bnprobe.rules.facts import Facts

LOOKED_AT = (0, 1, 2)
"""Seeds on which thresholds may be set and rules mended."""

UNSEEN = (41, 42, 43)
"""Seeds of the cases that are scored: run for final figures, never while rules are mended. 11 to 13 and 21 to 23 were,
before."""

PLACES = 2
"""Networks in which a fault of one strength is planted, of each kind of seeds."""

CONTROL_PLACES = 4
"""Networks in which a control of one kind is made, of each kind of seeds."""

PAIRS: tuple[tuple[str, str], ...] = (
    ("composition", "brightness"),
    ("dropout", "brightness"),
    ("slow_momentum", "contrast"),
    ("small_batch", "brightness"),
    ("shared_domains", "contrast"),
    ("momentum_convention", "brightness"),
    ("double_update", "contrast"),
    ("dead_channels", "brightness"),
    ("no_running_stats", "contrast"),
    ("dropout", "composition"),
    ("dropout", "small_batch"),
    ("dropout", "earlier_statistics"),
    ("dropout", "momentum_convention"),
    ("dropout", "double_update"),
    ("dropout", "backward_noise"),
    ("dropout", "last_batch"),
    ("dropout", "frozen_mismatch"),
    ("shared_domains", "earlier_statistics"),
    ("shared_domains", "dropout"),
    ("shared_domains", "composition"),
    ("slow_momentum", "last_batch"),
    ("earlier_statistics", "frozen_mismatch"),
    ("composition", "earlier_statistics"),
    ("shared_domains", "last_batch"),
)
"""Planted one after the other, strong; each in one network of each kind of seeds."""


@dataclass(frozen=True)
class Trial:
    """One scan.

    Attributes:
        planted: The kinds of faults, in the order in which they were planted; empty: a control.
        network, seed: What they were planted in.
        strength: Of the faults, a place in ``STRENGTHS``.
        control: Kind of the control.
    """

    planted: tuple[str, ...]
    network: str
    seed: int
    strength: int = 2
    control: str = ""

    @property
    def is_scored(self) -> bool:
        """Whether no threshold may have been set on it."""
        return self.seed not in LOOKED_AT


@dataclass(frozen=True)
class Advice:
    """What came of the remedy of the first diagnosis.

    Attributes:
        action: What was done, in words.
        score: The metric after it; None if it could not be carried out.
        error: Standard error of its difference to the healthy network.
        promised: The metric that the report had given for it; None if it had given none.
        problem: Why it could not be carried out.
    """

    action: str
    score: float | None
    error: float = 0.0
    promised: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Outcome:
    """What bnprobe said.

    Attributes:
        named: Causes of the diagnoses, first the one ranked first, each once.
        folded: Causes named only as consequences of others.
        errors: Causes of all findings of level error.
        flagged: Layers flagged.
        failed: The exit code of a scan would be 1.
        damage: What the metric lost; None where that cannot be said.
        advice: What came of following the first diagnosis, where the metric fell.
        proven: Direct measures show all that was planted; None where there is none.
        problem: An error of bnprobe that was not to be expected; None if all went well.
        figures: Of the report, by name, for trying other rules on.
        seconds: Planting and scanning.
    """

    trial: Trial
    named: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    flagged: int = 0
    failed: bool = False
    damage: Damage | None = None
    advice: Advice | None = None
    proven: bool | None = None
    problem: str | None = None
    figures: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_damaged(self) -> bool:
        """Whether the metric fell."""
        return self.damage is not None and self.damage.is_damaged


def single_trials(only: Sequence[str] = ()) -> Iterator[Trial]:
    """Every fault in every strength, each in a few networks, going round."""
    turn = 0
    for seeds in (LOOKED_AT, UNSEEN):
        for fault in FAULTS.values():
            if only and fault.name not in only:
                continue
            places = itertools.cycle(itertools.product(seeds, fault.networks))
            chosen = itertools.islice(places, turn, None)
            for strength, _ in itertools.product(fault.strengths, range(PLACES)):
                seed, network = next(chosen)
                yield Trial((fault.name,), network, seed, STRENGTHS.index(strength))
            turn += 7


def pair_trials() -> Iterator[Trial]:
    """Every pair in one network of each kind of seeds, going round."""
    for position, (seeds, pair) in enumerate(itertools.product((LOOKED_AT, UNSEEN), PAIRS)):
        common = [name for name in NETWORKS if all(name in FAULTS[fault].networks for fault in pair)]
        yield Trial(pair, common[position % len(common)], seeds[position % len(seeds)])


def control_trials() -> Iterator[Trial]:
    """Every control in a few networks of each kind of seeds, going round."""
    for turn, (seeds, control) in enumerate(itertools.product((LOOKED_AT, UNSEEN), CONTROLS.values())):
        places = list(itertools.product(seeds, control.networks))
        for place in range(3 * turn, 3 * turn + min(CONTROL_PLACES, len(places))):
            seed, network = places[place % len(places)]
            yield Trial((), network, seed, control=control.name)


def build(trial: Trial) -> Case:
    """The network with its faults."""
    case = healthy_case(trial.network, trial.seed)
    for fault in trial.planted:
        case = FAULTS[fault].plant(case, trial.strength)
    return CONTROLS[trial.control].change(case) if trial.control else case


def run(trial: Trial) -> Outcome:
    """Plant, scan, note what was said, and follow it where the metric fell."""
    started = time.perf_counter()
    outcome = Outcome(trial)
    try:
        case = build(trial)
        outcome = _diagnosed(replace(outcome, damage=damage_of(case)), case)
    except BnprobeError as error:
        outcome = replace(outcome, failed=True, problem=f"{type(error).__name__}: {error}")
    return replace(outcome, seconds=time.perf_counter() - started)


def _diagnosed(outcome: Outcome, case: Case) -> Outcome:
    if case.alone:
        return _said(outcome, *_linted(case))
    report = case.scanned()
    outcome = replace(
        _said(outcome, report.verdicts, report.diagnoses),
        flagged=report.summary.flagged,
        failed=has_findings(report, RulesSpec()),
        figures=_figures(report),
        proven=_proven(outcome.trial, case),
    )
    return replace(outcome, advice=_advised(case, report) if outcome.is_damaged else None)


def _advised(case: Case, report: Report) -> Advice:
    followed = follow(case, report)
    if followed.case is None:
        return Advice(followed.action, None, problem=followed.problem)
    after = damage_of(followed.case)
    assert after is not None  # the metric fell
    return Advice(followed.action, after.faulty, after.error, followed.promised, followed.problem)


def _proven(trial: Trial, case: Case) -> bool | None:
    found = [shown(fault, case) for fault in trial.planted]
    return None if None in found or not found or trial.strength < 2 else all(found)


def _linted(case: Case) -> tuple[Sequence[Verdict], Sequence[Diagnosis]]:
    """What the rules say of the model alone."""
    facts = Facts(anatomy(find_layers(case.model, lambda *names: True), case.model))
    verdicts = judge(facts, RulesSpec())
    return verdicts, diagnose(verdicts, facts)


def _said(outcome: Outcome, verdicts: Sequence[Verdict], diagnoses: Sequence[Diagnosis]) -> Outcome:
    errors = [one.cause for one in verdicts if one.outcome == "failed" and one.severity == "error"]
    consequences = [phrase.split(" in ")[0] for one in diagnoses for phrase in one.consequences]
    return replace(
        outcome,
        named=tuple(dict.fromkeys(one.cause for one in diagnoses)),
        folded=tuple(dict.fromkeys(consequences)),
        errors=tuple(dict.fromkeys(errors)),
    )


def _figures(report: Report) -> dict[str, float | None]:
    """What rules of the verdict may be made of."""
    found: dict[str, float | None] = {"output": report.summary.output.relative_l2}
    for path in ("train", "eval"):
        sizes = [
            (measured.equivalent_batch_size, measured.equivalent_batch_size_interval[1])
            for layer in report.layers
            if (measured := getattr(layer, path)) is not None and measured.equivalent_batch_size is not None
        ]
        found[f"n_eq {path}"] = min((size for size, _ in sizes), default=None)
        found[f"n_eq {path}, upper end"] = min((end for _, end in sizes if end is not None), default=None)
    for source in ("small_batch", "composition", "lag", "dropout", "propagation", "data_shift"):
        shares = [getattr(layer.shares, source) or 0.0 for layer in report.layers if layer.shares is not None]
        found[source] = max(shares, default=None)
    for gap in report.summary.gaps:
        for step in ("training", "without_noise", "inference", "held_out", "inconsistency", "generalization"):
            found[f"{gap.measure} {step}"] = getattr(gap, step)
        for step in ("inconsistency", "generalization", "training_noise"):
            low, high = getattr(gap, f"{step}_interval") or (None, None)
            found[f"{gap.measure} {step} low"], found[f"{gap.measure} {step} high"] = low, high
    for remedy in report.remedies:
        for when in ("before", "after"):
            score = getattr(remedy, when)
            found[f"{remedy.name}: metric {when}"], found[f"{remedy.name}: loss {when}"] = score.metric, score.loss
    return {name: value if value is None or math.isfinite(value) else None for name, value in found.items()}
