"""Every cause that bnprobe can name, one file each."""

from __future__ import annotations

from bnprobe.rules.backward_noise import BackwardNoise
from bnprobe.rules.composition import BatchComposition
from bnprobe.rules.data_shift import DataShift
from bnprobe.rules.dead_channels import DeadChannels
from bnprobe.rules.double_update import DoubleUpdate
from bnprobe.rules.dropout import DropoutShift
from bnprobe.rules.dropout_before_norm import DropoutBeforeNorm
from bnprobe.rules.frozen_mismatch import FrozenMismatch
from bnprobe.rules.interface import Rule
from bnprobe.rules.lag import Lag
from bnprobe.rules.last_batch import LastBatch
from bnprobe.rules.momentum_convention import MomentumConvention
from bnprobe.rules.never_trained import NeverTrained
from bnprobe.rules.no_running_stats import NoRunningStats
from bnprobe.rules.non_finite import NonFinite
from bnprobe.rules.propagation import Propagation
from bnprobe.rules.rank_divergence import RankDivergence
from bnprobe.rules.shared_domains import SharedDomains
from bnprobe.rules.single_image import SingleImage
from bnprobe.rules.single_value import SingleValue
from bnprobe.rules.small_batch import SmallBatch

RULES: tuple[Rule, ...] = (
    MomentumConvention(),
    NeverTrained(),
    NonFinite(),
    NoRunningStats(),
    FrozenMismatch(),
    DeadChannels(),
    DropoutBeforeNorm(),
    SmallBatch(),
    BatchComposition(),
    Lag(),
    DropoutShift(),
    Propagation(),
    DataShift(),
    SharedDomains(),
    SingleValue(),
    SingleImage(),
    LastBatch(),
    DoubleUpdate(),
    RankDivergence(),
    BackwardNoise(),
)
"""Every rule, in the order of the codes. A new rule is one file, one line here, one test and one page of docs."""

__all__ = ["RULES", "Rule"]
