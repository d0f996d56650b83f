"""What all parts of the benchmark share: converting, choosing a rate, and the figures of an arm in a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from bnprobe.analysis.comparison import mean_estimate
from bnprobe.config.spec import RepairSpec
from bnprobe.config.targets import TARGETS
from bnprobe.records import Arm, Estimate, Plan, Run, Score
from bnprobe.repairs import plan, wanted_by_globs

REPAIRS = tuple(name for name in TARGETS.names() if name != "sync")
"""The arms: every repair target but ``sync``, which takes several processes."""

SETTINGS = RepairSpec(groups=4, virtual_batch_size=4)
"""Of the arms. Group norm's default, at most 32 groups, would leave one or two channels in a group of these narrow
networks, and ghost batch norm's 32 samples in a part would be all of a batch."""


@dataclass(frozen=True)
class Choice:
    """A learning rate, and the accuracies that chose it.

    Attributes:
        rate: The best.
        tried: Accuracy of every rate tried on the images for choosing; None where it is not finite.
    """

    rate: float
    tried: dict[float, float | None]

    def words(self) -> str:
        """E.g. "0.01: 0.812, 0.03: 0.640"."""
        shown = (f"{rate:g}: {'failed' if found is None else f'{found:.3f}'}" for rate, found in self.tried.items())
        return ", ".join(shown)


@dataclass(frozen=True)
class Table:
    """Arms that were treated alike.

    Attributes:
        title: What was trained on what.
        words: How, a paragraph.
        arms: In the order of the table.
        control: Name of the arm that the others are held against.
        rates: Learning rate by arm; an arm that was not trained has none.
    """

    title: str
    words: str
    arms: tuple[Arm, ...]
    control: str
    rates: dict[str, float]


def repairs_for(batch_size: int, domains: int = 1) -> list[str]:
    """The arms that are not plain BN in these batches: ghost batches are parts of one, and domains at least two."""
    plain = {"ghost": batch_size <= SETTINGS.virtual_batch_size, "per-domain": domains < SETTINGS.domains}
    return [name for name in REPAIRS if not plain.get(name, False)]


def choose(rates: Iterable[float], score_at: Callable[[float], Score]) -> Choice:
    """The rate of the best accuracy; of equal ones, that of the smallest loss."""
    found = {rate: score_at(rate) for rate in rates}
    return Choice(max(found, key=lambda rate: _merit(found[rate])), {rate: one.metric for rate, one in found.items()})


def plan_for_all(model: nn.Module, to: str) -> Plan:
    """Convert every BN layer."""
    return plan(model, wanted_by_globs(model, ("*",)), to, "all layers")


def arm_of(name: str, runs: Sequence[Run], trained: bool = True) -> Arm:
    """Mean and interval over the runs."""
    losses, accuracies = [run.score.loss for run in runs], [run.score.metric for run in runs]
    return Arm(name, trained, tuple(runs), mean_estimate(losses), mean_estimate(accuracies))


def joined(parts: Sequence[Sequence[Arm]]) -> tuple[Arm, ...]:
    """Arms of several proofs, one for each seed, as arms of several runs."""
    return tuple(
        arm_of(same[0].name, [run for arm in same for run in arm.runs], same[0].trained)
        for same in zip(*parts, strict=True)
    )


def difference(arm: Arm, control: Arm) -> Estimate | None:
    """Accuracy minus that of the control, run by run of the same seed; an arm without training has one run for all."""
    runs = arm.runs if len(arm.runs) == len(control.runs) else arm.runs * len(control.runs)
    pairs = zip((run.score.metric for run in runs), (run.score.metric for run in control.runs), strict=True)
    return mean_estimate([None if one is None or other is None else one - other for one, other in pairs])


def verdict(gain: Estimate | None) -> str:
    """ "better", "worse" or "same", where an interval can tell."""
    if gain is None or gain.interval is None:
        return ""
    low, high = gain.interval
    if high is None or low <= 0 <= high:
        return "same"
    return "better" if low > 0 else "worse"


def rows(table: Table) -> list[list[str]]:
    """A heading, and a row for each arm."""
    control = next(arm for arm in table.arms if arm.name == table.control)
    return [
        [
            "arm",
            "rate",
            "runs",
            "kept steps",
            "held-out accuracy",
            "held-out loss",
            "accuracy minus control",
            "verdict",
        ],
        *(_row(arm, control, table.rates) for arm in table.arms),
    ]


def _row(arm: Arm, control: Arm, rates: dict[str, float]) -> list[str]:
    gain = None if arm.name == control.name else difference(arm, control)
    return [
        arm.name + (" (control)" if arm.name == control.name else ""),
        f"{rates[arm.name]:g}" if arm.name in rates else "",
        str(len(arm.runs)),
        _kept(arm) if arm.trained else "",
        _shown(arm.metric, "{:.3f}"),
        _shown(arm.loss, "{:.3f}"),
        "" if arm.name == control.name else _shown(gain, "{:+.3f}"),
        verdict(gain) + _diverged(arm),
    ]


def _kept(arm: Arm) -> str:
    """The steps whose weights were kept, one if all are the same; 0: training never did better than its start."""
    steps = [str(run.best_step) for run in arm.runs]
    return steps[0] if len(set(steps)) == 1 else ", ".join(steps)


def _shown(found: Estimate | None, form: str) -> str:
    if found is None:
        return "not finite"
    mean = form.format(found.mean)
    if found.interval is None:
        return mean
    return f"{mean} [{', '.join(form.format(end) for end in found.interval)}]"


def _diverged(arm: Arm) -> str:
    count = sum(run.ending == "diverged" for run in arm.runs)
    return f" ({count} diverged)" if count else ""


def _merit(score: Score) -> tuple[float, float]:
    accuracy = -1.0 if score.metric is None else score.metric
    return accuracy, float("-inf") if score.loss is None else -score.loss
