"""The files that a repair writes: weights, and what stands beside them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bnprobe.errors import OutputError, UsageError
from bnprobe.files import has_mark, not_own, require_new, require_writable, write_all
from bnprobe.loading.keys import CONVERTED
from bnprobe.records import RepairRecord, Report
from bnprobe.reports.json import render as report_json
from bnprobe.reports.repair import record_json
from bnprobe.reports.usage import Files

if TYPE_CHECKING:
    from torch import Tensor


class Artifacts:
    """The files and folders beside the weights ``out.safetensors``: ``out.record.json`` and so on.

    Here is known all that a command writes there. Nothing else is looked at or removed.

    Args:
        output: File of the weights.
        force: Replace files that exist, and what bnprobe wrote to folders that it made itself.
        trains: The command fine-tunes: there are a log and a state to resume from.

    Attributes:
        tensorboard: Whether the steps are written for TensorBoard too: where it is installed.
    """

    def __init__(self, output: Path, force: bool = False, trains: bool = False) -> None:
        self.weights = output
        self.record = self._beside("record.json")
        self.before = self._beside("before.json")
        self.after = self._beside("after.json")
        self.log = self._beside("log.csv")
        self.events = self._beside("log")
        self.state = self._beside("state")
        self.tensorboard = trains and importlib.util.find_spec("tensorboard") is not None
        self._force, self._trains = force, trains
        self._files = [self.weights, self.record, self.before, self.after, *([self.log] if trains else [])]
        self._events_until_the_end = self.state / "log"

    def check(self, resume: bool = False) -> None:
        """Refuse, before anything is computed, what could not be written at the end, replaced or gone on with.

        Args:
            resume: A state that is there is to be gone on with.

        Raises:
            OutputError: The folder is missing or read-only, a file exists and ``force`` was not given, or something
                that bnprobe did not make has the name of a folder.
            UsageError: There is a state to resume from, and it is not to be resumed.
        """
        require_writable(self.weights, "-o")
        if self.weights.suffix != ".safetensors":
            raise UsageError(f"-o {self.weights}: the weights are written as safetensors; give a name that ends so.")
        if self._trains:
            self._check_folders(resume)
        require_new(self._files, self._force)

    def write(
        self,
        record: RepairRecord,
        weights: dict[str, Tensor],
        before: Report | None,
        after: Report | None,
    ) -> RepairRecord:
        """Write all files or none, then remove the state to resume from.

        A file that an earlier run wrote and this one does not have is removed.

        Returns:
            The record with the name and the digest of the weights.

        Raises:
            OutputError: They could not be written, or something has come in their way since ``check``; what was there
                before still is, and so is the state.
        """
        from safetensors.torch import save

        from bnprobe.training import StateFolder

        self.check(resume=True)
        content = save(weights, _mark(record))
        record = replace(record, weights=str(self.weights), weights_sha256=hashlib.sha256(content).hexdigest())
        contents: dict[Path, bytes | str] = {self.weights: content, self.record: record_json(record)}
        reports = {self.before: before, self.after: after}
        contents |= {path: report_json(report) for path, report in reports.items() if report is not None}
        state = StateFolder(self.state)
        if self._trains and state.log.exists():
            contents[self.log] = state.log.read_bytes()
        write_all(contents, self._force)
        for path in set(self._files) - contents.keys():
            path.unlink(missing_ok=True)
        print(f"Weights written to {self.weights}; the record and the scans stand beside them.", file=sys.stderr)
        if self._trains:
            state.keep_events(self.log)
            state.remove()
            if self.state.exists():
                print(f"{self.state} stays: it holds files that bnprobe did not write.", file=sys.stderr)
        return record

    def files(self, before: Report | None, after: Report | None) -> Files:
        """What stands beside the weights, for the report."""
        return Files(
            record=str(self.record),
            before=None if before is None else str(self.before),
            after=None if after is None else str(self.after),
            log=str(self.log) if self._trains and self.log.exists() else None,
        )

    def _check_folders(self, resume: bool) -> None:
        """The state, and TensorBoard's files if there will be any; a run that is resumed may have some already."""
        folders = [self.state]
        if self.tensorboard or has_mark(self._events_until_the_end):
            folders += [self.events, self._events_until_the_end]
        existing = [folder for folder in folders if os.path.lexists(folder)]
        for folder in existing:
            if not has_mark(folder):
                raise not_own(folder)
        if self.state in existing and not (resume or self._force):
            raise UsageError(
                f"{self.state} holds the state of a repair that is not done. Go on with --resume, or drop it and start"
                " anew with --force."
            )
        if self.events in existing and not self._force:
            raise OutputError(
                f"{self.events} exists already; give another -o, or --force to replace what bnprobe wrote there."
            )

    def _beside(self, suffix: str) -> Path:
        return self.weights.parent / f"{self.weights.stem}.{suffix}"


def _mark(record: RepairRecord) -> dict[str, str] | None:
    """What says in the weights' file that plain BN with them would be another model."""
    if record.plan is None or record.plan.deploys:
        return None
    layers = [change.name for change in record.plan.changes]
    return {CONVERTED: json.dumps({"to": record.plan.to, "layers": layers})}
