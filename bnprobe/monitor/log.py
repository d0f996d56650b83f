"""Where a monitor writes what it sees: a file of JSON lines, TensorBoard, Weights & Biases, or a function."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from bnprobe.errors import OutputError, UsageError
from bnprobe.files import make_folder
from bnprobe.records import MonitorFinding, MonitorSample

Sink = Callable[[dict[str, Any]], None]
"""Takes an event: a dictionary of plain values with the keys ``event``, one of ``start``, ``sample`` and ``finding``,
and ``step``; the others are the fields of `MonitorSample` and `MonitorFinding`."""

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
        return _Lines(Path(log))
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
    found: dict[str, Any] = _plain(asdict(record))
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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Lines:
    """Appends a line to a file for every event, passed to the operating system at once."""

    def __init__(self, path: Path) -> None:
        self.path = path if path.suffix == ".jsonl" else path / FILE
        make_folder(self.path.parent)
        self({})

    def __call__(self, event: dict[str, Any]) -> None:
        text = f"{json.dumps(event, allow_nan=False, ensure_ascii=False)}\n" if event else ""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error.strerror or error}.") from None
