"""What the report looks like: in a pipe, in terminals of several kinds, for large networks."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from functional.command import FINDINGS, MODEL, SHIFTED, Workspace
from functional.pseudoterminal import run_in_terminal

SCAN = ("scan", "model.py", "--batch-size", "2")
DEEP = (
    MODEL
    + """
def images():
    return torch.randn(64, 2, generator=torch.Generator().manual_seed(0))


def load_model():
    net = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(30)])
    net[17].running_mean.fill_(9.0)
    return net
"""
)


def _flagged_rows(report: str) -> tuple[list[str], list[str]]:
    """Rows of flagged layers: in the table of layers, and in that of their shares."""
    table = report.partition("BatchNorm1d layers: ✗ ")[2]
    layers, _, rest = table.partition("Where the mismatch at inference comes from")
    shares, _, _ = rest.partition("   mean of ")
    first, second = ([line for line in part.splitlines() if line.startswith("✗")] for part in (layers, shares))
    return first, second


def _widest(text: str) -> int:
    return max(map(cell_len, text.splitlines()))


def test_a_pipe_gets_plain_text(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    found = workspace.run(*SCAN)
    assert (found.code, found.stderr) == (FINDINGS, "")
    assert "\x1b" not in found.stdout
    assert _widest(found.stdout) <= 80
    assert "✗ 1 of 1 layer is flagged" in found.stdout


def test_messages_are_wrapped_on_a_terminal_alone(workspace: Workspace) -> None:
    """What reads them from a pipe goes by lines, whatever COLUMNS says."""
    arguments = ("verify", "a_report_that_is_missing.json", "another.json")
    usual = workspace.run(*arguments, COLUMNS="40").stderr
    narrow = run_in_terminal(workspace, *arguments, stream="stderr", columns=40).stderr
    assert usual.count("\n") == 1
    assert narrow.split() == usual.split()
    assert _widest(narrow) <= 40 < _widest(usual)


@pytest.mark.parametrize(
    ("environment", "colored"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["color", "no-color", "dumb"],
)
def test_color_is_for_terminals_that_want_it(workspace: Workspace, environment: dict[str, str], colored: bool) -> None:
    workspace.write("model.py", SHIFTED)
    found = run_in_terminal(workspace, *SCAN, stream="stdout", **environment)
    assert (found.code, found.stderr) == (FINDINGS, "")
    assert ("\x1b[" in found.stdout) is colored


@pytest.mark.parametrize(
    ("environment", "colored"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
    ids=["plain", "forced", "both"],
)
def test_color_is_for_pipes_that_are_forced(workspace: Workspace, environment: dict[str, str], colored: bool) -> None:
    workspace.write("model.py", SHIFTED)
    found = workspace.run(*SCAN, **environment)
    assert ("\x1b[" in found.stdout) is colored
    assert found.stderr == ""  # no bar moves there


def test_a_large_network_fits_a_screen(workspace: Workspace) -> None:
    workspace.write("model.py", DEEP)
    lines = workspace.run(*SCAN).stdout.splitlines()
    assert len(lines) <= 40
    rows = [line.split()[:3] for line in lines if line.startswith("✗  ")]
    assert rows == [["✗", "17", "1"], ["✗", "{18..29}", "12"], ["✗", "{0..16}", "17"]]  # layers alike, worst first
    assert "bnprobe recalibrate model.py" in lines[-1]


def test_a_narrow_terminal_is_kept_to(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    found = run_in_terminal(workspace, *SCAN, stream="stdout", columns=60, NO_COLOR="1")
    assert found.code == FINDINGS
    assert 40 < _widest(found.stdout) <= 60


def test_progress_is_shown_on_a_terminal(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    found = run_in_terminal(workspace, *SCAN, stream="stderr")
    assert found.code == FINDINGS
    assert "micro-batches" in found.stderr
    assert "16/" in found.stderr
    assert "whether the statistics fit another eps" in found.stderr  # the last measurement, which has no count
    assert "\x1b" not in found.stdout


def test_a_large_network_shows_its_worst_layers_and_a_count(workspace: Workspace) -> None:
    workspace.write("model.py", DEEP)
    report = workspace.run(*SCAN, "--verbose").stdout
    assert "30 BatchNorm1d layers: ✗ 30 flagged" in report
    rows, shares = _flagged_rows(report)
    assert len(rows) == len(shares) == 25
    assert any(line.split()[1] == "17" for line in rows if line.startswith("✗1"))
    assert "5 layers with less mismatch not shown (✗ 5 flagged); --all shows all." in report
    assert "mean of 30 layers" in report
    assert "Stale running statistics (BN203): 1 of 30 layers" in report
    assert "mismatch from earlier layers (" in report  # said once, as what follows from layer 17
    assert [len(rows) for rows in _flagged_rows(workspace.run(*SCAN, "--all").stdout)] == [30, 30]
