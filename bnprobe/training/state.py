"""The state from which a stopped run resumes, and the folder that keeps the states of all runs."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bnprobe.errors import OutputError, StateError, UsageError, message_of, reason_of
from bnprobe.files import OwnFolder, has_mark, is_blank, not_own, unfinished, write_whole
from bnprobe.records import Curve, Run, Score
from bnprobe.training.log import event_folder

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Whether training was told to stop.

    Attributes:
        name: Name of the signal, e.g. "SIGTERM"; empty if there was none.
    """

    def __init__(self) -> None:
        self.name = ""


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Record SIGTERM and Ctrl-C while the block runs. A second signal acts at once, as it would outside this block.

    Python handles signals only in the main thread. In other threads this does nothing, nor where a handler was not set
    from Python and so could not be restored.
    """
    flag = StopFlag()
    previous: dict[signal.Signals, Any] = {}

    owner = os.getpid()

    def note(number: int, frame: object) -> None:
        if os.getpid() != owner:
            _in_worker(number)
        else:
            flag.name = signal.Signals(number).name
            put_back()

    def put_back() -> None:
        for each in list(previous):
            signal.signal(each, previous.pop(each))

    if threading.current_thread() is threading.main_thread():
        for each in _SIGNALS:
            if signal.getsignal(each) is not None:
                previous[each] = signal.getsignal(each)
                signal.signal(each, note)
    try:
        yield flag
    finally:
        put_back()


def _in_worker(number: int) -> None:
    """Handler in a loader process, which inherits it: ignore the Ctrl-C that it also receives, so the step can end."""
    if number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


_START_OVER = "Resume with the original settings, or start over with --force."
_VERSION = 1


def save_state(path: Path, run: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a state atomically.

    Args:
        path: File to write.
        run: Identity of the run.
        state: Tensors and plain types.

    Raises:
        OutputError: The file could not be written; a previous file is unchanged.
    """
    write_whole(path, _bytes({"version": _VERSION, "run": run, "state": state}))


def load_state(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Read a state onto the CPU; no code in the file is executed.

    Args:
        path: File written by ``save_state``.
        run: Identity of the run that it must belong to.

    Raises:
        StateError: The file is damaged or belongs to another run; the message says what differs.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise StateError(f"{path} cannot be read: {reason_of(error)}.") from None
    try:
        with file:
            content = torch.load(file, map_location="cpu", weights_only=True)
        version, of, state = content["version"], dict(content["run"]), dict(content["state"])
        known = version == _VERSION, [key for key in run if of.get(key) != run[key]]
    except Exception as error:  # a damaged file can make torch.load raise anything
        raise StateError(
            f"{path} is damaged, or not the state of a training run ({type(error).__name__}). Start over with --force."
        ) from None
    is_known, differing = known
    if not is_known:
        raise StateError(f"{path} has format {version}; this bnprobe reads {_VERSION}. Start over with --force.")
    if differing:
        words = "; ".join(f"{key} was {of.get(key)!r} and is now {run[key]!r}" for key in differing)
        raise StateError(f"{path} belongs to a different run: {words}. {_START_OVER}")
    return state


def require_resumable(name: str, part: Any) -> None:
    """Reject an optimizer or schedule whose state cannot be saved, or cannot be loaded safely.

    Args:
        name: "optimizer" or "schedule".
        part: The optimizer or schedule; may be None.

    Raises:
        UsageError: The state cannot be saved; the message says why.
    """
    if part is None:
        return
    key, remedy = f"train.{name}.target", "Choose another one, or give your class a state_dict() and load_state_dict()"
    if not all(callable(getattr(part, method, None)) for method in ("state_dict", "load_state_dict")):
        raise UsageError(f"{key}: {type(part).__name__} has no state_dict(), so a run could not be resumed. {remedy}.")
    try:
        torch.load(io.BytesIO(_bytes(part.state_dict())), weights_only=True)
    except Exception as error:  # pickle's and torch's own
        said = message_of(error).partition("\n")[0]
        raise UsageError(
            f"{key}: the state_dict() of {type(part).__name__} contains objects that cannot be saved safely,"
            f" so a run could not be resumed ({said}). {remedy} of numbers, strings, lists and"
            " tensors."
        ) from None


def _bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


_FINGERPRINT, _LOG = "fingerprint.json", "log.csv"
_WRITTEN = rf"{re.escape(_FINGERPRINT)}|{re.escape(_LOG)}|[A-Za-z0-9-]+-[0-9a-f]{{8}}-seed-?\d+\.(running|safetensors)"
_RUN = "run"
"""Metadata key of the record in the weights file, so that weights and record are written together."""


class StateFolder:
    """A folder to resume a repair from, made by ``open``.

    It contains bnprobe's marker file, ``fingerprint.json``, ``log.csv``, TensorBoard's files in ``log/``, and for
    each run ``ARM-....running`` (the state of the run in progress) or ``ARM-....safetensors`` (the weights of a
    finished run, with its record as metadata).

    Attributes:
        path: Path of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own = OwnFolder(path, _WRITTEN)
        self._events = event_folder(self.log)

    @classmethod
    def open(cls, path: Path, fingerprint: Mapping[str, Any], resume: bool, force: bool = False) -> StateFolder:
        """Create the folder, or continue with that of the same repair.

        Args:
            path: Path of the folder; its parent must exist.
            fingerprint: What must be unchanged for the repair to be resumed: JSON types, by name.
            resume: Whether to resume; if not, no state may exist.
            force: Whether to discard an existing state that is not to be resumed.

        Raises:
            UsageError: A state exists and ``resume`` is False, or no state exists and it is True.
            StateError: The state belongs to another repair, or is damaged; the message says what differs.
            OutputError: The folder cannot be written, or bnprobe did not make what has its name.
        """
        folder, wanted = cls(path), json.loads(json.dumps(dict(fingerprint)))
        if resume and not is_blank(path):
            folder._require_same(wanted)
        else:
            folder._begin(wanted, force)
        return folder

    @property
    def log(self) -> Path:
        """The CSV log of all steps."""
        return self.path / _LOG

    def running(self, arm: str, seed: int) -> Path:
        """Path for the state of a run in progress."""
        return self._file(arm, seed, "running")

    def finished(self, arm: str, seed: int) -> tuple[Run, dict[str, Tensor]] | None:
        """Record and weights of a run; None if it is not finished.

        Raises:
            StateError: The file is damaged.
        """
        path = self._file(arm, seed, "safetensors")
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                fields = json.loads(file.metadata()[_RUN])
                curve = fields["curve"] and Curve(**{name: tuple(values) for name, values in fields["curve"].items()})
                run = Run(**{**fields, "score": Score(**fields["score"]), "curve": curve})
                return run, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from None

    def finish(self, arm: str, seed: int, run: Run, weights: Mapping[str, Tensor]) -> None:
        """Write record and weights of a finished run atomically, and remove its state.

        Raises:
            OutputError: They could not be written; nothing has changed.
        """
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
        data = safetensors.torch.save(tensors, {_RUN: json.dumps(dataclasses.asdict(run))})
        write_whole(self._file(arm, seed, "safetensors"), data)
        try:
            self.running(arm, seed).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {reason_of(error)}.") from None

    def keep_events(self, log: Path) -> None:
        """Move TensorBoard's files, if there are any, to a folder that is kept.

        Args:
            log: The CSV log that they belong to; earlier files of bnprobe in its folder are replaced.

        Raises:
            OutputError: They could not be moved, or bnprobe did not make what has this name.
        """
        if has_mark(self._events.path):
            self._events.move_to(event_folder(log))

    def remove(self) -> None:
        """Remove the state after the repair. The folder stays if it contains files that bnprobe did not write.

        Raises:
            OutputError: The state could not be removed.
        """
        self._own.remove([self._events])

    def _begin(self, fingerprint: dict[str, Any], force: bool) -> None:
        if has_mark(self.path):
            if not force and not is_blank(self.path):
                raise unfinished(self.path)
            # Empty the folder for reuse; the marker files stay.
            if has_mark(self._events.path):
                self._events.clear()
            self._own.clear()
        self._own.make()
        try:
            write_whole(self.path / _FINGERPRINT, json.dumps(fingerprint, indent=2) + "\n")
        except OutputError:
            self._own.remove()
            raise

    def _require_same(self, wanted: dict[str, Any]) -> None:
        if not self.path.is_dir():
            raise UsageError(f"--resume: there is no saved state at {self.path}. Start without --resume.")
        if not has_mark(self.path):
            raise not_own(self.path)
        path = self.path / _FINGERPRINT
        try:
            saved = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError, RecursionError) as error:
            raise _damaged(path, error) from None
        differing = [key for key in {**saved, **wanted} if saved.get(key) != wanted.get(key)]
        if differing:
            words = "; ".join(_difference(key, saved.get(key), wanted.get(key)) for key in differing)
            raise StateError(f"{self.path} belongs to a different repair: {words}. {_START_OVER}")

    def _file(self, arm: str, seed: int, kind: str) -> Path:
        """Path of a run's file: the name of the arm made fit for a file name, with a digest to keep it unique."""
        digest = hashlib.sha256(arm.encode()).hexdigest()[:8]
        return self.path / f"{re.sub(r'[^A-Za-z0-9]+', '-', arm)}-{digest}-seed{seed}.{kind}"


def _difference(key: str, saved: Any, wanted: Any) -> str:
    """Both values of a key; of two mappings only the entries that differ."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = [each for each in {**saved, **wanted} if saved.get(each) != wanted.get(each)]
        return "; ".join(_difference(f"{key}.{each}", saved.get(each), wanted.get(each)) for each in keys)
    return f"{key} was {json.dumps(saved)} and is now {json.dumps(wanted)}"


def _damaged(path: Path, error: Exception) -> StateError:
    return StateError(f"{path} is damaged ({type(error).__name__}: {error}). Start over with --force.")
