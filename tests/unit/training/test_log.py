"""The log of steps: columns, what a resumed run replaces, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from bnprobe.errors import OutputError
from bnprobe.records import Score, TrainingStep
from bnprobe.training import StepLog


def step(number: int, arm: str = "batch-renorm", seed: int = 0, loss: float = 0.1) -> TrainingStep:
    score = Score(0.25, None) if number == 2 else None
    return TrainingStep(arm, seed, number, 9, loss, 1 / 3, None, 1.5, 0.5, 0.125, 0.0, score)


def written(path: Path, *steps: TrainingStep, tensorboard: bool = False) -> list[dict[str, str]]:
    log = StepLog(path, tensorboard)
    for each in steps:
        log.write(each)
    log.close()
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_columns_and_values(tmp_path: Path) -> None:
    rows = written(tmp_path / "log.csv", step(1), step(2))
    assert rows[1] == {
        "arm": "batch-renorm",
        "seed": "0",
        "step": "2",
        "steps": "9",
        "loss": "0.1",
        "rate": "0.3333333333333333",
        "gradient_norm": "",
        "r_max": "1.5",
        "d_max": "0.5",
        "clipped_r": "0.125",
        "clipped_d": "0.0",
        "evaluation_loss": "0.25",
        "evaluation_metric": "",
    }
    assert rows[0]["evaluation_loss"] == ""


def test_a_row_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.csv")
    log.write(step(1))
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2
    log.close()


def test_a_resumed_run_replaces_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    written(path, step(1, "BN"), step(1), step(2), step(3), step(4))
    with path.open("a") as file:
        file.write("batch-renorm,0,5,9,0.")  # killed in the middle of a row
    rows = written(path, step(3, loss=7.0), step(4, loss=8.0))
    assert [(row["arm"], row["step"], row["loss"]) for row in rows] == [
        ("BN", "1", "0.1"),
        ("batch-renorm", "1", "0.1"),
        ("batch-renorm", "2", "0.1"),
        ("batch-renorm", "3", "7.0"),
        ("batch-renorm", "4", "8.0"),
    ]


def test_other_seeds_are_other_runs(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    written(path, step(1), step(2))
    assert [row["seed"] for row in written(path, step(1, seed=1))] == ["0", "0", "1"]


def test_names_with_commas(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    written(path, step(1, 'a "b", c'))
    assert [row["arm"] for row in written(path, step(2, 'a "b", c'))] == ['a "b", c'] * 2


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("precious\n")
    with pytest.raises(OutputError, match=r"is not a log of this version of bnprobe: move it away"):
        StepLog(path)
    assert path.read_text() == "precious\n"


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="could not be written"):
        StepLog(tmp_path / "missing" / "log.csv")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_others_have_at_the_place_of_the_events(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "log")
    with pytest.raises(OutputError, match=r"log was not made by bnprobe: move it, or"):
        StepLog(tmp_path / "log.csv", tensorboard=True)
    written(tmp_path / "log.csv", step(1))  # it is in nobody's way


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written(tmp_path / "log.csv", step(1), step(2), step(3), tensorboard=True)
    written(tmp_path / "log.csv", step(3, loss=7.0), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "log" / "batch-renorm-seed-0"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, pytest.approx(0.1)),
        (2, pytest.approx(0.1)),
        (3, pytest.approx(7.0)),
    ]
    assert [event.step for event in events.Scalars("evaluation_loss")] == [2]
