"""``bnprobe explain``: the manuals of the rules."""

from __future__ import annotations

import sys

from bnprobe.rules import RULES
from bnprobe.rules.interface import SECTIONS
from functional.command import CLEAN, Workspace
from functional.test_help import HEAVY, IMPORTS


def test_the_list_names_every_rule(workspace: Workspace) -> None:
    found = workspace.run("explain", COLUMNS="80")
    assert (found.code, found.stderr) == (CLEAN, "")
    rows = [line.split() for line in found.stdout.splitlines()]
    assert [row[0] for row in rows] == ["Code", *(rule.code for rule in RULES), "bnprobe"]
    assert all(rule.cause in row for rule, row in zip(RULES, rows[1:], strict=False))
    assert max(map(len, found.stdout.splitlines())) <= 80


def test_a_manual_has_every_section(workspace: Workspace) -> None:
    found = workspace.run("explain", "BN201", COLUMNS="80")
    lines = found.stdout.splitlines()
    assert (found.code, found.stderr) == (CLEAN, "")
    assert lines[0] == "BN201: batches too small"
    assert [line for line in lines if line in SECTIONS] == list(SECTIONS)
    assert "\x1b" not in found.stdout
    assert all(line == line.rstrip() and len(line) <= 80 for line in lines)


def test_a_cause_will_do_for_a_code(workspace: Workspace) -> None:
    assert workspace.run("explain", "small_batch").stdout == workspace.run("explain", "bn201").stdout


def test_an_unknown_rule_names_the_nearest(workspace: Workspace) -> None:
    assert workspace.run("explain", "BN102a").error() == (
        'There is no rule "BN102a"; the nearest is BN102. `bnprobe explain` without a code lists all rules.'
    )


def test_it_imports_nothing_slow(workspace: Workspace) -> None:
    found = workspace.call(sys.executable, "-c", IMPORTS, "explain", "lag")
    assert found.code == CLEAN
    wanted = {"pydantic", "sysconfig"}  # typer reads the argument with the former, which imports the latter
    assert (HEAVY - wanted).isdisjoint(found.stderr.split())
