"""A monitor for the Trainer of Hugging Face."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import finalize

from torch import nn
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from bnprobe.errors import warn_user
from bnprobe.monitor.log import scalars
from bnprobe.monitor.monitor import Monitor


class HuggingFaceMonitor(TrainerCallback, ExportableState):
    """Runs a `bnprobe.Monitor` while a Trainer trains.

    The figures of samples and findings are in the Trainer's log history too. Its state is saved in the checkpoints of
    the Trainer, in trainer_state.json, and a resumed run goes on with it.

    A Trainer does not tell its callbacks that training raised: the monitor then stops with the next training, or when
    the Trainer is gone.

    Args:
        every: Optimizer steps from sample to sample.
        settings: The other arguments of `bnprobe.Monitor`.

    Attributes:
        monitor: The monitor of the last training; None before the first.

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[HuggingFaceMonitor(every=100)])
    """

    def __init__(self, every: int = 100, **settings: Any) -> None:
        self.monitor: Monitor | None = None
        self._settings = {"every": every, **settings}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Start, with the state of the checkpoint that the Trainer resumes, if any."""
        if self.monitor is not None:  # of a training that raised
            self.monitor.stop()
        if args.torch_compile:
            warn_user(
                "bnprobe does not watch this training: torch_compile=True compiles the model out of its sight. Give the"
                " Trainer a model that is compiled in parts, or not at all."
            )
            return
        log = self._settings.get("log")
        logs = [*(log if isinstance(log, list) else [log]), partial(_add_to_history, state)]
        model: nn.Module = given["model"]
        self.monitor = Monitor(model, **{**self._settings, "log": logs})
        self.monitor.step = state.global_step
        resumed: Any = state.stateful_callbacks if state.global_step else {}
        saved = resumed.get(type(self).__name__, {}).get("attributes", {}).get("saved")
        if saved is not None:
            self.monitor.load_state_dict(saved)
        self.monitor.start()
        finalize(self, self.monitor.stop).atexit = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Stop."""
        if self.monitor is not None:
            self.monitor.stop()

    def state(self) -> dict[str, Any]:
        """What the Trainer saves; arguments that are functions are no part of it."""
        plain = {name: value for name, value in self._settings.items() if isinstance(value, str | int | float | dict)}
        return {"args": plain, "attributes": {"saved": None if self.monitor is None else self.monitor.state_dict()}}


def _add_to_history(state: TrainerState, event: dict[str, Any]) -> None:
    if found := scalars(event):
        state.log_history.append({**found, "epoch": state.epoch, "step": event["step"]})
