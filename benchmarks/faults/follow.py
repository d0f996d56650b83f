"""Do what the first diagnosis advises, to the letter, and see what comes back.

What a remedy says is read from its text: the action whose words come first in it is carried out, with bnprobe's own
functions where it names them, otherwise as its reader would do it in the training script.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

import bnprobe
from benchmarks.faults.cases import Case
from benchmarks.faults.networks import forward
from benchmarks.faults.samples import Samples, loader
from benchmarks.faults.surgery import TwoDomains, heed_eval, norms, set_eps, set_momentum, units
from bnprobe import Report
from bnprobe.errors import BnprobeError
from bnprobe.records import FREE_REMEDIES

STEPS, RATE = 250, 3e-3
"""Of further training, where a remedy asks for it: the rate falls to zero."""

ON_TRAINING, ON_EVALUATION, *_, WITH_FROZEN = FREE_REMEDIES

INCLUDE_FROZEN = "--include-frozen"

_NUMBER = re.compile(r"eps ?(?:=|of|to)? ?(?P<eps>\d[\d.e-]*\d)")


@dataclass(frozen=True)
class Followed:
    """What was done.

    Attributes:
        action: In a few words.
        case: With the remedy; None if it could not be carried out.
        problem: Why not.
        promised: The metric that the report said it would give on held-out data; None if it said nothing.
    """

    action: str
    case: Case | None
    problem: str = ""
    promised: float | None = None


def follow(case: Case, report: Report) -> Followed:
    """Carry out the remedy of the first diagnosis on a copy of the case; nothing was advised: the case as it is."""
    if not report.diagnoses:
        return Followed("nothing", case)
    text = report.diagnoses[0].remedy
    found = [(match.start(), name) for name, (words, _) in ACTIONS.items() if (match := re.search(words, text, re.I))]
    if not found:
        return Followed("nothing", case, f"no action in: {text}")
    name = min(found)[1]
    try:
        mended = ACTIONS[name][1](replace(case, model=copy.deepcopy(case.model)), text)
    except (BnprobeError, ValueError) as error:
        return Followed(name, None, f"{type(error).__name__}: {error}")
    return Followed(name, mended, promised=_promised(report, name))


def _promised(report: Report, action: str) -> float | None:
    """The metric that the report gives for a remedy that it tried."""
    on_training = WITH_FROZEN if INCLUDE_FROZEN in report.diagnoses[0].remedy else ON_TRAINING
    name = {"recalibrate": on_training, "recalibrate on held-out data": ON_EVALUATION}.get(action)
    return next((remedy.after.metric for remedy in report.remedies if remedy.name == name), None)


def _recalibrated(case: Case, text: str) -> Case:
    return _with_statistics_of(case, case.training(), include_frozen=INCLUDE_FROZEN in text)


def _recalibrated_on_held_out(case: Case, text: str) -> Case:
    return _with_statistics_of(case, case.held_out())


def _with_statistics_of(case: Case, samples: Samples, include_frozen: bool = False) -> Case:
    batches, enough = loader(samples, case.sampling), _enough(case)
    bnprobe.recalibrate(case.model, batches, num_batches=enough, forward=forward, include_frozen=include_frozen)
    return replace(case, served_batch=None)


def _enough(case: Case) -> int:
    """Batches with about 4,000 samples."""
    return max(32, 4096 // case.sampling.batch_size)


def _momentum(case: Case, text: str) -> Case:
    for norm in norms(case.model):
        if norm.momentum is not None:
            set_momentum(norm, 1 - norm.momentum)
    return _recalibrated(case, text)


def _same_preprocessing(case: Case, text: str) -> Case:
    return replace(case, evaluated=case.prepared)


def _larger_batches(case: Case, text: str) -> Case:
    return case.drawn(batch_size=case.network.batch_size).trained(STEPS, RATE)


def _shuffled(case: Case, text: str) -> Case:
    return case.drawn(order="shuffled").trained(STEPS, RATE)


def _dropout_moved(case: Case, text: str) -> Case:
    for unit in units(case.model):
        unit.drop = nn.Identity()
    return case.trained(STEPS, RATE)


def _eps_restored(case: Case, text: str) -> Case:
    match = _NUMBER.search(text)
    if match is None:
        raise ValueError(f"no eps in: {text}")
    set_eps(case.model, float(match["eps"]))
    return case


def _one_call(case: Case, text: str) -> Case:
    if isinstance(case.model, TwoDomains):
        case.model.joined = True
    else:  # domains come by turns: mix them
        case = case.drawn(order="shuffled")
    return case.trained(STEPS, RATE)


def _frozen(case: Case, text: str) -> Case:
    if not re.search("without recalibrat|do not recalibrate|as they are", text, re.I):
        _recalibrated(case, text)
    bnprobe.convert(case.model, to="frozen")
    return case.trained(STEPS, RATE / 3)


def _heeding_eval(case: Case, text: str) -> Case:
    heed_eval(case.model)
    return case


def _eval(case: Case, text: str) -> Case:
    return replace(case, served_in_training=False)


def _dropped(case: Case, text: str) -> Case:
    return case.drawn(drop_last=True)


ACTIONS: dict[str, tuple[str, Callable[[Case, str], Case]]] = {
    "recalibrate on held-out data": (
        r"recalibrate the running statistics on (unlabelled )?(samples of the new|held-out|evaluation)"
        r"|statistics of the (held-out|evaluation)|recalibrate on (the )?(held-out|evaluation|new)",
        _recalibrated_on_held_out,
    ),
    "recalibrate": (r"recalibrate|bnprobe recalibrate", _recalibrated),
    "1 - momentum": (r"1 - momentum", _momentum),
    "same preprocessing": (r"preprocessing", _same_preprocessing),
    "larger batches": (r"larger (normalization )?batches", _larger_batches),
    "shuffle and train on": (r"shuffle", _shuffled),
    "move dropout and train on": (r"(move|remove|take out) (the )?dropout", _dropout_moved),
    "eps": (r"(set|restore|raise|use) eps", _eps_restored),
    "one call and train on": (r"its own BN|in one call|own layers", _one_call),
    "freeze and train on": (r"frozen", _frozen),
    "training=self.training": (r"training=self\.training", _heeding_eval),
    "eval()": (r"eval\(\)", _eval),
    "drop_last": (r"drop_last", _dropped),
}
"""By name: the words that ask for it, and how it is done."""
