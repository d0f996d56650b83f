"""The files that a repair writes: weights, and what stands beside them."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bnprobe.errors import UsageError
from bnprobe.files import require_new, require_writable, write_all
from bnprobe.loading.keys import CONVERTED
from bnprobe.records import RepairRecord, Report
from bnprobe.report.json import dump
from bnprobe.report.repair import Files

if TYPE_CHECKING:
    from torch import Tensor


class Artifacts:
    """Names of the files beside the weights ``out.safetensors``: ``out.record.json`` and so on.

    Args:
        output: File of the weights.
    """

    def __init__(self, output: Path) -> None:
        self.weights = output
        self.record = self._beside("record.json")
        self.before = self._beside("before.json")
        self.after = self._beside("after.json")
        self.log = self._beside("log.csv")
        self.state = self._beside("state")

    def check(self, force: bool, resume: bool = False) -> None:
        """Refuse, before anything is computed, what could not be written at the end or gone on with.

        Raises:
            OutputError: The folder is missing or read-only, or a file exists and ``force`` was not given.
            UsageError: There is a state to resume from, and it is not to be resumed.
        """
        require_writable(self.weights, "-o")
        if self.weights.suffix != ".safetensors":
            raise UsageError(f"-o {self.weights}: the weights are written as safetensors; give a name that ends so.")
        if resume and self.state.is_dir():
            return
        if self.state.exists() and not force:
            raise UsageError(
                f"{self.state} holds the state of a repair that is not done. Go on with --resume, or drop it and start"
                " anew with --force."
            )
        require_new([self.weights, self.record, self.before, self.after, self.log], force)

    def write(
        self,
        record: RepairRecord,
        weights: dict[str, Tensor],
        before: Report | None,
        after: Report | None,
    ) -> RepairRecord:
        """Write all files or none; those of an earlier run that this one does not give are removed.

        Returns:
            The record with the name and the digest of the weights.

        Raises:
            OutputError: They could not be written; what was there before still is.
        """
        from safetensors.torch import save

        from bnprobe.training import StateFolder

        content = save(weights, _mark(record))
        record = replace(record, weights=str(self.weights), weights_sha256=hashlib.sha256(content).hexdigest())
        contents: dict[Path, bytes | str] = {self.weights: content, self.record: dump(record)}
        reports = {self.before: before, self.after: after}
        contents |= {path: dump(report) for path, report in reports.items() if report is not None}
        log = StateFolder(self.state).log
        if log.exists():
            contents[self.log] = log.read_bytes()
        write_all(contents, force=True)  # check() has refused what must not be replaced
        for path in {*reports, self.log} - contents.keys():
            path.unlink(missing_ok=True)
        self._keep_board()
        print(f"Weights written to {self.weights}; the record and the scans stand beside them.", file=sys.stderr)
        return record

    def files(self, before: Report | None, after: Report | None) -> Files:
        """What stands beside the weights, for the report."""
        return Files(
            record=str(self.record),
            before=None if before is None else str(self.before),
            after=None if after is None else str(self.after),
            log=str(self.log) if self.log.exists() else None,
        )

    def forget_state(self) -> None:
        """Drop the state to resume from: it is not needed any more."""
        shutil.rmtree(self.state, ignore_errors=True)

    def _keep_board(self) -> None:
        """TensorBoard's files, where there are any, in place of those of an earlier run."""
        board = self.state / "log"
        if board.is_dir():
            shutil.rmtree(self.log.with_suffix(""), ignore_errors=True)
            shutil.move(board, self.log.with_suffix(""))

    def _beside(self, suffix: str) -> Path:
        return self.weights.parent / f"{self.weights.stem}.{suffix}"


def _mark(record: RepairRecord) -> dict[str, str] | None:
    """What says in the weights' file that plain BN with them would be another model."""
    if record.plan is None or record.plan.deploys:
        return None
    layers = [change.name for change in record.plan.changes]
    return {CONVERTED: json.dumps({"to": record.plan.to, "layers": layers})}
