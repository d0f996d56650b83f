"""Plans, records of repairs and verifications as text, against golden files.

``BNPROBE_UPDATE_GOLDEN=1 pytest tests/unit/reports`` writes them again; read the difference before a commit.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fabricated_scans import files, scans

from bnprobe.reports import RenderOptions, verification
from bnprobe.reports.plan import render_plan
from bnprobe.reports.repair import render_record
from support import repairs

GOLDEN = Path(__file__).parents[2] / "golden"
COMMAND = "bnprobe convert sample_configs/digits/model.py --batch-size 2 --dry-run"
PAGES = {
    "80": RenderOptions(width=80, command=COMMAND),
    "80-ascii": RenderOptions(width=80, unicode=False, command=COMMAND),
    "120-color": RenderOptions(width=120, color=True, command=COMMAND),
}
ALL = {"80-all": RenderOptions(width=80, show_all=True, command=COMMAND)}
KINDS = {"plan": repairs.PLANS, "repair": repairs.RECORDS, "verification": repairs.VERIFICATIONS}
CASES = [
    (kind, name, page, options)
    for kind, made in KINDS.items()
    for name in made
    for page, options in (PAGES | ALL if name == "large" else PAGES).items()
]


def rendered(kind: str, name: str, options: RenderOptions) -> str:
    """One of the made-up results as text."""
    if kind == "plan":
        return render_plan(repairs.PLANS[name](), options)
    if kind == "verification":
        return verification.FORMATS["terminal"](repairs.VERIFICATIONS[name](), options)
    record, (before, after) = repairs.RECORDS[name](), scans(name)
    return render_record(record, before, after, options, files(record, after))


@pytest.mark.parametrize(("kind", "name", "page", "options"), CASES, ids=lambda value: str(value)[:20])
def test_the_text_is_the_golden_file(kind: str, name: str, page: str, options: RenderOptions) -> None:
    text = rendered(kind, name, options)
    path = GOLDEN / f"{kind}-{name}-{page}.txt"
    if os.environ.get("BNPROBE_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_there_is_no_golden_file_without_a_case() -> None:
    expected = {f"{kind}-{name}-{page}.txt" for kind, name, page, _ in CASES}
    assert {path.name for kind in KINDS for path in GOLDEN.glob(f"{kind}-*.txt")} == expected


def test_the_made_up_records_agree_with_their_scans() -> None:
    for name, make in repairs.RECORDS.items():
        record = make()
        for report, flagged in zip(scans(name), (record.flagged_before, record.flagged_after), strict=True):
            assert report is None or report.summary.flagged == flagged, name
