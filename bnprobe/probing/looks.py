"""What the processes of a scan tell each other when they look at what is decided, and how a measurement ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from bnprobe.distributed import World
from bnprobe.errors import BnprobeError, DataError, DeviceError, ProcessError, UserCodeError
from bnprobe.probing.evidence import Sums
from bnprobe.probing.merge import merge_layer_sums
from bnprobe.records import StopReason

CAUGHT = (KeyboardInterrupt, UserCodeError, DataError, DeviceError)
"""What ends a measurement and keeps what there is, if there is anything."""


@dataclass(frozen=True)
class Ending:
    """How the measurement ended, as far as a process knows.

    Attributes:
        stopped: None: it has not.
        failure: The error that ended it, where that was this process's own.
        said: What the failing process says of it: message, exit code, and the user's frames.
    """

    stopped: StopReason | None = None
    failure: BnprobeError | None = None
    said: tuple[str, int, str] | None = None

    @property
    def early(self) -> bool:
        """Whether something went wrong."""
        return self.stopped in ("interrupted", "failed")

    @property
    def error(self) -> BnprobeError | None:
        """The failure, wherever it was."""
        return self.failure or (ProcessError(*self.said) if self.said else None)

    def portable(self) -> Ending:
        """What another process can be sent: the exception of a user's code may not be."""
        return replace(self, failure=None)


def ended_by(error: BaseException, world: World) -> Ending:
    """The end by one of ``CAUGHT``, of which the other processes are told: they stop measuring too."""
    world.halt()
    if not isinstance(error, BnprobeError):
        return Ending("interrupted")
    return Ending("failed", error, (str(error), error.exit_code, getattr(error, "frames", "")))


def together(endings: Sequence[Ending]) -> Ending:
    """How the measurement ended for all: by a failure, else by Ctrl-C, else with the data."""
    for stopped in ("failed", "interrupted", "data_exhausted"):
        for ending in endings:
            if ending.stopped == stopped:
                return ending
    return endings[0]


@dataclass(frozen=True)
class Look:
    """What was measured so far: micro-batches, and the mismatch of each layer by index, on the train and eval paths."""

    ending: Ending
    batches: int
    train: dict[int, Sums]
    eval: dict[int, Sums]


def meet(look: Look, world: World) -> Look:
    """What all processes know; every process must call this, and all get the same."""
    looks = world.gather(replace(look, ending=look.ending.portable()))
    return replace(reduce(_added, looks), ending=together([each.ending for each in looks]))


def _added(one: Look, other: Look) -> Look:
    train, eval_ = merge_layer_sums(one.train, other.train), merge_layer_sums(one.eval, other.eval)
    return Look(one.ending, one.batches + other.batches, train, eval_)
