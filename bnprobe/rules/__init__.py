"""Every cause that bnprobe can name: one rule each, one file each."""

from __future__ import annotations

from bnprobe.records import Cause
from bnprobe.registry import Registry
from bnprobe.rules.backward_noise import BackwardNoise
from bnprobe.rules.batch_at_inference import BatchAtInference
from bnprobe.rules.composition import BatchComposition
from bnprobe.rules.data_shift import DataShift
from bnprobe.rules.dead_channels import DeadChannels
from bnprobe.rules.double_update import DoubleUpdate
from bnprobe.rules.dropout import DropoutShift
from bnprobe.rules.dropout_before_norm import DropoutBeforeNorm
from bnprobe.rules.frozen_mismatch import FrozenMismatch
from bnprobe.rules.generalization import Generalization
from bnprobe.rules.inconsistency import Inconsistency
from bnprobe.rules.interface import Rule, check_complete
from bnprobe.rules.lag import Lag
from bnprobe.rules.last_batch import LastBatch
from bnprobe.rules.momentum_convention import MomentumConvention
from bnprobe.rules.never_trained import NeverTrained
from bnprobe.rules.no_running_stats import NoRunningStats
from bnprobe.rules.non_finite import NonFinite
from bnprobe.rules.propagation import Propagation
from bnprobe.rules.random_at_inference import RandomAtInference
from bnprobe.rules.rank_divergence import RankDivergence
from bnprobe.rules.shared_domains import SharedDomains
from bnprobe.rules.single_image import SingleImage
from bnprobe.rules.single_value import SingleValue
from bnprobe.rules.small_batch import SmallBatch
from bnprobe.rules.trained_in_eval import TrainedInEval
from bnprobe.rules.undone_conversion import UndoneConversion
from bnprobe.rules.untrained_weights import UntrainedWeights

BUILT_IN: tuple[type[Rule], ...] = (
    MomentumConvention,
    NeverTrained,
    NonFinite,
    NoRunningStats,
    FrozenMismatch,
    DeadChannels,
    DropoutBeforeNorm,
    UndoneConversion,
    SmallBatch,
    BatchComposition,
    Lag,
    DropoutShift,
    Propagation,
    DataShift,
    SharedDomains,
    SingleValue,
    SingleImage,
    LastBatch,
    Inconsistency,
    TrainedInEval,
    RandomAtInference,
    UntrainedWeights,
    Generalization,
    BatchAtInference,
    DoubleUpdate,
    RankDivergence,
    BackwardNoise,
)
"""The rules of bnprobe, in the order of their codes."""


class RuleRegistry(Registry[Rule]):
    """The rules by code. Rules are added as classes, which is also what an entry point names."""

    def add(self, row: Rule | type[Rule]) -> None:
        """Append a rule.

        Raises:
            TypeError: It is not a rule, or does not declare all that is said about it.
            ValueError: There is a rule of that code.
        """
        rule = row() if isinstance(row, type) else row
        if not isinstance(rule, Rule):
            raise TypeError(f"{rule!r} is not a bnprobe.rules.Rule.")
        check_complete(rule)
        super().add(rule)


RULES = RuleRegistry("bnprobe.rules", (kind() for kind in BUILT_IN), name_of=lambda rule: rule.code, noun="rule")
"""Every rule: those of bnprobe in the order of the codes, then those of other packages."""


def rule_of(code: str) -> Rule | None:
    """The rule of a code; None where a report names a rule that is not installed here."""
    return next((rule for rule in RULES if rule.code == code), None)


def title_of(code: str, cause: Cause) -> str:
    """The title of a rule; its cause in words, where the rule is not installed here."""
    rule = rule_of(code)
    return cause.replace("_", " ") if rule is None else rule.title


__all__ = ["RULES", "Rule", "rule_of", "title_of"]
