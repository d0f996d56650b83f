"""Train one model: a loop over steps that can be stopped at any of them, killed, and resumed to the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.config.spec import RenormSpec
from bnprobe.distributed import ALONE, World
from bnprobe.errors import StateError, StoppedError
from bnprobe.measure.restore import (
    held_in_eval,
    preserved_random_state,
    preserved_training_flags,
    seed_everything,
    set_mode,
)
from bnprobe.measure.session import model_code
from bnprobe.nn.batch_renorm import BatchRenormBase, watch_clipping
from bnprobe.nn.limits import RenormSchedule
from bnprobe.records import Ending, Score, TrainingStep
from bnprobe.training.data import Feed, model_seed, random_snapshot, restore
from bnprobe.training.job import (
    ClippedAtEnd,
    CurveOfRun,
    DivergenceGuard,
    Fractions,
    Job,
    Keeper,
    Length,
    TrainingOutcome,
    check_job,
    first_non_finite,
    length_of,
)
from bnprobe.training.replicas import Replicas
from bnprobe.training.state import StopFlag, load_state, require_resumable, save_state, stop_signals
from bnprobe.training.step import Stepper


def train(
    job: Job, *, state: Path | None, on_step: Callable[[TrainingStep], None], world: World = ALONE
) -> TrainingOutcome:
    """Train the job's model in place. Its training flags and the random state are restored.

    Args:
        job: What to train, and how.
        state: State file of the run: read if it exists, written every ``save_every`` steps and when training is
            stopped; all processes must see the same file. None: nothing is saved.
        on_step: Called after every step, in the first process.
        world: The processes that train together; all of them must call this.

    Raises:
        UsageError: The job cannot work.
        StateError: ``state`` is damaged or belongs to another run.
        StoppedError: Training was stopped by SIGTERM or Ctrl-C; the state is saved.
        DataError, UserCodeError, DeviceError: The data or the user's code failed.
        OutputError: The state could not be written.
    """
    check_job(job)
    length = length_of(job.spec, job.source, world)
    with preserved_random_state(), torch.enable_grad(), _in_training(job.model), stop_signals() as stop:
        seed_everything(model_seed(job.seed, world.rank))
        run = Running(job, length, world)
        with closing(run), watch_clipping(job.model) as watch, run.replicas.watching():
            _begin(run, state, world)
            while run.ending is None:
                step, stopped = run.advance(watch.read, stop)
                if world.is_main:
                    on_step(step)
                stopped = stopped or (world.size == 1 and bool(stop.name))  # signalled while the step was evaluated
                _keep_state(run, state, stopped)
                if stopped:
                    raise StoppedError(_stopped(run, state, stop))
        return run.outcome()


def _begin(run: Running, state: Path | None, world: World) -> None:
    resumes = state is not None and state.exists()
    if state is not None and any(world.gather(resumes)):
        run.load_state_dict(load_state(state, run.identity), state)
    else:
        run.evaluate_start(resumable=state is not None)


def _keep_state(run: Running, path: Path | None, stopped: bool) -> None:
    """Save the state; not of a run that has diverged, because its last step was not taken."""
    due = run.ending is None and run.step % run.job.spec.save_every == 0
    if path is None or run.ending == "diverged" or not (due or stopped):
        return
    state = run.state_dict()
    if run.world.is_main:
        save_state(path, run.identity, state)


def _stopped(run: Running, state: Path | None, stop: StopFlag) -> str:
    by = f"by {stop.name}" if stop.name else "in another process"
    kept = (
        "Nothing was saved." if state is None else "Its state is saved: run the same command with --resume to continue."
    )
    job, steps = run.job, run.length.steps
    return f"Training of {job.arm} (seed {job.seed}) was stopped {by} after step {run.step} of {steps}. {kept}"


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Train mode, except for modules that the user keeps in eval mode; restores the flags and clears the gradients."""
    held = held_in_eval(model)
    with preserved_training_flags(model):
        try:
            with model_code("calling model.train()"):
                set_mode(model, True, held)
            yield
        finally:
            for parameter in model.parameters():
                parameter.grad = None


class Running:
    """A run in progress. The model is already in train mode and is moved to the job's device.

    Args:
        job: The run's settings.
        length: The run's length.
        world: The processes that train together.

    Attributes:
        replicas: The model, in this process and others.
        step: Optimizer steps taken.
        ending: How the run ended; None: it has not ended.
    """

    def __init__(self, job: Job, length: Length, world: World) -> None:
        job.model.to(job.device)
        self.job, self.length, self.world = job, length, world
        self.replicas = Replicas(job.model, job.device, world)
        self.step = 0
        self.ending: Ending | None = None
        self._note = ""
        self._feed = Feed(job.source, job.seed, job.spec.accumulate, world, job.kept)
        self._stepper = Stepper(job, self.replicas)
        self._renorm = _attached(job.renorm, job.model, length)
        self._keeper = Keeper(job.measure, job.goal, job.spec.patience)
        self._guard = DivergenceGuard()
        self._clipped = ClippedAtEnd(length.steps)
        self._curve = CurveOfRun(length)
        self._batch_renorms = [module for module in job.model.modules() if isinstance(module, BatchRenormBase)]
        self._spent, self._began = 0.0, time.monotonic()

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies this run: a saved state must match it."""
        arm, seed, steps = self.job.arm, self.job.seed, self.length.steps
        return {"arm": arm, "seed": seed, "steps": steps, "processes": self.world.size}

    def evaluate_start(self, resumable: bool) -> None:
        """Evaluate the weights before the first step.

        Args:
            resumable: Whether the run will be saved, so that it must be checked that it can be.

        Raises:
            UsageError: The optimizer or the schedule cannot be saved.
        """
        if resumable:
            require_resumable("optimizer", self._stepper.optimizer)
            require_resumable("schedule", self._stepper.schedule)
        score = self._score()
        self._keeper.note(0, self.job.model, score)
        self._curve.note(0, score)

    def advance(self, read_clipped: Callable[[], Fractions | None], stop: StopFlag) -> tuple[TrainingStep, bool]:
        """Take one optimizer step, evaluate if due, and return the step and whether any process was told to stop.

        Args:
            read_clipped: Returns the fractions that Batch Renorm clipped since the last call.
            stop: Whether this process was told to stop.
        """
        number, rate, limits = self.step + 1, self._stepper.rate, self._limits()
        group = self._feed.next_group()
        loss, clipped, stopped = self._joined(self._stepper.losses(group, number), read_clipped(), stop)
        self._clipped.add(clipped)
        self._curve.add(number, loss)
        norm, score, problem = None, None, self._guard.of_loss(loss)
        if problem is None:
            taken = self._stepper.apply(number)
            self.replicas.sync_buffers()
            norm, problem = taken.gradient_norm, taken.problem or self._guard.of_step(taken.skipped)
        if problem is None:
            score = self._finish(number)
        else:
            self._diverge(number, problem, group, math.isfinite(loss))
        figures = (loss, rate, norm, *limits, *(clipped or (None, None)), score)
        return TrainingStep(self.job.arm, self.job.seed, number, self.length.steps, *figures), stopped

    def close(self) -> None:
        """Release the data."""
        self._feed.close()

    def outcome(self) -> TrainingOutcome:
        """The result of the run, once it has ended."""
        assert self.ending is not None  # called only after the end
        keeper = self._keeper
        if self.ending == "finished" and not keeper.chose:
            keeper.keep_last(self.step, self.job.model)
        r, d = self._clipped.mean(self.step) or (None, None)
        seconds = self._spent + time.monotonic() - self._began
        curve = self._curve.curve(self.step)
        return TrainingOutcome(self.step, keeper.step, self.ending, self._note, seconds, r, d, keeper.weights, curve)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, as tensors and plain types; every process must call this."""
        model = self.job.model
        return {
            "step": self.step,
            "position": (self._feed.epoch, self._feed.used),
            "model": model.state_dict(),
            "buffers": _unsaved_buffers(model),
            "stepper": self._stepper.state_dict(),
            "renorm": None if self._renorm is None else self._renorm.state_dict(),
            "keeper": self._keeper.state_dict(),
            "guard": self._guard.state_dict(),
            "clipped": self._clipped.state_dict(),
            "curve": self._curve.state_dict(),
            "seconds": self._spent + time.monotonic() - self._began,
            "random": self.world.gather(random_snapshot()),
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Continue from a state read from ``path``.

        Raises:
            StateError: The state does not fit this run.
        """
        try:
            self._load(state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            found = " ".join(str(error).split())
            raise StateError(
                f"{path} does not fit this run ({type(error).__name__}: {found}). Resume with the original settings, or"
                " start over with --force."
            ) from error
        self._feed.go_to(*state["position"])
        restore(state["random"][self.world.rank])
        self._set_ending()

    def _load(self, state: dict[str, Any]) -> None:
        model = self.job.model
        model.load_state_dict(state["model"])
        for name, buffer in _unsaved_buffers(model).items():
            buffer.copy_(state["buffers"][name])
        self._stepper.load_state_dict(state["stepper"])
        if self._renorm is not None:
            self._renorm.load_state_dict(state["renorm"])
        self._keeper.load_state_dict(state["keeper"])
        self._guard.load_state_dict(state["guard"])
        self._clipped.load_state_dict(state["clipped"])
        self._curve.load_state_dict(state["curve"])
        self.step, self._spent = state["step"], state["seconds"]

    def _joined(self, loss: float, clipped: Fractions | None, stop: StopFlag) -> tuple[float, Fractions | None, bool]:
        """Means over the processes, and whether any of them is to stop, so that all decide alike."""
        loss, r, d, stopping = self.replicas.mean([loss, *(clipped or (0.0, 0.0)), float(bool(stop.name))])
        return loss, (r, d) if clipped else None, stopping > 0

    def _finish(self, number: int) -> Score | None:
        """Finish a step: advance the limits, evaluate the weights if due, and decide whether the run ends."""
        self.step = number
        if self._renorm is not None:
            self._renorm.advance()
        score = None
        if self.length.evaluates(number):
            score = self._score()
            self._keeper.note(number, self.job.model, score)
            self._curve.note(number, score)
        self._set_ending()
        return score

    def _set_ending(self) -> None:
        if self.step == self.length.steps:
            self.ending = "finished"
        elif self._keeper.exhausted:
            self.ending = "early_stop"

    def _diverge(self, number: int, problem: str, group: Sequence[Any], finite: bool) -> None:
        self.ending = "diverged"
        where = "" if finite else f" {self._where(group)}"
        self._note = (
            f"Diverged in step {number}: {problem}.{where} The weights of step {self._keeper.step} are kept."
            " Use a smaller learning rate, or clip the gradient (train.clip_norm)."
        )

    def _where(self, group: Sequence[Any]) -> str:
        job = self.job
        found = self.world.gather(first_non_finite(job.model, job.loss, group, job.device, job.autocast))
        layer = next((name for name in found if name is not None), None)
        if layer is None:
            return "The inputs of all norm layers are finite: check the layers after the last norm layer, and the loss."
        return f"The first norm layer with NaN or Inf in its input is {layer}."

    def _limits(self) -> tuple[float, float] | tuple[None, None]:
        """Current limits, read from the first Batch Renorm layer."""
        first = next(iter(self._batch_renorms), None)
        return (None, None) if first is None else (first.r_max, first.d_max)

    def _score(self) -> Score | None:
        """The score of the first process, in every process, so that all decide alike."""
        if self.job.score is None:
            return None
        return self.world.gather(self.job.score(self.job.model))[0]


def _attached(spec: RenormSpec | None, model: nn.Module, length: Length) -> RenormSchedule | None:
    """The schedule of the limits, attached to the model's Batch Renorm layers."""
    if spec is None:
        return None
    schedule = RenormSchedule(length.steps, **spec.model_dump(exclude={"momentum"}))
    schedule.attach(model)
    return schedule


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that the state_dict does not include."""
    saved = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}
