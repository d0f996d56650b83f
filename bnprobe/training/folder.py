"""The folder of a repair in progress: runs that are finished, the one that is not, and which repair it all is of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from bnprobe.errors import OutputError, StateError, UsageError
from bnprobe.files import write_whole
from bnprobe.records import Run, Score

_FINGERPRINT = "fingerprint.json"
_RUN = "run"
"""Key of the record in the metadata of the weights, so that both are written in one file, whole."""


class StateFolder:
    """A folder to resume a repair from. ``open`` makes it.

    It holds ``fingerprint.json``, ``log.csv``, and for each run ``ARM-SEED-....running`` (the state of the run in
    progress) or ``ARM-SEED-....safetensors`` (the weights of a finished run, with its record as metadata).

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, fingerprint: Mapping[str, Any], resume: bool) -> StateFolder:
        """Begin a folder, or go on with one of the same repair.

        Args:
            path: Where it is to be; its parent must exist.
            fingerprint: What must be the same to go on: JSON types, by name.
            resume: Go on; else the folder must not be there.

        Raises:
            UsageError: It is there and is not to be resumed, or the reverse.
            StateError: It is of another repair, or damaged; names what differs.
            OutputError: It cannot be written.
        """
        folder, wanted = cls(path), json.loads(json.dumps(dict(fingerprint)))
        if resume:
            folder._require_same(wanted)
        else:
            folder._begin(wanted)
        return folder

    @property
    def log(self) -> Path:
        """The CSV log of all steps."""
        return self.path / "log.csv"

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
        with _writing(self.path):
            self.running(arm, seed).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder: the repair is done.

        Raises:
            OutputError: It could not be deleted.
        """
        with _writing(self.path):
            shutil.rmtree(self.path)

    def _begin(self, fingerprint: dict[str, Any]) -> None:
        if self.path.exists():
            raise UsageError(
                f"{self.path} holds the state of a repair that is not done. Go on with --resume, or drop it and start"
                " anew with --force."
            )
        with _writing(self.path):
            self.path.mkdir()
        try:
            write_whole(self.path / _FINGERPRINT, json.dumps(fingerprint, indent=2) + "\n")
        except OutputError:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def _require_same(self, wanted: dict[str, Any]) -> None:
        if not self.path.is_dir():
            raise UsageError(f"--resume: there is no state at {self.path}. Start without --resume.")
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


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from None
