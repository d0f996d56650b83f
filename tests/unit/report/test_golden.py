"""Every kind of document as text in 80 columns, against golden files.

``BNPROBE_UPDATE_GOLDEN=1 pytest tests/unit/report`` writes them again; read the difference before a commit.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fabricated_documents import CASES, document
from fabricated_scans import scans

from bnprobe.report import RenderOptions, render
from support import repairs

GOLDEN = Path(__file__).parents[2] / "golden"
COMMANDS = {
    "plan": "bnprobe convert sample_configs/digits/model.py --batch-size 2 --dry-run",
    "scan": "bnprobe scan sample_configs/digits/model.py --batch-size 2",
}


SHORT = ("scan", "sweep", "repair")
"""Kinds of documents that have a short form and a whole one."""

TEXTS = [(kind, name, verbose) for kind, name in CASES for verbose in ((False, True) if kind in SHORT else (False,))]


def _file(kind: str, name: str, verbose: bool) -> str:
    return f"{kind}-{name}{'.verbose' if verbose else ''}.txt"


@pytest.mark.parametrize(("kind", "name", "verbose"), TEXTS)
def test_the_text_is_the_golden_file(kind: str, name: str, verbose: bool) -> None:
    options = RenderOptions(width=80, verbose=verbose, command=COMMANDS.get(kind, f"bnprobe {kind}"))
    text = render(document(kind, name), "terminal", options)
    path = GOLDEN / _file(kind, name, verbose)
    if os.environ.get("BNPROBE_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_there_is_no_golden_file_without_a_case() -> None:
    assert {path.name for path in GOLDEN.glob("*.txt")} == {_file(*text) for text in TEXTS}


def test_the_made_up_records_agree_with_their_scans() -> None:
    for name, make in repairs.RECORDS.items():
        record = make()
        for report, flagged in zip(scans(name), (record.flagged_before, record.flagged_after), strict=True):
            assert report is None or report.summary.flagged == flagged, name
