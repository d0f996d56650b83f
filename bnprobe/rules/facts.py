"""What rules judge: facts about the model alone, and what was measured. Plain values, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bnprobe.records import Chance, Gap, Layer, Output, Remedy, Scan

EXPLAINED = 0.2
"""A change explains a mismatch of which it leaves no more than this."""

Need = Literal["model", "data", "held-out data", "training steps", "gradients", "several processes"]
"""What a rule needs; a rule whose need is not met is skipped with a reason."""


@dataclass(frozen=True)
class Anatomy:
    """The settings and contents of a layer, from the model alone.

    Attributes:
        name: As in ``records.Layer``.
        location: File and line where the user's code builds it, where Python can tell.
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
        constant: Of these, those that the layer turns into less than 1% of a standard deviation.
        median_variance: Median of the running variance over channels; None without one, or where it is not finite.
        dropouts_before: Names of random layers that are active in training and feed this one, as traced where a batch
            or the code could be followed, else as defined.
        affine_moved: Weight or bias differ from those of a new layer (1 and 0); None if the layer has neither.
        bfloat16: All running statistics are values that bfloat16 can hold, although they are stored in more bits; None
            where few or round values say nothing.
        zeros: Fraction of exact zeros among the weights of the last layer before this one that has weights; None if
            there is none.
        levels: Number of different values of these weights, of many a lower bound; None if there is none.
        copy_of: Name of the module of the same kind that is trained, where the layer belongs to a copy of it without
            gradients, as the momentum encoder of contrastive learning is; None otherwise.
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
    affine_moved: bool | None = None
    bfloat16: bool | None = None
    zeros: float | None = None
    levels: int | None = None
    copy_of: str | None = None
    constant: int = 0


@dataclass(frozen=True)
class OtherEps:
    """What another eps in all layers does to the mismatch at inference.

    Attributes:
        eps: The value that leaves least of it.
        left: By stale layer, the fraction of the mismatch of its statistics that is left with it; without those of
            which eps says nothing.
    """

    eps: float
    left: Mapping[str, float]


@dataclass(frozen=True)
class Randomness:
    """What draws random numbers in a pass in eval mode.

    Attributes:
        generators: Whose global state moves: "torch", "numpy", "random".
        places: The modules in whose own forward it moves, with their classes, e.g. "encoder.drop (Dropout)".
        functions: Functions of torch that draw, e.g. "torch.nn.functional.dropout".
    """

    generators: tuple[str, ...]
    places: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Padding:
    """Parts of the inputs that are padding: the last positions of a sample that all hold the same value.

    Attributes:
        training, held_out: Fraction of the positions, mean over samples; None without held-out data.
    """

    training: float
    held_out: float | None = None


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
        composed: A batch sampler of the user's own says which samples make a batch.
        processes: Number of processes that took part.
        rank_mismatch: Mismatch D between the running statistics of the two processes that differ most, by layer; empty
            where they were not compared.
        output: The distance of the two paths at the model's output.
        gaps: Loss and metric in training, at inference and on held-out data, where given.
        remedies: What remedies without training gave on held-out data, where they were tried.
        chance: Loss and metric against those of outputs that belong to other samples, where measured.
        other_eps: Where another eps was tried, on layers that look stale.
        padding: Where samples of different sizes were found to be padded.
        randomness: What draws random numbers at inference, where two passes differ.
        averaged: Why the weights are taken to be an average of those of many steps, a clause.
        averaged_beside: That the weights file also holds averaged weights, a clause.
        undone: By name of a layer that is plain BN, what its checkpoint shows it to be converted to.
        called: Names of the layers that the forward pass called; None without data.
        samples_alone: Names of the layers that are called once for every sample of a batch.
        batch_at_inference: Layers with running statistics that normalize with batch statistics in eval mode, and
            whether they are themselves still in train mode then.
        frozen_lag: Mismatch D between the running statistics of a layer that training leaves in eval mode and those of
            the training data, by layer; empty where not measured.
    """

    anatomy: tuple[Anatomy, ...]
    layers: Mapping[str, Layer] = field(default_factory=dict)
    scan: Scan | None = None
    images: int | None = None
    drop_last: bool | None = None
    held_out: bool = False
    own_order: bool = True
    composed: bool = False
    processes: int = 1
    rank_mismatch: Mapping[str, float] = field(default_factory=dict)
    output: Output | None = None
    gaps: tuple[Gap, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    chance: tuple[Chance, ...] = ()
    other_eps: OtherEps | None = None
    padding: Padding | None = None
    randomness: Randomness | None = None
    averaged: str | None = None
    averaged_beside: str | None = None
    undone: Mapping[str, str] = field(default_factory=dict)
    called: frozenset[str] | None = None
    samples_alone: frozenset[str] = frozenset()
    batch_at_inference: Mapping[str, bool] = field(default_factory=dict)
    frozen_lag: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_new(self) -> bool:
        """Whether the whole network is as it was made: nothing has trained a BN layer, nor its running statistics."""
        return bool(self.anatomy) and all(_is_new(layer) for layer in self.anatomy)

    def unused(self, layer: str) -> bool:
        """Whether the forward pass is known not to call a layer."""
        return self.called is not None and layer not in self.called


def _is_new(layer: Anatomy) -> bool:
    """Whether nothing shows that the layer was trained. Updates that are counted do, updates that are not, do not."""
    if layer.affine_moved or (layer.has_running_statistics and not layer.untouched):
        return False
    return not layer.batches_tracked
