"""Where a monitor writes what it sees: a file of JSON lines, TensorBoard, Weights & Biases, or a function.

`LogReader` reads the file again, also while it grows.
"""

from __future__ import annotations

import errno
import json
import math
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from io import FileIO
from os import PathLike
from pathlib import Path
from typing import Any

from bnprobe.errors import OutputError, UsageError, reason_of
from bnprobe.files import make_folder, try_lock
from bnprobe.numbers import finite_or_none
from bnprobe.paths import is_file, is_folder, real
from bnprobe.records import LayerSample, ModeLoss, MonitorChange, MonitorFinding, MonitorLog, MonitorSample

Sink = Callable[[dict[str, Any]], None]
"""Takes an event: a dictionary of plain values with the keys ``event``, one of ``start``, ``sample``, ``alarm``,
``finding`` and ``change``, and ``step``; the others are the fields of `MonitorSample`, `MonitorFinding` and
`MonitorChange`, and of an alarm its ``series``: the layers that raised it, "loss", "updates" or "inputs"."""

FILE = "monitor.jsonl"
"""The file in a folder that was given as the log."""


def sink_of(log: Any) -> Sink:
    """What takes events, made of what a user gave.

    Args:
        log: A path, of a folder or of a file that ends in .jsonl; an object with ``add_scalar``, as a SummaryWriter;
            one with ``log``, as a run of Weights & Biases; or a function.

    Raises:
        UsageError: It is none of these.
        OutputError: The file cannot be written.
    """
    if isinstance(log, str | PathLike):
        return Lines(Path(log))
    if callable(getattr(log, "add_scalar", None)):
        return partial(_add_scalars, log)
    if callable(getattr(log, "log", None)):
        return partial(_log_scalars, log)
    if callable(log):
        return log  # type: ignore[no-any-return]
    raise UsageError(
        f"log={log!r} is nothing that a monitor can write to: give a path, a SummaryWriter, a run of Weights & Biases,"
        " a function that takes a dictionary, or a list of these."
    )


def _add_scalars(writer: Any, event: dict[str, Any]) -> None:
    for name, value in scalars(event).items():
        writer.add_scalar(name, value, event["step"])


def _log_scalars(run: Any, event: dict[str, Any]) -> None:
    if found := scalars(event):
        run.log(found, step=event["step"])


def event_of(record: MonitorSample | MonitorFinding) -> dict[str, Any]:
    """A record as an event; what is not finite is None."""
    found: dict[str, Any] = finite_or_none(asdict(record))
    return {"event": "sample" if isinstance(record, MonitorSample) else "finding", **found}


def scalars(event: dict[str, Any]) -> dict[str, float]:
    """The numbers of an event by names as plots have them, e.g. ``bnprobe/n_eq/layer1.0.bn1``; 1 marks a finding."""
    if event["event"] == "finding":
        return {f"bnprobe/finding/{event['rule']}": 1.0}
    if event["event"] != "sample":
        return {}
    found = {"bnprobe/output": event["output"]}
    for mode, value in (event["loss"] or {}).items():
        found[f"bnprobe/loss/{mode}"] = value
    for name, layer in event["layers"].items():
        found[f"bnprobe/n_eq/{name}"] = layer["equivalent_batch_size"]
        found[f"bnprobe/D/{name}"] = layer["mismatch"]
    return {name: value for name, value in found.items() if value is not None}


class Lines:
    """Appends a line to a file for every event, passed to the operating system at once.

    From the first event on until ``close`` the file is this monitor's: another one is refused, also of another process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path if path.suffix == ".jsonl" else path / FILE
        make_folder(self.path.parent)
        self._place = real(self.path)  # wherever the process goes later
        self._file: FileIO | None = None
        with self._writing():
            self._place.open("ab").close()

    def __call__(self, event: dict[str, Any]) -> None:
        line = f"{json.dumps(event, allow_nan=False, ensure_ascii=False)}\n".encode(errors="replace")
        with self._writing():
            if self._file is not None and not os.path.samestat(os.fstat(self._file.fileno()), self._place.stat()):
                self.close()  # another file is in its place
            if self._file is None:
                self._open()
            assert self._file is not None
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Let go of the file; the next event takes it again."""
        if self._file is not None:
            self._file.close()
            self._file = None
            _in_use.discard(self._place)

    def _open(self) -> None:
        """Take the file, and begin a line: the last one may have been cut off, by a full disk or the end of a run."""
        file = FileIO(self._place, "a+")
        if self._place in _in_use or try_lock(file) is False:
            file.close()
            raise OutputError(
                f"Another monitor writes to {self.path}. Give each a folder of its own, or wait for its end."
            )
        self._file = file
        _in_use.add(self._place)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {reason_of(error)}.") from None


_in_use: set[Path] = set()
"""The files that monitors of this process write to."""


# --- Reading ----------------------------------------------------------------------------------------------------------

_LONGEST_LINE = 50_000_000
"""Bytes; a sample of 10,000 layers has 2 million."""

_MOST_SAMPLES = 2000
"""Of more, every second one is left out, and so on."""


def is_log(path: Path) -> bool:
    """Whether a path is that of a log, by its name: a folder, or a file that ends in .jsonl."""
    return path.suffix == ".jsonl" or is_folder(path)


def read_log(path: Path) -> MonitorLog:
    """What a log says so far.

    Raises:
        UsageError: There is no such log, or it cannot be read.
    """
    reader = LogReader(path)
    reader.update()
    return reader.log


class LogReader:
    """Reads the file of a log, and what is appended to it.

    A run that is resumed does steps again that its log has already: what was logged of them before is left out. What
    cannot be read, as a line that was cut off when a process was killed, is counted; a last line without its end is
    one that is still being written.

    Args:
        path: The file, or the folder with `FILE`.

    Attributes:
        log: What was read so far.

    Raises:
        UsageError: There is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._path = _log_in(path)
        self._begin()

    def _begin(self) -> None:
        self.log = MonitorLog(str(self._path))
        self._read, self._file = 0, 0
        self._steps = array("q")  # of all samples
        self._samples: list[MonitorSample] = []
        self._number, self._stride, self._is_spare = 0, 1, False
        self._findings: list[MonitorFinding] = []
        self._changes: list[MonitorChange] = []

    def update(self) -> bool:
        """Read on; whether there was anything new.

        Raises:
            UsageError: The file cannot be read, or is no log of a monitor.
        """
        try:
            with self._path.open("rb") as file:
                found = self._path.stat()
                if found.st_size < self._read or self._file not in (0, found.st_ino):  # another one is in its place
                    self._begin()
                self._file = found.st_ino
                before = file.seek(self._read)
                while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
                    self._take(line)
                    self._read += len(line)
        except OSError as error:
            raise UsageError(f"{self._path} could not be read: {reason_of(error)}.") from None
        if len(line) == _LONGEST_LINE:
            raise UsageError(f"{self._path} is no log of a monitor: it has a line of more than 50 MB.")
        self.log = replace(
            self.log,
            taken=len(self._steps),
            samples=tuple(self._samples),
            findings=tuple(self._findings),
            changes=tuple(self._changes),
        )
        return self._read > before

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            kind = event["event"]
            if kind == "start":
                self._start(event)
            elif not self.log.version:
                raise ValueError
            elif kind == "sample":
                self._add(_sample(event))
            elif kind == "finding":
                self._findings.append(_finding(event))
            elif kind == "change":
                change = MonitorChange(_count(event["step"]), _text(event["action"]), _names(event["layers"]))
                self._changes.append(change)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            if not self.log.version:
                text = f'{self._path} is no log of a monitor: its first line is none with "event": "start".'
                raise UsageError(text) from None
            self.log = replace(self.log, unreadable=self.log.unreadable + 1)

    def _add(self, sample: MonitorSample) -> None:
        """Keep every ``_stride``th sample, and the last one."""
        self._steps.append(sample.step)
        if self._is_spare:
            self._samples.pop()
        self._samples.append(sample)
        self._is_spare = self._number % self._stride != 0
        if not self._is_spare and len(self._samples) > _MOST_SAMPLES:
            self._samples = self._samples[::2]
            self._stride *= 2
        self._number += 1

    def _start(self, event: dict[str, Any]) -> None:
        step = _count(event["step"])
        self.log = replace(
            self.log,
            version=_text(event["version"]),
            model=_text(event["model"]),
            every=_count(event["every"]),
            step=step if self.log.version else 0,
            skipped={_text(name): _text(reason) for name, reason in event["skipped"].items()},
        )
        self._steps = array("q", (taken for taken in self._steps if taken < step))
        self._samples = [sample for sample in self._samples if sample.step < step]
        self._number, self._is_spare = 0, False
        self._findings = [finding for finding in self._findings if finding.step < step]
        self._changes = [change for change in self._changes if change.step < step]


def _log_in(path: Path) -> Path:
    if not is_folder(path):
        if is_file(path):
            return path
        raise UsageError(f"{path} is neither the log of a monitor, a file of JSON lines, nor a folder with {FILE}.")
    if is_file(path / FILE):
        return path / FILE
    below = sorted(path.glob(f"*/{FILE}"))
    hint = f" Did you mean {below[0].parent}?" if below else " bnprobe.Monitor(model, log=...) writes one."
    raise UsageError(f"The folder {path} has no {FILE}.{hint}")


def _sample(event: dict[str, Any]) -> MonitorSample:
    layers = {
        _text(name): LayerSample(
            _figure(layer["mismatch"]),
            None if layer["equivalent_batch_size"] is None else _figure(layer["equivalent_batch_size"]),
            _figure(layer["r"]),
            _figure(layer["d"]),
            layer.get("frozen") is True,
        )
        for name, layer in event["layers"].items()
    }
    samples, output, loss = (event[name] for name in ("samples", "output", "loss"))
    return MonitorSample(
        _count(event["step"]),
        None if samples is None else _count(samples),
        None if output is None else _figure(output),
        None if loss is None else ModeLoss(_figure(loss["train"]), _figure(loss["eval"])),
        layers,
    )


def _finding(event: dict[str, Any]) -> MonitorFinding:
    read: dict[str, Any] = {name: _count(event[name]) for name in ("step", "alarm")}
    words = ("rule", "cause", "severity", "message", "remedy")
    read |= {name: _text(event[name]) for name in words}
    return MonitorFinding(**read, layers=_names(event["layers"]))


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(value)
    return tuple(_text(name) for name in value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise TypeError(value)
    return value


def _figure(value: Any) -> float:
    """A number; what was not finite is null in JSON."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(value)
    return float(value)
