"""The table of sources in docs/how-to/your-project.md: each command is run on a project as its owner would have it.

``BNPROBE_UPDATE_GOLDEN=1 pytest tests/functional/test_sources.py`` writes the table into the page again.
"""

from __future__ import annotations

import json
import os
import shlex

import pytest

from functional.command import CLEAN, FINDINGS, REPOSITORY, Workspace
from support.compare import assert_same_json
from support.frameworks import framework
from support.sources import SOURCES, Source, table

PAGE = REPOSITORY / "docs" / "how-to" / "your-project.md"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.command)
def test_the_command_of_every_source_works(workspace: Workspace, source: Source) -> None:
    for package in source.packages:
        framework(package)
    source.write(workspace)
    result = workspace.run(*shlex.split(source.command)[1:])
    assert result.code in (CLEAN, FINDINGS), result
    assert result.stdout.startswith("bnprobe ")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.command)
def test_init_writes_a_spec_that_scans_the_same(workspace: Workspace, source: Source) -> None:
    for package in source.packages:
        framework(package)
    source.write(workspace)
    target, *options = shlex.split(source.command)[2:]
    assert workspace.run("init", "--from", target, *options, "probe").code == CLEAN
    few = ("--batches", "2", "--format", "json")
    found = workspace.run("scan", target, *options, *few)
    again = workspace.run("scan", "probe/spec.yaml", *few)
    assert again.code in (CLEAN, FINDINGS), again
    assert_same_json(json.loads(found.stdout)["layers"], json.loads(again.stdout)["layers"])


def test_the_page_shows_them_all() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    if os.environ.get("BNPROBE_UPDATE_GOLDEN") == "1":
        PAGE.write_text(page.replace(shown, table()), encoding="utf-8")
        shown = table()
    assert shown == table()
