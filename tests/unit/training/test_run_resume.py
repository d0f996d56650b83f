"""A run that was killed and resumed ends as one that was not: same bits, same log."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnprobe
from bnprobe.config.spec import RenormSpec
from bnprobe.errors import OutputError, StateError, StoppedError, UsageError
from bnprobe.loading.data import as_batch_source
from bnprobe.nn.batch_renorm import BatchRenorm1d
from bnprobe.records import Score, TrainingStep
from bnprobe.training import Job, train
from bnprobe.training.state import stop_signals
from support.finetuning import attempts, cross_entropy, eventful_job, job, network, same_bits, source, trained

KILLED = -signal.SIGKILL


def assert_the_same(killed: Path, whole: Path) -> None:
    expected, found = (torch.load(folder / "result", weights_only=True) for folder in (whole, killed))
    assert found["summary"] == expected["summary"]
    assert same_bits(found["weights"], expected["weights"])
    assert (killed / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that were not killed, by optimizer."""
    folders = {optimizer: tmp_path_factory.mktemp(optimizer) for optimizer in ("SGD", "AdamW")}
    for optimizer, folder in folders.items():
        assert attempts(folder, optimizer, "never:0") == [0]
    return folders


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_killed_at_any_moment(tmp_path: Path, whole: dict[str, Path], optimizer: str) -> None:
    """Between steps, and in the middle of writing: the first file that a run writes is the log, the next are states."""
    moments = ["step:1", "write:2", "step:6", "write:1", "step:3", "write:3"]
    assert attempts(tmp_path / "killed", optimizer, *moments, "never:0") == [*[KILLED] * 6, 0]
    assert_the_same(tmp_path / "killed", whole[optimizer])


def test_killed_at_random_moments(tmp_path: Path, whole: dict[str, Path]) -> None:
    chance = random.Random(1)
    moments = [f"time:{chance.randrange(20)}" for _ in range(6)]
    statuses = attempts(tmp_path / "killed", "SGD", *moments, "never:0")
    assert statuses[0] == KILLED
    assert_the_same(tmp_path / "killed", whole["SGD"])


def test_a_state_can_be_resumed_more_than_once(tmp_path: Path) -> None:
    """Even by a process that has drawn other random numbers before; and it is the model's own dropout that goes on."""
    expected, _ = trained(eventful_job("SGD"))
    path = tmp_path / "state"
    interrupted(eventful_job("SGD"), path, after=7)
    saved = path.read_bytes()
    for noise in (1, 50):
        path.write_bytes(saved)
        torch.rand(noise)
        random.random()
        found, steps = trained(eventful_job("SGD"), path)
        assert same_bits(found.weights, expected.weights)
        assert steps[0].step == 8


@pytest.mark.parametrize("after", [9, 12])
def test_what_the_run_remembers_goes_on(tmp_path: Path, after: int) -> None:
    """The best weights of before, and what was clipped; also where the state is of the very end."""

    def best_at_7(model: nn.Module) -> Score:
        return Score(None, -abs(float(model[1].num_batches_tracked) - 7))

    def made() -> Job:
        renorm = RenormSpec(r_max=1.1, d_max=0.1)
        return job(network(BatchRenorm1d), score=best_at_7, measure="metric", evaluate_every=1, renorm=renorm)

    expected, _ = trained(made())
    assert expected.best_step == 7
    interrupted(made(), tmp_path / "state", after)
    found, steps = trained(made(), tmp_path / "state")
    assert [step.step for step in steps] == list(range(after + 1, 13))
    for field in ("steps", "best_step", "ending", "note", "clipped_r", "clipped_d"):
        assert getattr(found, field) == getattr(expected, field)
    assert same_bits(found.weights, expected.weights)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_are_read_in_many_ways(tmp_path: Path, workers: int) -> None:
    def loaded() -> Any:
        return source(num_workers=workers, persistent_workers=workers > 0)

    expected, _ = trained(job(source=loaded(), steps=25))
    interrupted(job(source=loaded(), steps=25), tmp_path / "state", after=14)
    found, _ = trained(job(source=loaded(), steps=25), tmp_path / "state")
    assert same_bits(found.weights, expected.weights)


def test_a_list_of_batches(tmp_path: Path) -> None:
    def listed() -> Any:
        generator = torch.Generator().manual_seed(1)
        pairs = [(torch.randn(4, 6, generator=generator), torch.tensor([0, 1, 2, 0])) for _ in range(5)]
        return as_batch_source(pairs, 4)

    expected, _ = trained(job(source=listed()))
    interrupted(job(source=listed()), tmp_path / "state", after=8)
    assert same_bits(trained(job(source=listed()), tmp_path / "state")[0].weights, expected.weights)


def test_the_window_of_cross_iteration_layers_goes_on(tmp_path: Path) -> None:
    def made() -> Job:
        return job(bnprobe.convert(network(), to="cross-iteration", window=4, burn_in=3))

    expected, _ = trained(made())
    interrupted(made(), tmp_path / "state", after=7)
    found, steps = trained(made(), tmp_path / "state")
    assert steps[0].step == 8
    assert same_bits(found.weights, expected.weights)
    assert expected.weights["1.batches_seen"] == 12


def test_a_float16_scaler_goes_on(tmp_path: Path) -> None:
    half = {"autocast": torch.float16, "steps": 8}
    expected, _ = trained(job(**half))
    interrupted(job(**half), tmp_path / "state", after=5)
    assert same_bits(trained(job(**half), tmp_path / "state")[0].weights, expected.weights)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(
        StoppedError, match=rf"stopped by {number.name} after step 5 of 12\. .* with --resume to continue\."
    ):
        interrupted_by(job(), tmp_path / "state", 5, number)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    found, steps = trained(job(), tmp_path / "state")
    assert [step.step for step in steps] == list(range(6, 13))
    assert same_bits(found.weights, trained(job())[0].weights)


def test_a_second_ctrl_c_acts_at_once(tmp_path: Path) -> None:
    def on_step(step: TrainingStep) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(job(), state=tmp_path / "state", on_step=on_step)


def test_ctrl_c_reaches_the_loaders_processes_too(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            for process in [*multiprocessing.active_children()]:
                os.kill(process.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return cross_entropy(model, batch)

    calls = 0
    with pytest.raises(StoppedError, match="after step 3 of 12"):
        trained(job(loss=loss, source=source(num_workers=2)), tmp_path / "state")
    found, _ = trained(job(source=source(num_workers=2)), tmp_path / "state")
    assert same_bits(found.weights, trained(job(source=source(num_workers=2)))[0].weights)


def test_a_loaders_process_can_be_ended() -> None:
    forking = multiprocessing.get_context("fork")
    running = forking.Event()

    def work() -> None:
        running.set()
        time.sleep(60)

    with stop_signals() as stop:
        process = forking.Process(target=work)
        process.start()
        assert running.wait(30)  # Python forgets a signal that comes while it forks
        process.terminate()
        process.join(30)
    assert process.exitcode == -signal.SIGTERM
    assert stop.name == ""


def test_stopped_without_a_state() -> None:
    with pytest.raises(StoppedError, match="Nothing was saved"):
        interrupted_by(job(), None, 2, signal.SIGTERM)


def test_another_thread_trains_without_signals() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(trained(job())[0]))
    thread.start()
    thread.join()
    assert same_bits(found[0].weights, trained(job())[0].weights)


def test_the_state_of_another_run(tmp_path: Path) -> None:
    path = tmp_path / "state"
    interrupted(job(), path, after=4)
    with pytest.raises(StateError, match=r"to a different run: seed was 0 and is now 1; steps was 12 and is now 13"):
        trained(job(seed=1, steps=13), path)
    with pytest.raises(StateError, match=r"does not fit this run \(RuntimeError: .*Unexpected key"):
        trained(job(network(nn.Identity)), path)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no state"])
def test_a_damaged_state(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "state"
    interrupted(job(), path, after=4)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StateError, match=r"is damaged, or not the state .* Start over with --force\."):
        trained(job(), path)


def test_a_state_executes_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"version": 1, "run": Evil()}, tmp_path / "state")
    with pytest.raises(StateError, match="damaged"):
        trained(job(), tmp_path / "state")
    assert not (tmp_path / "executed").exists()


def test_a_state_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="could not be written"):
        trained(job(save_every=1), tmp_path / "missing" / "state")


def test_a_schedule_that_could_not_be_read_again(tmp_path: Path) -> None:
    class Mine(torch.optim.lr_scheduler.StepLR):
        def state_dict(self) -> dict[str, Any]:
            return {"me": Path("x")}

    with pytest.raises(UsageError, match=r"train\.schedule\.target: the state_dict\(\) of Mine contains"):
        trained(job(make_schedule=lambda made: Mine(made, 3)), tmp_path / "state")
    trained(job(make_schedule=lambda made: Mine(made, 3)))  # nothing is to be saved


def test_an_optimizer_without_a_state(tmp_path: Path) -> None:
    class Plain:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.parameters = parameters

        def step(self) -> None:
            with torch.no_grad():
                for parameter in self.parameters:
                    parameter -= 0.1 * parameter.grad

    with pytest.raises(UsageError, match=r"train\.optimizer\.target: Plain has no state_dict\(\)"):
        trained(job(make_optimizer=Plain), tmp_path / "state")
    _, steps = trained(job(make_optimizer=Plain))
    assert all(math.isnan(step.rate) for step in steps)


def interrupted(job: Job, path: Path, after: int) -> None:
    """Train until a step, then be told to stop."""
    with pytest.raises(StoppedError):
        interrupted_by(job, path, after, signal.SIGTERM)


def interrupted_by(job: Job, path: Path | None, after: int, number: signal.Signals) -> None:
    """Send this process a signal in the step after ``after - 1`` steps."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal sent
        value = job.loss(model, batch)
        if taken == after - 1 and not sent:
            sent = True
            os.kill(os.getpid(), number)
        return value

    taken, sent = 0, False

    def on_step(step: TrainingStep) -> None:
        nonlocal taken
        taken = step.step

    train(replace(job, loss=loss), state=path, on_step=on_step)
