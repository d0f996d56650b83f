"""The files that a repair writes: weights, record and reports."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bnprobe.cli.streams import say
from bnprobe.config.targets import ARGUMENTS, CONVERTED, ConversionMark, settings_of
from bnprobe.errors import OutputError, UsageError
from bnprobe.files import has_mark, is_blank, not_own, only_run, require_new, require_writable, unfinished, write_all
from bnprobe.paths import placed
from bnprobe.records import RepairRecord, Report
from bnprobe.report.json import dump
from bnprobe.report.next_step import scan_of
from bnprobe.report.repair import Files, worse_than_as_is

if TYPE_CHECKING:
    from torch import Tensor


class Artifacts:
    """The weights ``out.safetensors``, and the files and folders beside them: ``out.record.json`` and so on.

    This class knows everything that a command writes there. Nothing else is read or removed.

    Args:
        output: Path of the weights.
        force: Whether to replace existing files, and bnprobe's own files in folders that it made.
        trains: Whether the command fine-tunes, so that there are a log and a state to resume from.

    Attributes:
        tensorboard: Whether the steps are written for TensorBoard too, which is so if it is installed.
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

    def alone(self) -> AbstractContextManager[None]:
        """Be the only run that writes these files while a block runs.

        Raises:
            OutputError: The folder is missing or read-only, or another run writes there; the message names it.
        """
        require_writable(self.weights, "-o")
        return only_run(self.weights, [*self._files, self.events, self.state])

    def check(self, resume: bool = False) -> None:
        """Reject outputs that cannot be written, replaced or resumed, before anything is computed.

        Args:
            resume: Whether an existing state is to be resumed.

        Raises:
            OutputError: The folder is missing or read-only, a file exists and ``force`` was not given, or something
                that bnprobe did not make has the name of a folder.
            UsageError: A state exists that is not to be resumed.
        """
        require_writable(self.weights, "-o")
        if self.weights.suffix != ".safetensors":
            raise UsageError(f"-o {self.weights}: the weights need a name that ends in .safetensors.")
        if self._trains:
            self._check_folders(resume)
        require_new(self._files, self._force)

    def write(
        self,
        record: RepairRecord,
        weights: dict[str, Tensor],
        before: Report | None,
        after: Report | None,
    ) -> tuple[RepairRecord, Files]:
        """Write all files or none, then remove the saved state.

        Weights that are surely worse than those as loaded are written only with ``force``: otherwise nothing is, and
        the saved state stays. A report or log that an earlier run wrote but this one does not is removed. A file of the
        user's stays.

        Returns:
            The record with the name and the digest of the weights, and the names of the files beside them.

        Raises:
            OutputError: The files could not be written, e.g. because something has appeared in their place since
                ``check``; existing files and the state are unchanged.
        """
        from safetensors.torch import save

        from bnprobe.training import StateFolder

        weights_file = placed(self.weights)
        if weights_file != self.weights:  # the user's code has changed the working directory
            return Artifacts(weights_file, self._force, self._trains).write(record, weights, before, after)
        if record.proof is not None and record.proof.surely_worse and not self._force:
            say(f"Nothing was written: {worse_than_as_is(record)}")
            return record, Files()
        self.check(resume=True)
        content = save(weights, _metadata(record) or None)
        record = replace(record, weights=str(self.weights), weights_sha256=hashlib.sha256(content).hexdigest())
        contents: dict[Path, bytes | str] = {self.weights: content, self.record: dump(record)}
        reports = {self.before: (before, None), self.after: (after, record.weights)}
        contents |= {
            path: dump(_with_command(report, record, checkpoint))
            for path, (report, checkpoint) in reports.items()
            if report is not None
        }
        state = StateFolder(self.state)
        if self._trains and state.log.exists():
            contents[self.log] = state.log.read_bytes()
        write_all(contents, self._force)
        self._remove_outdated([path for path in self._files if path not in contents])
        say(f"Weights written to {self.weights}, with the record and the scan reports beside them.")
        if self._trains:
            state.keep_events(self.log)
            state.remove()
            if self.state.exists():
                say(f"{self.state} was kept because it contains files that bnprobe did not write.")
        return record, self._written(before, after)

    def _written(self, before: Report | None, after: Report | None) -> Files:
        """Names of the files beside the weights, for the report."""
        return Files(
            record=str(self.record),
            before=None if before is None else str(self.before),
            after=None if after is None else str(self.after),
            log=str(self.log) if self._trains and _is_log(self.log) else None,
        )

    def _remove_outdated(self, paths: list[Path]) -> None:
        """Remove what an earlier run wrote to these paths; keep, and name, what bnprobe did not write."""
        for path in paths:
            is_own = _is_log if path == self.log else _is_report
            if not path.is_symlink() and is_own(path):
                path.unlink()
            elif os.path.lexists(path):
                say(f"{path} was kept because bnprobe did not write it.")

    def _check_folders(self, resume: bool) -> None:
        """Check the folder of the state and that of TensorBoard; a resumed run may already have the latter."""
        folders = [self.state]
        if self.tensorboard or has_mark(self._events_until_the_end):
            folders += [self.events, self._events_until_the_end]
        existing = [folder for folder in folders if os.path.lexists(folder)]
        for folder in existing:
            if not has_mark(folder):
                raise not_own(folder)
        if self.state in existing and not (resume or self._force or is_blank(self.state)):
            raise unfinished(self.state)
        if self.events in existing and not self._force:
            raise OutputError(
                f"{self.events} already exists; give another -o, or --force to replace what bnprobe wrote there."
            )

    def _beside(self, suffix: str) -> Path:
        return self.weights.parent / f"{self.weights.stem}.{suffix}"


def _with_command(report: Report, record: RepairRecord, checkpoint: str | None) -> Report:
    """The report of a scan of the repair, with the command that makes it; one that was read has its own."""
    if report.scan.command is not None or record.command is None:
        return report
    return replace(report, scan=replace(report.scan, command=scan_of(record.command, checkpoint)))


def _is_log(path: Path) -> bool:
    from bnprobe.training.log import is_step_log  # imports torch, which is not needed to check the options

    return is_step_log(path)


def _is_report(path: Path) -> bool:
    """Whether a file is a JSON document that bnprobe wrote, of any version."""
    try:
        if not path.is_file():  # reading a pipe would wait
            return False
        document = json.loads(path.read_bytes())
        return bool(document["tool"]["name"] == "bnprobe")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _metadata(record: RepairRecord) -> dict[str, str]:
    """Metadata of the weights file: the arguments of the model, and that plain BN must not load it where that is so."""
    args = record.settings.get("model", {}).get("args")
    return {**({ARGUMENTS: json.dumps(args)} if args else {}), **_mark(record)}


def _mark(record: RepairRecord) -> dict[str, str]:
    if record.plan is None or record.plan.deploys:
        return {}
    to, layers = record.plan.to, {change.name: change.to for change in record.plan.changes}
    mark = ConversionMark(to, layers, settings_of(to, record.settings.get("repair") or {}))
    return {CONVERTED: json.dumps(asdict(mark))}
