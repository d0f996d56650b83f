"""What healthy samples look like at the input of the norm layers, and how far others are from them."""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.records.base import SCHEMA_VERSION, Environment, Record, Tool
from bnprobe.records.document import Document
from bnprobe.records.layers import SkippedLayer


@dataclass(frozen=True)
class ProfiledLayer(Record):
    """What healthy samples look like in one call of a layer.

    The position of a sample in a channel is (m - mu) / s, with m its mean and mu and s the running mean and standard
    deviation; its extent is log(1 + q), with q its mean square around mu, over s squared.

    Attributes:
        call: Which call of the layer in a forward pass, from 0.
        position, position_spread: Mean and standard deviation over samples, of each channel.
        extent, extent_spread: The same of the extent.
        scores: Of blocks of other samples than these: the mean over channels of z squared, of position and extent.
    """

    name: str
    call: int
    channels: int
    position: tuple[float, ...]
    position_spread: tuple[float, ...]
    extent: tuple[float, ...]
    extent_spread: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Profile(Document):
    """What healthy samples look like in a model, for a monitor to compare others with.

    Attributes:
        checkpoint: The weights file, if one was given.
        statistics: Digest of the running statistics, by which the model is known again.
        data: Where the samples come from.
        block: Samples in a block.
        described: Samples that positions and extents were taken of.
        blocks: Blocks that have a score, of other samples.
        notes: What the reader should know, a sentence each.

    Example:
        >>> profile = bnprobe.profile(model, loader, block=2)
        >>> profile.save("profile.json")
        >>> bnprobe.Profile.load("profile.json") == profile
        True
    """

    tool: Tool
    environment: Environment
    model: str
    checkpoint: str | None
    statistics: str
    data: str
    seed: int
    block: int
    described: int
    blocks: int
    layers: tuple[ProfiledLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class ChannelDrift(Record):
    """How far a channel has moved, in standard deviations of healthy samples: its position, and its extent."""

    channel: int
    position: float
    extent: float


@dataclass(frozen=True)
class LayerDrift(Record):
    """One call of a layer, against the profile.

    Attributes:
        call: Which call of the layer in a forward pass, from 0.
        samples: Samples seen.
        e_value: Evidence that they are not like those of the profile.
        moved: The layer is among those that moved, at a false discovery rate of ``alpha``.
        since: So many samples ago it seems to have begun; None: nothing speaks for that.
        position, extent: Root mean square over channels of how far they moved since then (lately, where ``since`` is
            None), in standard deviations of samples, without what chance makes of that.
        channels: Those that moved farthest, farthest first.
    """

    name: str
    call: int
    samples: int
    e_value: float
    moved: bool
    since: int | None
    position: float
    extent: float
    channels: tuple[ChannelDrift, ...]


@dataclass(frozen=True, repr=False)
class DriftReport(Document):
    """What a monitor saw in service, against a profile.

    Attributes:
        data: Where the samples come from; None: a monitor saw them.
        alpha: The probability of an alarm in a stream of any length that is like the profile.
        e_value: Evidence that the stream is not, the mean over layers; an alarm is raised once it is 1 / alpha.
        alarm: Samples seen when the alarm was raised; None: there is none.
        samples: Samples seen.
        batches: Batches that they are from.
        left_out: Batches that could not be judged: not every layer of the profile saw a row for each sample.
        notes: What the reader should know, a sentence each.

    Example:
        >>> with bnprobe.ShiftMonitor(model.eval(), bnprobe.profile(model, loader, block=2), every=1) as monitor:
        ...     for pixels, _ in loader:
        ...         _ = model(pixels)
        >>> report = monitor.summary()
        >>> report.alarm is None, report.ok
        (True, True)
    """

    tool: Tool
    model: str
    data: str | None
    alpha: float
    e_value: float
    alarm: int | None
    samples: int
    batches: int
    left_out: int
    block: int
    layers: tuple[LayerDrift, ...]
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION
