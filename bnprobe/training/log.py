"""A log of training that other tools can read: always CSV, on request also TensorBoard."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnprobe.errors import OutputError
from bnprobe.files import OwnFolder, write_whole
from bnprobe.records import TrainingStep

COLUMNS: dict[str, Callable[[TrainingStep], Any]] = {
    "arm": lambda step: step.arm,
    "seed": lambda step: step.seed,
    "step": lambda step: step.step,
    "steps": lambda step: step.steps,
    "loss": lambda step: step.loss,
    "rate": lambda step: step.rate,
    "gradient_norm": lambda step: step.gradient_norm,
    "r_max": lambda step: step.r_max,
    "d_max": lambda step: step.d_max,
    "clipped_r": lambda step: step.clipped_r,
    "clipped_d": lambda step: step.clipped_d,
    "evaluation_loss": lambda step: None if step.score is None else step.score.loss,
    "evaluation_metric": lambda step: None if step.score is None else step.score.metric,
}
"""Columns of the CSV file. Numbers are written with full precision; a value that was not measured is empty."""

_NOT_VALUES = ("arm", "seed", "step", "steps")
_EVENTS = ".bnprobe"
"""Suffix of the TensorBoard files that bnprobe writes, to tell them from other files."""


class StepLog:
    """Appends a row to a CSV file for every optimizer step, and on request writes the same values for TensorBoard.

    A resumed run repeats some steps: rows of the same run from its first step on are replaced, and so is a row that was
    cut off. A run that was killed and resumed therefore has the same file as one that was not.

    Args:
        path: The CSV file; existing rows are kept.
        tensorboard: Whether to write TensorBoard files too, to a folder of the same name; it must be installed.

    Raises:
        OutputError: The file or folder cannot be written, or is not such a log.
    """

    def __init__(self, path: Path, tensorboard: bool = False) -> None:
        self._path = path
        self._begun: set[tuple[str, int]] = set()
        self._board = _Board(event_folder(path)) if tensorboard else None
        self._cut(lambda row: True)
        self._file = _opened(path)

    def write(self, step: TrainingStep) -> None:
        """Append a step and pass it to the operating system, so that no step is lost if the process is killed."""
        run = (step.arm, step.seed)
        if run not in self._begun:
            self._begun.add(run)
            self._begin(step)
        try:
            csv.writer(self._file, lineterminator="\n").writerow([column(step) for column in COLUMNS.values()])
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self._path} could not be written: {error.strerror or error}.") from None
        if self._board is not None:
            self._board.write(step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _begin(self, step: TrainingStep) -> None:
        """Remove rows of this run from this step on, which a killed process wrote."""
        run = [step.arm, str(step.seed)]
        self._file.close()
        self._cut(lambda row: row[:2] != run or int(row[2]) < step.step)
        self._file = _opened(self._path)

    def _cut(self, keep: Callable[[list[str]], bool]) -> None:
        """Keep the header and the rows for which ``keep`` is true."""
        lines = _lines(self._path)
        header = _line(list(COLUMNS))
        if lines and lines[0] != header:
            raise OutputError(f"{self._path} is not a log of this version of bnprobe: move it away.")
        rows = [line for line in lines[1:] if _is_whole(line) and keep(_fields(line))]
        if lines != [header, *rows]:
            write_whole(self._path, header + "".join(rows))


def is_step_log(path: Path) -> bool:
    """Whether a file is such a CSV log, by its header."""
    header = _line(list(COLUMNS)).encode()
    try:
        if not path.is_file():  # reading a pipe would wait
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header
    except OSError:
        return False


def event_folder(log: Path) -> OwnFolder:
    """The folder of TensorBoard files that belongs to a CSV log: ``out.log`` for ``out.log.csv``."""
    return OwnFolder(log.with_suffix(""), rf"[^/]+-seed-[^/]+/events\.out\.tfevents\.[^/]+{re.escape(_EVENTS)}")


class _Board:
    """Writes TensorBoard files, one folder per run."""

    def __init__(self, folder: OwnFolder) -> None:
        folder.make()
        self._folder = folder.path
        self._writers: dict[tuple[str, int], Any] = {}

    def write(self, step: TrainingStep) -> None:
        writer = self._writers.get((step.arm, step.seed)) or self._open(step)
        for name, column in COLUMNS.items():
            value = None if name in _NOT_VALUES else column(step)
            if value is not None:
                writer.add_scalar(name, value, step.step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _open(self, step: TrainingStep) -> Any:
        """Open a writer that hides older events from this step on, because a resumed run repeats these steps."""
        from torch.utils.tensorboard import SummaryWriter  # only where it is installed

        name = f"{step.arm} seed {step.seed}".replace(" ", "-")
        writer = SummaryWriter(str(self._folder / name), purge_step=step.step, filename_suffix=_EVENTS)
        self._writers[step.arm, step.seed] = writer
        return writer


def _opened(path: Path) -> io.TextIOWrapper:
    try:
        return path.open("a", encoding="utf-8", newline="")
    except OSError as error:
        raise OutputError(f"{path} could not be opened: {error.strerror or error}.") from None


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        return path.read_bytes().decode().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path} could not be read: {error}.") from None


def _line(values: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _fields(line: str) -> list[str]:
    return next(csv.reader([line]))


def _is_whole(line: str) -> bool:
    fields = _fields(line) if line.endswith("\n") else []
    return len(fields) == len(COLUMNS) and fields[2].isdigit()
