"""The action, the pre-commit hook and the GitLab job do what they say: their steps run in the shells that run them."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from functional.command import CLEAN, COMMAND, ERROR, FINDINGS, MODEL, REPOSITORY, SHIFTED, Result, Workspace

ACTION: dict[str, Any] = yaml.safe_load((REPOSITORY / "action.yml").read_text(encoding="utf-8"))
HOOK: dict[str, Any] = yaml.safe_load((REPOSITORY / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))[0]
GITLAB: dict[str, Any] = yaml.safe_load((REPOSITORY / "docs/ci/bnprobe.gitlab-ci.yml").read_text(encoding="utf-8"))
PATH = os.pathsep.join([str(COMMAND.parent), os.environ["PATH"]])
FAULTY = SHIFTED.replace("nn.BatchNorm2d(2)", "nn.BatchNorm2d(2, momentum=0.99)")


def act(workspace: Workspace, root: str = "", **inputs: str) -> tuple[Result, str, dict[str, str]]:
    """Run the step of the action as GitHub does: the result, the summary of the job, and the outputs."""
    step = ACTION["runs"]["steps"][1]
    given = {name: str(value.get("default", "")) for name, value in ACTION["inputs"].items()} | inputs
    variables = {name: _filled(text, given) for name, text in step["env"].items()}
    files = {name: workspace.folder / name for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    for path in files.values():
        path.write_text("")
    variables |= {name: str(path) for name, path in files.items()}
    variables["GITHUB_WORKSPACE"] = root or str(workspace.folder)
    shell = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")
    found = workspace.call(*shell, step["run"], PATH=PATH, **variables)
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return found, files["GITHUB_STEP_SUMMARY"].read_text(), outputs


def _filled(text: str, given: dict[str, str]) -> str:
    for name, value in given.items():
        text = text.replace(f"${{{{ inputs.{name} }}}}", value)
    assert "${{" not in text
    return text


def test_the_action_annotates_summarizes_and_fails_like_the_scan(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    found, summary, outputs = act(workspace, target="model.py", arguments="--batch-size=2\n--max-batches=16\n")
    assert found.code == FINDINGS
    assert outputs == {"exit-code": "1", "sarif": "./bnprobe-report/scan.sarif"}
    assert summary.startswith("### bnprobe: ✗ 1 of 1 layer is flagged")
    assert "\n::error file=model.py,line=14,title=" in found.stdout
    names = {path.name for path in (workspace.folder / "bnprobe-report").iterdir()}
    assert names == {"scan.json", "scan.junit.xml", "scan.sarif", "scan.md", "scan.github.txt"}
    assert json.loads((workspace.folder / outputs["sarif"]).read_text())["version"] == "2.1.0"
    report = json.loads((workspace.folder / "bnprobe-report/scan.json").read_text())
    assert (report["scan"]["batch_size"], report["scan"]["batches"] <= 16) == (2, True)


def test_the_action_lints_against_a_baseline(workspace: Workspace) -> None:
    workspace.write("model.py", FAULTY)
    assert workspace.run("lint", "model.py", "--write-baseline", "known.json").code == CLEAN
    found, summary, outputs = act(workspace, command="lint", target="model.py", baseline="known.json")
    assert (found.code, outputs["exit-code"]) == (CLEAN, "0")
    assert "Against the baseline known.json: 0 new" in summary
    assert act(workspace, command="lint", target="model.py")[0].code == FINDINGS


def test_files_are_named_from_the_root_of_the_repository(workspace: Workspace) -> None:
    workspace.write("models/net/model.py", SHIFTED)
    inputs = {"target": "model.py", "arguments": "--batch-size=2", "working-directory": "models/net"}
    here = Workspace(workspace.folder / "models/net")
    found, _, _ = act(here, **inputs, root=str(workspace.folder))
    assert "\n::error file=models/net/model.py,line=14,title=" in found.stdout
    log = json.loads((here.folder / "bnprobe-report/scan.sarif").read_text())
    place = log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "models/net/model.py"


def test_an_error_is_the_exit_code_of_the_action_too(workspace: Workspace) -> None:
    found, summary, outputs = act(workspace, target="none.py")
    assert (found.code, summary, outputs) == (ERROR, "", {"exit-code": "2"})
    assert "bnprobe: error: " in found.stderr


def test_no_input_is_a_command(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    hostile = "x; touch gone; $(touch gone) `touch gone` '; touch gone; \"; touch gone #"
    for name in ("target", "arguments", "baseline", "command", "output-dir"):
        act(workspace, **{"target": "model.py", "command": "lint", name: hostile})
    assert not (workspace.folder / "gone").exists()
    assert all("inputs." not in step["run"] for step in ACTION["runs"]["steps"])


def test_the_action_installs_the_package_with_what_its_formats_need() -> None:
    install = ACTION["runs"]["steps"][0]
    assert install["run"] == 'python -m pip install "${PACKAGE}[ci]"'
    assert install["env"]["PACKAGE"].startswith("${{ inputs.package || github.action_path }}")
    assert install["if"] == "inputs.package != 'none'"
    # Defaults are read before there is an action whose path could be known.
    assert not any("action_path" in str(each.get("default")) for each in ACTION["inputs"].values())


def test_the_hook_lints_the_model_that_its_arguments_name(workspace: Workspace) -> None:
    workspace.write("model.py", FAULTY)
    found = workspace.call(*shlex.split(HOOK["entry"]), "model.py", PATH=PATH)
    assert (found.code, "BN101 error" in found.stdout or "BN101 warning" in found.stdout) == (FINDINGS, True)
    workspace.write("model.py", MODEL)
    assert workspace.call(*shlex.split(HOOK["entry"]), "model.py", PATH=PATH).code == CLEAN
    assert (HOOK["pass_filenames"], HOOK["language"]) == (False, "system")


def test_the_gitlab_job_leaves_a_test_report(workspace: Workspace) -> None:
    assert workspace.run("init", "probe").code == CLEAN
    job = GITLAB["bnprobe"]
    codes = [workspace.call("bash", "-eo", "pipefail", "-c", line, PATH=PATH).code for line in job["script"]]
    assert codes == [CLEAN, CLEAN]
    report = workspace.folder / job["artifacts"]["reports"]["junit"]
    assert ElementTree.parse(report).getroot().find(".//testcase") is not None
    assert Path(job["artifacts"]["paths"][0]) == report.parent.relative_to(workspace.folder)
