"""A report is written whole or not at all, and what cannot be written is known before anything is measured."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from functional.command import CLEAN, COMMAND, ERROR, FINDINGS, MODEL, SHIFTED, TIMEOUT, Workspace
from functional.processes import run_on_a_full_disk

LEAVES_A_TRACE = "import pathlib\n\npathlib.Path('loaded').touch()\n"


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_report_is_written_whole(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    workspace.write("report.json", "old")
    found = workspace.scan("--format", "json", "--output", "report.json", "--force", "--verbose")
    assert (found.code, found.stderr) == (FINDINGS, "Report written to report.json.\n")
    assert "✗ 1 of 1 layer flagged" in found.stdout
    assert json.loads((workspace.folder / "report.json").read_text())["summary"]["flagged"] == 1
    assert _names(workspace.folder) == {"model.py", "report.json"}


def test_a_terminal_report_in_a_file_is_plain_text(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    target = workspace.write("reports/first.txt", "old")
    link = workspace.folder / "latest.txt"
    link.symlink_to(target)
    assert workspace.scan("--output", "latest.txt", "--force").code == CLEAN
    assert link.is_symlink()
    written = target.read_text(encoding="utf-8")
    assert written.startswith("bnprobe ")
    assert "1 BatchNorm2d layer: ✓ 1 fine" in written
    assert written.endswith("--format json --output report.json\n")
    assert "\x1b" not in written


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("no/report.json", "The folder no of --output does not exist; create it first."),
        (".", "--output . is a folder; give a file in it."),
        pytest.param(
            "locked/report.json",
            "The folder locked of --output cannot be written to.",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere"),
        ),
    ],
)
def test_a_bad_output_is_known_before_the_scan(workspace: Workspace, output: str, said: str) -> None:
    workspace.write("model.py", MODEL + LEAVES_A_TRACE)
    (workspace.folder / "locked").mkdir(mode=0o555)
    assert workspace.scan("--output", output).error() == said
    assert not (workspace.folder / "loaded").exists()


def test_several_formats_go_to_a_folder_and_people_read_stdout(workspace: Workspace) -> None:
    workspace.write("model.py", SHIFTED)
    found = workspace.scan("--format", "json", "--format", "terminal", "--output-dir", "new/out")
    assert (found.code, found.stderr) == (FINDINGS, "Report written to new/out/scan.json, new/out/scan.txt.\n")
    out = workspace.folder / "new/out"
    assert _names(out) == {"scan.json", "scan.txt"}
    assert (out / "scan.txt").read_text(encoding="utf-8") == found.stdout
    assert json.loads((out / "scan.json").read_text())["summary"]["flagged"] == 1
    again = workspace.scan("--format", "json", "--output-dir", "new/out")
    assert again.error().startswith("new/out/scan.json already exists; give another --output-dir, or --force")
    assert workspace.scan("--format", "json", "--output-dir", "new/out", "--force").code == FINDINGS


def test_every_command_writes_several_formats(workspace: Workspace) -> None:
    loss = "def loss(model, batch):\n    return model(batch[0]).square().mean()\nload_eval_data = load_data\n"
    workspace.write("model.py", SHIFTED + loss)
    target = ("model.py", "--batch-size", "4")
    runs = {
        "scan": (*target,),
        "sweep": (*target, "--batch-sizes", "4,8"),
        "lint": ("model.py",),
        "convert": (*target, "--layers", "*", "--force", "-o", "w.safetensors"),
        "recalibrate": (*target, "-o", "v.safetensors"),
        "verify": ("out/scan.json", "out/scan.json"),
        "export": (*target, "-o", "w.pt2"),
    }
    for command, arguments in runs.items():
        found = workspace.run(command, *arguments, "--format", "json", "--format", "terminal", "--output-dir", "out")
        assert f"Report written to out/{command}.json, out/{command}.txt." in found.stderr
        written = (workspace.folder / f"out/{command}.txt").read_text(encoding="utf-8")
        assert found.stdout == written
        shown = workspace.run("show", f"out/{command}.json")
        assert (shown.code, shown.stderr) == (CLEAN, "")
    shown = workspace.run("convert", *target, "--check", "--format", "json", "--output-dir", "out", "--force")
    assert "would become" in shown.stdout
    again = workspace.run("show", "out/convert.json").stdout
    assert again == shown.stdout[: len(again)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--format", "json", "--format", "terminal"), "--format json --format terminal needs a file for each: give"),
        (("--output", "a", "--output-dir", "b"), "--output and --output-dir both say where the report goes: give one."),
        (("--output-dir", "model.py/out"), "--output-dir model.py/out cannot be a folder: model.py is a file."),
        (("--output-dir", "model.py"), "--output-dir model.py cannot be a folder: model.py is a file."),
    ],
    ids=["no-folder", "both", "below-a-file", "a-file"],
)
def test_where_several_formats_cannot_go(workspace: Workspace, options: tuple[str, ...], said: str) -> None:
    workspace.write("model.py", MODEL + LEAVES_A_TRACE)
    assert workspace.scan(*options).error().startswith(said)
    assert _names(workspace.folder) == {"model.py"}


def test_of_several_files_all_are_written_or_none(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    formats = ("--format", "terminal", "--format", "json", "--output-dir", ".")
    arguments = ("scan", "model.py", "--batch-size", "2", *formats)
    found = run_on_a_full_disk(workspace, *arguments, largest_file=4000)
    assert found.error() == "scan.txt, scan.json could not be written: File too large. No file was changed."
    assert _names(workspace.folder) == {"model.py"}
    workspace.write("scan.json", "old")
    assert workspace.run(*arguments).error().startswith("scan.json already exists")
    assert _names(workspace.folder) == {"model.py", "scan.json"}


def test_a_write_that_fails_leaves_the_old_file(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    workspace.write("report.json", "old")
    arguments = ("scan", "model.py", "--batch-size", "2", "--format", "json", "--output", "report.json", "--force")
    found = run_on_a_full_disk(workspace, *arguments, largest_file=512)
    assert found.error() == "report.json could not be written: File too large. No file was changed."
    assert (workspace.folder / "report.json").read_text() == "old"
    assert _names(workspace.folder) == {"model.py", "report.json"}


def test_a_device_is_written_to_and_not_replaced(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    message = workspace.scan("--output", "/dev/full").error()
    assert message == "/dev/full could not be written: No space left on device. No file was changed."
    assert Path("/dev/full").is_char_device()


def test_an_output_never_replaces_what_the_command_reads(workspace: Workspace) -> None:
    model = workspace.write("model.py", MODEL)
    spec = workspace.write("spec.yaml", "model: model.py\ndata: {batch_size: 2}\n")
    for command in ("scan", "lint", "sweep"):
        for path in (model, spec):
            found = workspace.run(command, "spec.yaml", "--output", path.name, "--force")
            assert found.error() == f"--output {path.name} is a file that this command reads; give another name."
    assert model.read_text(encoding="utf-8") == MODEL


def test_a_reader_that_leaves_is_no_error(workspace: Workspace) -> None:
    explain = subprocess.Popen(
        [COMMAND, "explain"],
        cwd=workspace.folder,
        env=workspace.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert explain.stdout is not None
    explain.stdout.close()
    assert explain.stderr is not None
    with explain.stderr:
        assert explain.stderr.read() == ""
    assert explain.wait(TIMEOUT) == CLEAN


def test_a_failed_scan_leaves_the_old_report(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL + "def load_data(batch_size):\n    return []\n")
    workspace.write("report.json", "old")
    assert workspace.scan("--format", "json", "--output", "report.json", "--force").code == ERROR
    assert (workspace.folder / "report.json").read_text() == "old"


def test_nothing_is_replaced_without_force(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL + LEAVES_A_TRACE)
    workspace.write("spec.yaml", "model: model.py\ndata: {batch_size: 2}\n")
    workspace.write("mine.txt", "mine")
    said = "{} already exists; give another --output, or --force to overwrite."
    for command in ("scan", "lint", "sweep"):
        for name in ("mine.txt", "model.py", "spec.yaml"):
            assert workspace.run(command, "spec.yaml", "--output", name).error() == said.format(name)
    assert workspace.run("verify", "a.json", "b.json", "--output", "mine.txt").error() == said.format("mine.txt")
    assert not (workspace.folder / "loaded").exists()
    assert (workspace.folder / "mine.txt").read_text() == "mine"
    assert workspace.run("lint", "spec.yaml", "--output", "mine.txt", "--force").code == CLEAN
    assert "BN102" in (workspace.folder / "mine.txt").read_text(encoding="utf-8")


def test_a_file_that_appears_during_the_scan_is_not_replaced(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL + "import pathlib\npathlib.Path('report.txt').write_text('mine')\n")
    assert "report.txt already exists" in workspace.scan("--output", "report.txt").error()
    assert (workspace.folder / "report.txt").read_text() == "mine"


def test_verify_does_not_replace_what_it_reads(workspace: Workspace) -> None:
    workspace.write("a.json", "{}")
    message = workspace.run("verify", "a.json", "b.json", "--output", "a.json", "--force").error()
    assert message == "--output a.json is a file that this command reads; give another name."


def test_a_replaced_file_keeps_its_rights_and_its_link(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    target = workspace.write("kept/report.txt", "old")
    target.chmod(0o640)
    (workspace.folder / "link").symlink_to("kept/report.txt")
    assert workspace.run("lint", "model.py", "--output", "link", "--force").code == CLEAN
    assert (workspace.folder / "link").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert "BN102" in target.read_text(encoding="utf-8")
    (workspace.folder / "circle").symlink_to("circle")
    assert (
        "cannot be written: Too many levels of symbolic links"
        in workspace.run("lint", "model.py", "--output", "circle").error()
    )


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (("scan", "--output", "out.txt"), {"out.txt"}),
        (("lint", "--output", "out.txt"), {"out.txt"}),
        (
            ("recalibrate", "-o", "out.safetensors"),
            {"out.safetensors", "out.record.json", "out.before.json", "out.after.json"},
        ),
        (("export", "-o", "out.pt2"), {"out.pt2"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_model_file_that_changes_the_working_directory_moves_no_output(
    workspace: Workspace, arguments: tuple[str, ...], written: set[str]
) -> None:
    other = workspace.folder / "other"
    other.mkdir()
    workspace.write("model.py", SHIFTED + f"import os\nos.chdir({str(other)!r})\n")
    more = () if arguments[0] == "lint" else ("--batch-size", "2")
    assert workspace.run(arguments[0], "model.py", *more, *arguments[1:]).code in (CLEAN, FINDINGS)
    assert _names(workspace.folder) == {"model.py", "other", *written}
    assert _names(other) == set()


def test_a_model_file_that_changes_the_working_directory_moves_no_input(workspace: Workspace) -> None:
    """All paths are relative: to the working directory as it was when the command began."""
    workspace.write("model.py", SHIFTED)
    assert (
        workspace.run("scan", "model.py", "--batch-size", "4", "--format", "json", "--output", "r.json").code
        == FINDINGS
    )
    assert workspace.run("recalibrate", "model.py", "--batch-size", "4", "-o", "w.safetensors").code == CLEAN
    (workspace.folder / "other").mkdir()
    workspace.write("model.py", SHIFTED + "import os\nos.chdir('other')\n")
    for name in ("data.py", "held_out.py"):
        workspace.write(name, SHIFTED)
    workspace.write("loss.py", "def loss(model, batch):\n    return model(batch[0]).square().mean()\n")
    workspace.write("forward.py", "def forward(model, batch):\n    return model(batch[0])\n")
    workspace.write(
        "spec.yaml",
        "{model: model.py, checkpoint: w.safetensors, forward: 'forward.py:forward', loss: 'loss.py:loss',"
        " data: {target: 'data.py:load_data', batch_size: 4}, eval_data: 'held_out.py:load_data'}",
    )
    found = workspace.run("scan", "spec.yaml")
    assert found.code == CLEAN, found.stderr
    found = workspace.run("convert", "spec.yaml", "--report", "r.json", "--check")
    assert (found.code, found.stderr) == (FINDINGS, "")
    assert "r.json" in found.stdout


def test_a_model_file_may_leave_a_working_directory_that_is_gone(workspace: Workspace) -> None:
    gone = "import os\nos.mkdir('gone')\nos.chdir('gone')\nos.rmdir('../gone')\n"
    workspace.write("model.py", SHIFTED + gone)
    found = workspace.run("scan", "model.py", "--batch-size", "4", "--output", "r.json", "--format", "json")
    assert (found.code, found.stderr) == (FINDINGS, "Report written to r.json.\n")
    assert json.loads((workspace.folder / "r.json").read_text())["layers"][0]["location"].startswith("model.py:")


def test_a_repair_that_is_trained_is_not_moved_either(workspace: Workspace) -> None:
    other = workspace.folder / "other"
    other.mkdir()
    loss = "def loss(model, batch):\n    return model(batch[0]).square().mean()\nload_eval_data = load_data\n"
    workspace.write("model.py", SHIFTED + f"import os\nos.chdir({str(other)!r})\n" + loss)
    options = ("--batch-size", "2", "--finetune", "--steps", "4", "-o", "out.safetensors", "--force")
    workspace.run("convert", "model.py", *options)
    assert {"out.safetensors", "out.log.csv", "out.record.json"} <= _names(workspace.folder)
    assert "out.state" not in _names(workspace.folder)
    assert _names(other) == set()


def test_a_pipe_that_nothing_reads_is_no_output(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnprobe.paths.WAIT", 0.05)
    workspace.write("model.py", MODEL)
    os.mkfifo(workspace.folder / "pipe")
    message = workspace.run("lint", "model.py", "--output", "pipe").error()
    assert message == "pipe could not be written: Nothing reads this pipe. No file was changed."
