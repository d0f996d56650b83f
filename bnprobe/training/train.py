"""Train a model as a job says; a resumed run gives the same result as an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import nn

from bnprobe.distributed import ALONE, World
from bnprobe.errors import StoppedError
from bnprobe.nn.batch_renorm import watch_clipping
from bnprobe.probing.session import held_in_eval, model_code
from bnprobe.randomness import preserved_random_state, seed_everything
from bnprobe.records import TrainingStep
from bnprobe.training.evaluate import preserved_training_flags
from bnprobe.training.job import Job, Outcome, check, length_of
from bnprobe.training.running import Running
from bnprobe.training.state import load_state, save_state
from bnprobe.training.stopping import StopFlag, stop_signals
from bnprobe.training.streams import model_seed


def train(job: Job, *, state: Path | None, on_step: Callable[[TrainingStep], None], world: World = ALONE) -> Outcome:
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
    check(job)
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
                model.train()
            for module in held:
                module.training = False
            yield
        finally:
            for parameter in model.parameters():
                parameter.grad = None
