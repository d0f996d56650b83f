"""What rules judge: facts about the model alone, and what was measured. Plain values, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bnprobe.records import Gap, Layer, Output, Remedy, Scan

Need = Literal["model", "data", "held-out data", "training steps", "gradients", "several processes"]
"""What a rule needs; a rule whose need is not met is skipped with a reason."""


@dataclass(frozen=True)
class Anatomy:
    """The settings and contents of a layer, from the model alone.

    Attributes:
        name: As in ``records.Layer``.
        location: File and line where it was assigned in the user's code, where Python can tell.
        kind: Class name.
        momentum: Weight of the new batch; None: cumulative average.
        batches_tracked: None if not counted.
        has_running_statistics: False for track_running_stats=False.
        trains_statistics: After ``model.train()`` the layer is in train mode: its running statistics are updated.
        trains_affine: Weight or bias has requires_grad; None if the layer has neither.
        untouched: The running statistics are those of a new layer: mean 0 and variance 1 everywhere.
        non_finite: Number of values of the running statistics that are NaN or Inf.
        negative: Number of values of the running variance below 0.
        dead: Number of channels whose running variance is below eps.
        median_variance: Median of the running variance over channels; None without one, or where it is not finite.
        dropouts_before: Names of random layers that are active in training and defined before this one.
    """

    name: str
    location: str | None
    kind: str
    channels: int
    eps: float
    momentum: float | None
    batches_tracked: int | None
    has_running_statistics: bool
    trains_statistics: bool
    trains_affine: bool | None
    untouched: bool
    non_finite: int
    negative: int
    dead: int
    median_variance: float | None
    dropouts_before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Everything that rules may look at.

    Attributes:
        anatomy: Of every probed layer, in network order.
        layers: What was measured, by name; empty without data (``bnprobe lint``).
        scan: None without data.
        images: Number of samples in the training data, where known.
        drop_last: Whether the loader drops a partial last batch; None: not known.
        held_out: Whether held-out data was measured.
        own_order: The order of the samples is the user's; False: bnprobe shuffled a data set.
        processes: Number of processes that took part.
        rank_mismatch: Mismatch D between the running statistics of the two processes that differ most, by layer; empty
            where they were not compared.
        output: The distance of the two paths at the model's output.
        gaps: Loss and metric in training, at inference and on held-out data, where given.
        remedies: What remedies without training gave on held-out data, where they were tried.
    """

    anatomy: tuple[Anatomy, ...]
    layers: Mapping[str, Layer] = field(default_factory=dict)
    scan: Scan | None = None
    images: int | None = None
    drop_last: bool | None = None
    held_out: bool = False
    own_order: bool = True
    processes: int = 1
    rank_mismatch: Mapping[str, float] = field(default_factory=dict)
    output: Output | None = None
    gaps: tuple[Gap, ...] = ()
    remedies: tuple[Remedy, ...] = ()
