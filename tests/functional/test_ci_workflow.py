"""The example workflow of docs/ci does what it says, on what ``bnprobe init probe`` writes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import yaml

from functional.command import CLEAN, COMMAND, FINDINGS, REPOSITORY, Result, Workspace

WORKFLOW = yaml.safe_load((REPOSITORY / "docs" / "ci" / "bnprobe.yml").read_text(encoding="utf-8"))
JOBS: dict[str, Any] = WORKFLOW["jobs"]


@pytest.fixture
def started(workspace: Workspace) -> Workspace:
    assert workspace.run("init", "probe").code == CLEAN
    return workspace


def test_check_fails_with_the_plan(started: Workspace) -> None:
    lint, check = _job(started, "check")
    assert (lint.code, check.code) == (CLEAN, FINDINGS)
    assert "2 of 2 normalization layers would become batch-renorm" in check.stdout
    assert sorted(path.name for path in started.folder.iterdir()) == ["probe"]


def test_repair_passes_and_leaves_what_is_uploaded(started: Workspace) -> None:
    steps = _job(started, "repair")
    assert [step.code for step in steps] == [CLEAN] * 3
    assert "✓ flagged==0: 0" in steps[0].stdout
    upload = next(step for step in JOBS["repair"]["steps"] if "upload" in step.get("uses", ""))
    kept = {path.name.removeprefix("repaired.") for path in started.folder.glob(upload["with"]["path"])}
    assert kept == {"safetensors", "record.json", "before.json", "after.json", "log.csv", "pt2"}


def _job(workspace: Workspace, name: str) -> list[Result]:
    """Run the steps that are not pip's, in the shell that GitHub runs them in."""
    lines = [step["run"] for step in JOBS[name]["steps"] if not step.get("run", "pip").startswith("pip")]
    path = os.pathsep.join([str(COMMAND.parent), os.environ["PATH"]])
    return [workspace.call("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", line, PATH=path) for line in lines]
