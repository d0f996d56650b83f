"""What is scanned, and what bnprobe said of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.faults.cases import Case, healthy_case, unchanged
from benchmarks.faults.faults import FAULTS, NotApplicableError
from benchmarks.faults.networks import NETWORKS
from benchmarks.faults.proofs import shown
from benchmarks.faults.surgery import set_momentum
from bnprobe.analysis.diagnosis import diagnose, judge
from bnprobe.config.spec import RulesSpec
from bnprobe.errors import BnprobeError
from bnprobe.measure.layers import anatomy, find_layers
from bnprobe.records import Diagnosis, Verdict
from bnprobe.rules.facts import Facts

SEEDS = (0, 3, 4, 5)
"""Of the networks that faults are planted in. The first run, with seeds 0 to 2, was looked at to mend the rules."""

CONTROL_SEEDS = (0, 3, 4, 5, 6)
"""Of the networks that are scanned as they are."""

LOOKED_AT = frozenset({0, 1, 2})
"""Seeds on which thresholds may be set and rules mended; all others are scored."""

PAIRS: tuple[tuple[str, str], ...] = (
    ("composition", "data_shift"),
    ("dropout", "data_shift"),
    ("lag", "data_shift"),
    ("small_batch", "data_shift"),
    ("shared_domains", "data_shift"),
    ("momentum_convention", "data_shift"),
    ("double_update", "data_shift"),
    ("dead_channels", "data_shift"),
    ("no_running_stats", "data_shift"),
    ("dropout", "composition"),
    ("dropout", "small_batch"),
    ("dropout", "lag"),
    ("dropout", "momentum_convention"),
    ("dropout", "double_update"),
    ("dropout", "backward_noise"),
    ("dropout", "last_batch"),
    ("dropout", "frozen_mismatch"),
    ("shared_domains", "lag"),
    ("shared_domains", "dropout"),
    ("shared_domains", "composition"),
    ("lag", "last_batch"),
    ("lag", "frozen_mismatch"),
    ("composition", "lag"),
    ("shared_domains", "last_batch"),
)
"""Planted one after the other; each in two networks."""


def _with_everything(case: Case) -> Case:
    """Every measurement that a scan can make, on batches in another order."""
    return replace(case.drawn(seed=case.seed + 100), shift=unchanged).with_options(train_steps=8, gradients=True)


def _slower(case: Case) -> Case:
    """A running average of more batches, which has settled all the same."""
    set_momentum(case.model, 0.03)
    return case.settled(200)


def _weak_dropout(case: Case) -> Case:
    """Dropout that hardly changes what the layers see."""
    return replace(FAULTS["dropout_before_norm"](case), alone=False)


VARIANTS: dict[str, Callable[[Case], Case]] = {
    "as trained": lambda case: case,
    "with everything": _with_everything,
    "momentum 0.03": _slower,
    "weak dropout": _weak_dropout,
}
"""Of the healthy controls."""


@dataclass(frozen=True)
class Trial:
    """One scan.

    Attributes:
        planted: The faults, in the order in which they were planted; empty: a healthy control.
        network, seed: What they were planted in.
        variant: Of a healthy control.
    """

    planted: tuple[str, ...]
    network: str
    seed: int
    variant: str = ""


@dataclass(frozen=True)
class Outcome:
    """What bnprobe said.

    Attributes:
        named: Causes of the diagnoses, first the one ranked first, each once.
        folded: Causes named only as consequences of others.
        errors: Causes of all findings of level error.
        flagged: Layers flagged.
        proven: Direct measures show all that was planted; None for controls.
        not_applicable: Why the fault cannot be planted there; None if it was.
        problem: An error of bnprobe that was not to be expected; None if all went well.
        seconds: Planting and scanning.
    """

    trial: Trial
    named: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    flagged: int = 0
    proven: bool | None = None
    not_applicable: str | None = None
    problem: str | None = None
    seconds: float = 0.0

    @property
    def tuned(self) -> bool:
        """Whether thresholds may have been set on it."""
        return self.trial.seed in LOOKED_AT


def single_trials(only: tuple[str, ...] = ()) -> Iterator[Trial]:
    """Every fault in every network."""
    for name, network, seed in itertools.product(only or FAULTS, NETWORKS, SEEDS):
        yield Trial((name,), network, seed)


def pair_trials() -> Iterator[Trial]:
    """Every pair in two networks of different seeds, going round."""
    places = list(itertools.product(SEEDS, NETWORKS))
    for position, pair in enumerate((*PAIRS, *PAIRS)):
        seed, network = places[(position + position // len(PAIRS) * (len(NETWORKS) + 1)) % len(places)]
        yield Trial(pair, network, seed)


def control_trials() -> Iterator[Trial]:
    """Every variant of every healthy network."""
    for network, seed, variant in itertools.product(NETWORKS, CONTROL_SEEDS, VARIANTS):
        yield Trial((), network, seed, variant)


def build(trial: Trial) -> Case:
    """The network with its faults.

    Raises:
        NotApplicableError: The fault cannot occur there.
    """
    case = healthy_case(trial.network, trial.seed)
    for fault in trial.planted:
        case = FAULTS[fault](case)
    return VARIANTS[trial.variant](case) if trial.variant else case


def run(trial: Trial) -> Outcome:
    """Plant, scan, and note what was said."""
    started = time.perf_counter()
    try:
        case = build(trial)
        outcome = replace(_diagnosed(trial, case), proven=_proven(trial, case))
    except NotApplicableError as error:
        outcome = Outcome(trial, not_applicable=str(error))
    except BnprobeError as error:
        outcome = Outcome(trial, problem=f"{type(error).__name__}: {error}")
    return replace(outcome, seconds=time.perf_counter() - started)


def _proven(trial: Trial, case: Case) -> bool | None:
    return all(shown(fault, case) for fault in trial.planted) if trial.planted else None


def _diagnosed(trial: Trial, case: Case) -> Outcome:
    if case.alone:
        return _outcome(trial, *_linted(case))
    report = case.scanned()
    return replace(_outcome(trial, report.verdicts, report.diagnoses), flagged=report.summary.flagged)


def _linted(case: Case) -> tuple[Sequence[Verdict], Sequence[Diagnosis]]:
    """What the rules say of the model alone."""
    facts = Facts(anatomy(find_layers(case.model, lambda *names: True), case.model))
    verdicts = judge(facts, RulesSpec())
    return verdicts, diagnose(verdicts, facts)


def _outcome(trial: Trial, verdicts: Sequence[Verdict], diagnoses: Sequence[Diagnosis]) -> Outcome:
    errors = [one.cause for one in verdicts if one.outcome == "failed" and one.severity == "error"]
    consequences = [phrase.split(" in ")[0] for one in diagnoses for phrase in one.consequences]
    return Outcome(
        trial=trial,
        named=tuple(dict.fromkeys(one.cause for one in diagnoses)),
        folded=tuple(dict.fromkeys(consequences)),
        errors=tuple(dict.fromkeys(errors)),
    )
