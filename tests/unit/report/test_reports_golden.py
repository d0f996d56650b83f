"""The terminal report against golden files.

``BNPROBE_UPDATE_GOLDEN=1 pytest tests/unit/reports`` writes them again; read the difference before a commit.
"""

from __future__ import annotations

import os
from pathlib import Path

import fabricated_reports
import pytest

from bnprobe.reports import FORMATS, RenderOptions

GOLDEN = Path(__file__).parents[2] / "golden"
COMMAND = "bnprobe scan sample_configs/digits/model.py --batch-size 2"
PAGES = {
    "80": RenderOptions(width=80, command=COMMAND),
    "80-ascii": RenderOptions(width=80, unicode=False, command=COMMAND),
    "120-color": RenderOptions(width=120, color=True, command=COMMAND),
}
CASES = [(name, page, PAGES[page]) for name in fabricated_reports.REPORTS for page in PAGES]
CASES.append(("many", "80-all", RenderOptions(width=80, show_all=True, command=COMMAND)))


@pytest.mark.parametrize(("name", "page", "options"), CASES, ids=lambda value: str(value)[:20])
def test_the_terminal_report_is_the_golden_file(name: str, page: str, options: RenderOptions) -> None:
    text = FORMATS["terminal"](fabricated_reports.REPORTS[name](), options)
    path = GOLDEN / f"report-{name}-{page}.txt"
    if os.environ.get("BNPROBE_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_there_is_no_golden_file_without_a_case() -> None:
    expected = {f"report-{name}-{page}.txt" for name, page, _ in CASES}
    assert {path.name for path in GOLDEN.glob("report-*.txt")} == expected
