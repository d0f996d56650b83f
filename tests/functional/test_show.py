"""``bnprobe show``: every document that a command writes is shown again, and what is no document is explained."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from bnprobe.report import formats_of
from functional.command import CLEAN, ERROR, FINDINGS, SHIFTED, Workspace
from functional.test_watch import FINDING, START, lines, sample
from support import pages


@pytest.fixture
def scanned(workspace: Workspace) -> Workspace:
    """A folder with scan.json, and what the scan printed in scan.txt."""
    workspace.write("model.py", SHIFTED)
    found = workspace.scan("--format", "json", "--format", "terminal", "--output-dir", ".")
    assert found.code == FINDINGS
    return workspace


def test_a_scan_is_shown_as_it_was_printed_without_the_model(scanned: Workspace) -> None:
    (scanned.folder / "model.py").unlink()
    found = scanned.run("show", "scan.json")
    written = (scanned.folder / "scan.txt").read_text(encoding="utf-8")
    assert (found.code, found.stdout, found.stderr) == (CLEAN, written, "")


def test_json_of_json_is_the_same(scanned: Workspace) -> None:
    found = scanned.run("show", "scan.json", "--format", "json")
    assert found.stdout == (scanned.folder / "scan.json").read_text(encoding="utf-8")


def test_files_are_named_after_the_report_and_it_is_not_replaced(scanned: Workspace) -> None:
    found = scanned.run("show", "scan.json", "--format", "json", "--format", "terminal", "--output-dir", "out")
    assert (found.code, found.stderr) == (CLEAN, "Report written to out/scan.json, out/scan.txt.\n")
    message = scanned.run("show", "scan.json", "--format", "json", "--output-dir", ".", "--force").error()
    assert message == "--output-dir scan.json is a file that this command reads; give another name."


def test_a_record_is_shown_with_its_scans(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    printed = workspace.run("recalibrate", "model.py", "--batch-size", "4", "-o", "new.safetensors")
    assert printed.code == CLEAN
    assert workspace.run("show", "new.record.json").stdout == printed.stdout
    (workspace.folder / "new.record.json").rename(workspace.folder / "record.json")
    alone = workspace.run("show", "record.json")
    assert (alone.code, alone.stderr) == (CLEAN, "")
    assert "Mismatch before and after" in printed.stdout
    assert "Mismatch before and after" not in alone.stdout


def test_the_scans_of_a_repair_name_the_spec_and_the_new_weights(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    workspace.write("spec.yaml", "model: {target: model.py}\ndata: {batch_size: 4}\n")
    made = workspace.run("recalibrate", "spec.yaml", "--seed", "1", "--max-batches", "8", "-o", "new.safetensors")
    assert made.code == CLEAN
    scans = {
        "before": "bnprobe scan spec.yaml --seed 1 --max-batches 8",
        "after": "bnprobe scan spec.yaml --seed 1 --max-batches 8 --checkpoint new.safetensors",
    }
    for name, command in scans.items():
        saved = json.loads((workspace.folder / f"new.{name}.json").read_text())
        assert saved["scan"]["command"] == command
        again = workspace.run(*command.split()[1:], "--format", "json", "--exit-zero").report(CLEAN)
        assert again["layers"] == saved["layers"]
    assert "bnprobe recalibrate spec.yaml --seed 1" in workspace.run("show", "new.before.json").stdout


def test_the_command_of_a_scan_from_python_is_one_that_would_make_it(scanned: Workspace) -> None:
    report = json.loads((scanned.folder / "scan.json").read_text())
    assert report["scan"]["command"].startswith("bnprobe scan model.py --batch-size 2 --format json")
    report["scan"]["command"] = None
    scanned.write("python.json", json.dumps(report))
    said = scanned.run("show", "python.json").stdout
    assert "bnprobe recalibrate model.py:load_model --batch-size 2 " in said


def test_what_is_incomplete_newer_or_no_report(scanned: Workspace) -> None:
    whole = (scanned.folder / "scan.json").read_text(encoding="utf-8")
    report = json.loads(whole)
    cases = {
        whole[:2000]: "The JSON report is incomplete: it ends in line",
        whole[: whole.index('"schema_version"') + 5]: "The JSON report is incomplete: it ends in line 2",
        "": "This is not a JSON report of bnprobe",
        "[]": "This is not a JSON report of bnprobe: the top level is not an object.",
        whole.replace('"name": "bnprobe"', "name", 1): "This is not a JSON report of bnprobe: Expecting property name",
        '{"schema_version": 1, "name": "x"}': "This is not a JSON report of bnprobe: its keys are those of no document",
        json.dumps({**report, "schema_version": 2}): "The JSON report has schema_version 2, and this bnprobe reads"
        " schema_version 1. Update bnprobe, or use the version that wrote it.",
        json.dumps({**report, "more": 1, "tool": {"name": "bnprobe", "version": "9.9"}}): "The JSON report does not fit"
        " its schema: more is unknown. It was written by bnprobe 9.9, and this is",
        json.dumps({**report, "scan": 3}): "The JSON report does not fit its schema: scan: ",
    }
    for text, said in cases.items():
        scanned.write("other.json", text)
        assert scanned.run("show", "other.json").error().startswith(f"other.json: {said}"), text[:80]
    assert scanned.run("show", "scna.json").error() == "The report scna.json does not exist. Did you mean scan.json?"
    (scanned.folder / "link.json").symlink_to("gone.json")
    said = "The report link.json is a link to gone.json, which does not exist."
    assert scanned.run("show", "link.json").error() == said


def test_a_mark_of_the_order_of_bytes_is_no_fault(scanned: Workspace) -> None:
    """Editors and shells of Windows put one before a text."""
    text = (scanned.folder / "scan.json").read_text(encoding="utf-8")
    (scanned.folder / "marked.json").write_text(text, encoding="utf-8-sig")
    shown = scanned.run("show", "marked.json")
    assert (shown.code, shown.stdout) == (CLEAN, scanned.run("show", "scan.json").stdout)


VALUES = (0, -1, 1e300, None, "", "x\x1b", [], {}, True, 10**30)


def test_a_report_with_any_other_value_is_shown_or_refused(scanned: Workspace) -> None:
    """No value of a file that others have written may look like a bug of bnprobe's."""
    whole, chance = json.loads((scanned.folder / "scan.json").read_text()), random.Random(0)
    places = list(_places(whole))
    formats = [word for name in formats_of("scan") for word in ("--format", name)]
    for number in range(60):
        report = json.loads(json.dumps(whole))
        place = chance.choice(places)
        node: Any = report
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = chance.choice(VALUES)
        scanned.write("other.json", json.dumps(report))
        found = scanned.run("show", "other.json", *formats, "--output-dir", f"out{number}")
        assert found.code in (CLEAN, ERROR), place
        assert "internal error" not in found.stderr, place


def test_figures_that_contradict_each_other(scanned: Workspace) -> None:
    assert scanned.run("compare", "scan.json", "scan.json", "--format", "json", "--output", "two.json").code == CLEAN
    two = json.loads((scanned.folder / "two.json").read_text())
    two["layers"][0]["points"] = []
    scanned.write("two.json", json.dumps(two))
    message = scanned.run("show", "two.json").error()
    assert message.startswith("two.json fits its schema, but its figures contradict each other: ")
    loss = "def loss(model, batch):\n    return model(batch[0]).square().mean()\nload_eval_data = load_data\n"
    scanned.write("model.py", SHIFTED + loss)
    assert scanned.run("recalibrate", "model.py", "--batch-size", "4", "-o", "w.safetensors").code == CLEAN
    record = json.loads((scanned.folder / "w.record.json").read_text())
    record["proof"]["repaired"] = "another"
    scanned.write("w.record.json", json.dumps(record))
    assert scanned.run("show", "w.record.json").error().startswith("w.record.json fits its schema, but its figures")


# --- Logs of training -------------------------------------------------------------------------------------------------

CHANGE = {"event": "change", "step": 216, "action": "renorm", "layers": ["bn2"]}
EVENTS = [START, sample(100), sample(200), FINDING, CHANGE]


@pytest.fixture
def logged(workspace: Workspace) -> Workspace:
    """A folder with the log of a run in run/."""
    workspace.write("run/monitor.jsonl", lines(*EVENTS))
    return workspace


def test_a_log_is_shown_as_it_is_watched_in_a_pipe(logged: Workspace) -> None:
    watched = logged.run("watch", "run")
    assert "BN201" in watched.stdout
    for path in ("run", "run/monitor.jsonl"):
        assert logged.run("show", path) == watched
        assert logged.run("show", path, "--all") == logged.run("watch", path, "--all")


def test_the_page_of_a_log_is_written(logged: Workspace) -> None:
    found = logged.run("show", "run", "--format", "html", "--output", "page.html")
    assert (found.code, found.stdout) == (CLEAN, logged.run("watch", "run").stdout)
    page = pages.Page((logged.folder / "page.html").read_text(encoding="ascii"))
    assert pages.said(page.all("h1")[0]) == "✗ Batches too small (BN201), at step 216, in bn1."
    assert {"modes-1", "modes-2", "curves-1"} == set(page.charts)
    logged.run("show", "run/monitor.jsonl", "--format", "html", "--output", "page.html", "--force")
    again = pages.Page((logged.folder / "page.html").read_text(encoding="ascii"))
    assert again.text == page.text


def test_files_are_named_after_the_folder_of_a_log(logged: Workspace) -> None:
    for path, name in (("run", "run"), ("run/monitor.jsonl", "monitor")):
        found = logged.run("show", path, "--format", "json", "--format", "terminal", "--output-dir", f"out-{name}")
        assert (found.code, found.stderr) == (
            CLEAN,
            f"Report written to out-{name}/{name}.json, out-{name}/{name}.txt.\n",
        )


def test_a_log_is_not_replaced(logged: Workspace) -> None:
    before = (logged.folder / "run/monitor.jsonl").read_bytes()
    for path in ("run", "run/monitor.jsonl"):
        said = logged.run("show", path, "--format", "json", "--output", "run/monitor.jsonl", "--force").error()
        assert said == "--output run/monitor.jsonl is a file that this command reads; give another name."
    assert (logged.folder / "run/monitor.jsonl").read_bytes() == before


def test_a_log_as_json_is_shown_again(logged: Workspace) -> None:
    logged.write("run/monitor.jsonl", lines(*EVENTS, sample(300, output=None, loss={"train": 1.0, "eval": None})))
    assert logged.run("show", "run", "--format", "json", "--output", "log.json").code == CLEAN
    for format_ in ("json", "terminal", "html"):
        again = logged.run("show", "log.json", "--format", format_)
        assert again == logged.run("show", "run", "--format", format_)
        assert again.code == CLEAN


def test_a_format_that_has_no_logs_says_which_have(logged: Workspace) -> None:
    assert logged.run("show", "run", "--format", "markdown").error() == (
        "--format markdown does not support the log of a monitor; these formats do: terminal, json, html."
    )


def test_what_is_no_log_is_said_as_watch_says_it(workspace: Workspace) -> None:
    workspace.write("gan/generator/monitor.jsonl", lines(START))
    workspace.write("gan/discriminator/monitor.jsonl", lines(START))
    workspace.write("other.jsonl", lines(sample(100)))
    (workspace.folder / "empty").mkdir()
    assert workspace.run("show", "gan").error() == (
        "The folder gan has no monitor.jsonl. Did you mean gan/discriminator?"
    )
    for path in ("gan", "empty", "other.jsonl", "none.jsonl"):
        assert workspace.run("show", path).error() == workspace.run("watch", path).error()
    assert workspace.run("show", "none").error().startswith("The report none does not exist.")


def test_a_log_with_any_other_value_has_a_page(logged: Workspace) -> None:
    places, chance = list(_places(EVENTS)), random.Random(0)
    for _ in range(40):
        events = json.loads(json.dumps(EVENTS))
        *way, last = chance.choice([place for place in places if len(place) > 1])
        node: Any = events
        for key in way:
            node = node[key]
        node[last] = chance.choice(VALUES)
        logged.write("run/monitor.jsonl", "".join(f"{json.dumps(event)}\n" for event in events))
        found = logged.run("show", "run", "--format", "html", "--output", "page.html", "--force")
        assert found.code == CLEAN if way[0] else found.code in (CLEAN, ERROR), (way, last)


def _places(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield (*place, key)
        yield from _places(value, (*place, key))
