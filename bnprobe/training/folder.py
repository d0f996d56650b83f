"""The folder of a repair in progress: runs that are finished, the one that is not, and which repair it all is of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from bnprobe.errors import OutputError, StateError, UsageError
from bnprobe.files import OwnFolder, has_mark, not_own, write_whole
from bnprobe.records import Score
from bnprobe.records.repairs import Run
from bnprobe.training.log import event_folder

_FINGERPRINT, _LOG = "fingerprint.json", "log.csv"
_WRITTEN = rf"{re.escape(_FINGERPRINT)}|{re.escape(_LOG)}|[A-Za-z0-9-]+-[0-9a-f]{{8}}-seed-?\d+\.(running|safetensors)"
_RUN = "run"
"""Key of the record in the metadata of the weights, so that both are written in one file, whole."""


class StateFolder:
    """A folder to resume a repair from. ``open`` makes it.

    It holds bnprobe's mark, ``fingerprint.json``, ``log.csv``, TensorBoard's files in ``log/``, and for each run
    ``ARM-....running`` (the state of the run in progress) or ``ARM-....safetensors`` (the weights of a finished run,
    with its record as metadata).

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own = OwnFolder(path, _WRITTEN)
        self._events = event_folder(self.log)

    @classmethod
    def open(cls, path: Path, fingerprint: Mapping[str, Any], resume: bool, force: bool = False) -> StateFolder:
        """Begin a folder, or go on with one of the same repair.

        Args:
            path: Where it is to be; its parent must exist.
            fingerprint: What must be the same to go on: JSON types, by name.
            resume: Go on; else there must be no state.
            force: Drop a state that is there, unless it is to be resumed.

        Raises:
            UsageError: It is there and is not to be resumed, or the reverse.
            StateError: It is of another repair, or damaged; names what differs.
            OutputError: It cannot be written, or something that bnprobe did not make has its name.
        """
        folder, wanted = cls(path), json.loads(json.dumps(dict(fingerprint)))
        if resume:
            folder._require_same(wanted)
        else:
            folder._begin(wanted, force)
        return folder

    @property
    def log(self) -> Path:
        """The CSV log of all steps."""
        return self.path / _LOG

    def running(self, arm: str, seed: int) -> Path:
        """Where the state of a run in progress belongs."""
        return self._file(arm, seed, "running")

    def finished(self, arm: str, seed: int) -> tuple[Run, dict[str, Tensor]] | None:
        """Record and weights of a run, if it is finished.

        Raises:
            StateError: Its file is damaged.
        """
        path = self._file(arm, seed, "safetensors")
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                run = _run_of(json.loads(file.metadata()[_RUN]))
                return run, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from None

    def finish(self, arm: str, seed: int, run: Run, weights: Mapping[str, Tensor]) -> None:
        """Write record and weights of a finished run, whole or not at all, and drop its state.

        Raises:
            OutputError: They could not be written; nothing has changed then.
        """
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
        data = safetensors.torch.save(tensors, {_RUN: json.dumps(dataclasses.asdict(run))})
        write_whole(self._file(arm, seed, "safetensors"), data)
        try:
            self.running(arm, seed).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error.strerror or error}.") from None

    def keep_events(self, log: Path) -> None:
        """Move TensorBoard's files, where there are any, to a folder that outlives this one.

        Args:
            log: The CSV log that they belong to; what bnprobe wrote to its folder before is replaced.

        Raises:
            OutputError: They could not be moved, or something that bnprobe did not make has this name.
        """
        if has_mark(self._events.path):
            self._events.move_to(event_folder(log))

    def remove(self) -> None:
        """Remove the state: the repair is done. Files that bnprobe did not write stay, and the folder with them.

        Raises:
            OutputError: It could not be removed.
        """
        if has_mark(self._events.path):
            self._events.remove()
        self._own.remove()

    def _begin(self, fingerprint: dict[str, Any], force: bool) -> None:
        if has_mark(self.path):
            if not force:
                raise UsageError(
                    f"{self.path} holds the state of a repair that is not done. Go on with --resume, or drop it and"
                    " start anew with --force."
                )
            self._clear()
        self._own.make()
        try:
            write_whole(self.path / _FINGERPRINT, json.dumps(fingerprint, indent=2) + "\n")
        except OutputError:
            self._own.remove()
            raise

    def _clear(self) -> None:
        """Drop what a folder holds that is to be used again: the marks stay."""
        if has_mark(self._events.path):
            self._events.clear()
        self._own.clear()

    def _require_same(self, wanted: dict[str, Any]) -> None:
        if not self.path.is_dir():
            raise UsageError(f"--resume: there is no state at {self.path}. Start without --resume.")
        if not has_mark(self.path):
            raise not_own(self.path)
        path = self.path / _FINGERPRINT
        try:
            saved = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise _damaged(path, error) from None
        differing = [key for key in {**saved, **wanted} if saved.get(key) != wanted.get(key)]
        if differing:
            words = "; ".join(_difference(key, saved.get(key), wanted.get(key)) for key in differing)
            raise StateError(
                f"{self.path} is of another repair: {words}. Resume with what it was begun with, or start anew with"
                " --force."
            )

    def _file(self, arm: str, seed: int, kind: str) -> Path:
        """Arms are named for people: their names are made fit for files, and told apart by a digest."""
        digest = hashlib.sha256(arm.encode()).hexdigest()[:8]
        return self.path / f"{re.sub(r'[^A-Za-z0-9]+', '-', arm)}-{digest}-seed{seed}.{kind}"


def _difference(key: str, saved: Any, wanted: Any) -> str:
    """Both values of a key; of two mappings only what differs in them."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = [each for each in {**saved, **wanted} if saved.get(each) != wanted.get(each)]
        return "; ".join(_difference(f"{key}.{each}", saved.get(each), wanted.get(each)) for each in keys)
    return f"{key} is {json.dumps(saved)} there and {json.dumps(wanted)} here"


def _run_of(fields: dict[str, Any]) -> Run:
    return Run(**{**fields, "score": Score(**fields["score"])})


def _damaged(path: Path, error: Exception) -> StateError:
    return StateError(f"{path} is damaged ({type(error).__name__}: {error}). Start anew with --force.")
