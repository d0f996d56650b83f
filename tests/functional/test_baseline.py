"""``--baseline`` and ``--write-baseline`` of scan and lint: what is known passes, and what is new or worse does not."""

from __future__ import annotations

import json

import pytest

from functional.command import CLEAN, ERROR, FINDINGS, SHIFTED, Workspace

TWICE = SHIFTED.replace("self.head =", "self.other = nn.BatchNorm2d(2)\n        self.head =").replace(
    "self.bn(x)", "self.other(self.bn(x) + SHIFT)"
)
STALE = (
    SHIFTED
    + """

def load_model():
    net = Net()
    net.bn.running_mean.fill_(0.01)
    return net
"""
)
"""As SHIFTED, but its statistics were updated once: how wrong they are is what is found."""
FAULTY = SHIFTED.replace("nn.BatchNorm2d(2)", "nn.BatchNorm2d(2, momentum=0.99)")


@pytest.fixture
def known(workspace: Workspace) -> Workspace:
    """A model with one flagged layer, which the baseline knows."""
    workspace.write("model.py", SHIFTED)
    found = workspace.scan("--write-baseline", "known.json")
    assert (found.code, found.stderr) == (CLEAN, "Baseline written to known.json.\n")
    return workspace


def test_what_is_known_passes_and_what_is_new_does_not(known: Workspace) -> None:
    found = known.scan("--baseline", "known.json")
    assert (found.code, found.stderr) == (CLEAN, "")
    assert "Against the baseline known.json: 0 new, 0 worse, 1 known, 0 fixed, 0 stale" in found.stdout
    assert known.scan().code == FINDINGS
    known.write("model.py", TWICE)
    found = known.scan("--baseline", "known.json", "--format", "json")
    states = {change["layer"]: change["state"] for change in found.report(FINDINGS)["baseline"]["changes"]}
    assert states == {"bn": "known", "other": "new"}


def test_what_is_worse_does_not_pass_and_what_is_fixed_is_named(known: Workspace) -> None:
    known.write("model.py", STALE)
    assert known.scan("--write-baseline", "known.json", "--force").code == CLEAN
    known.write("model.py", STALE.replace("SHIFT = 3.0", "SHIFT = 6.0"))
    found = known.scan("--baseline", "known.json")
    assert (found.code, "1 worse" in found.stdout) == (FINDINGS, True)
    known.write("model.py", STALE.replace("SHIFT = 3.0", "SHIFT = 0.0"))
    found = known.scan("--baseline", "known.json")
    assert (found.code, "1 fixed" in found.stdout) == (CLEAN, True)


def test_a_baseline_of_another_batch_size_is_refused_and_the_report_is_not_lost(known: Workspace) -> None:
    found = known.run("scan", "model.py", "--batch-size", "4", "--baseline", "known.json", "--verbose")
    assert found.code == ERROR
    assert found.stderr.startswith(
        "bnprobe: error: The baseline known.json is of another batch size: 2, and this is 4."
    )
    assert "1 of 1 layer flagged" in found.stdout


def test_a_file_is_the_same_for_the_same_findings_and_is_replaced_only_on_request(known: Workspace) -> None:
    text = (known.folder / "known.json").read_text()
    message = known.scan("--write-baseline", "known.json").error()
    assert message == "known.json already exists; give another --write-baseline, or --force to overwrite."
    assert known.scan("--write-baseline", "known.json", "--force").code == CLEAN
    assert (known.folder / "known.json").read_text() == text
    message = known.scan("--baseline", "known.json", "--write-baseline", "known.json", "--force").error()
    assert message == "--write-baseline known.json is a file that this command reads; give another name."


@pytest.mark.parametrize("report", [("--output", "./one.json"), ("--output-dir", ".")])
def test_it_is_another_file_than_the_report(known: Workspace, report: tuple[str, str]) -> None:
    name = "one.json" if report[0] == "--output" else "scan.json"
    message = known.scan(*report, "--format", "json", "--write-baseline", name, "--force").error()
    assert message == f"--write-baseline {name} is the file of the report, too; give another name."
    assert not (known.folder / name).exists()


def test_what_is_no_baseline_is_known_before_the_model_is_loaded(known: Workspace) -> None:
    known.write("model.py", "raise RuntimeError('loaded')")
    assert known.scan("--baseline", "none.json").error().startswith("The baseline none.json does not exist.")
    known.write("other.json", '{"schema_version": 1}')
    assert (
        known.scan("--baseline", "other.json").error()
        == "other.json: This is no baseline: --write-baseline writes one."
    )
    known.write("cut.json", (known.folder / "known.json").read_text()[:100])
    assert "is incomplete" in known.scan("--baseline", "cut.json").error()


def test_it_is_no_report(known: Workspace) -> None:
    message = known.run("show", "known.json").error()
    assert message == "known.json: This is a baseline, not a report: --baseline of a scan or lint reads it."


def test_a_lint_has_a_baseline_too(workspace: Workspace) -> None:
    workspace.write("model.py", FAULTY)
    assert workspace.run("lint", "model.py").code == FINDINGS
    assert workspace.run("lint", "model.py", "--write-baseline", "b.json").code == CLEAN
    assert [known["rule"] for known in json.loads((workspace.folder / "b.json").read_text())["findings"]] == ["BN101"]
    found = workspace.run("lint", "model.py", "--baseline", "b.json", "--format", "github")
    assert (found.code, found.stdout.startswith("::notice")) == (CLEAN, True)
    workspace.write("model.py", FAULTY.replace("momentum=0.99", "momentum=0.999"))
    found = workspace.run("lint", "model.py", "--baseline", "b.json")
    assert (found.code, "1 worse" in found.stdout) == (FINDINGS, True)


def test_a_page_names_what_is_known(known: Workspace) -> None:
    assert known.scan("--baseline", "known.json", "--format", "html", "--output", "page.html").code == CLEAN
    text = (known.folder / "page.html").read_text(encoding="ascii")
    assert "Against the baseline known.json: 0 new, 0 worse, 1 known" in text
