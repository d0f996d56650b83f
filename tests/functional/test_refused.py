"""What the operating system refuses is said in a sentence: permissions, names, links, folders that are gone."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import bnprobe
from functional import command
from functional.command import CLEAN, MODEL, NOTHING, REPOSITORY, Result, Workspace

NOBODY = 65534
LONG = "a" * 300
SCAN = ("--batch-size", "4", "--batches", "2")


@contextmanager
def without_rights() -> Iterator[None]:
    """Run the block as a user whom permissions bind, where the tests run as root."""
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A folder that everybody may use, in which the command runs without the rights of root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    workspace = Workspace(folder)
    workspace.write("model.py", MODEL).chmod(0o666)
    for module in pkgutil.walk_packages(bnprobe.__path__, "bnprobe."):  # they may not be readable then
        if "starter" not in module.name:
            importlib.import_module(module.name)
    assert workspace.run("scan", "model.py", *SCAN).code == CLEAN  # what torch and scipy import in it
    real = command.main

    def main() -> None:
        with without_rights():
            real()

    monkeypatch.setattr(command, "main", main)
    yield workspace
    for each in (folder, *folder.rglob("*")):
        if not each.is_symlink():
            each.chmod(0o777)
    shutil.rmtree(folder)


def denied(path: Path) -> Path:
    path.chmod(0)
    return path


def test_a_model_file_that_may_not_be_read(public: Workspace) -> None:
    denied(public.folder / "model.py")
    assert "model.py could not be read: Permission denied." in public.run("scan", "model.py", *SCAN).error()


@pytest.mark.parametrize("target", ["inside/model.py", "inside/spec.yaml"])
def test_a_folder_that_may_not_be_entered(public: Workspace, target: str) -> None:
    public.write("inside/model.py", MODEL)
    denied(public.folder / "inside")
    assert public.run("scan", target, *SCAN).error() == f"The file {target} cannot be read: Permission denied."


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_weights_that_may_not_be_read(public: Workspace, name: str) -> None:
    denied(public.write(f"inside/{name}", "{}"))
    message = public.run("scan", "model.py", *SCAN, "--checkpoint", f"inside/{name}").error()
    assert message == f"The checkpoint inside/{name} could not be opened: Permission denied."
    denied(public.folder / "inside")
    message = public.run("scan", "model.py", *SCAN, "--checkpoint", f"inside/{name}").error()
    assert message == f"The checkpoint inside/{name} cannot be read: Permission denied."
    message = public.run("scan", "model.py", *SCAN, "--checkpoint", "inside").error()
    assert message == "The folder inside could not be read: Permission denied."


def test_a_pyproject_that_may_not_be_read(public: Workspace) -> None:
    denied(public.write("pyproject.toml", "[tool.bnprobe]\n"))
    assert "pyproject.toml could not be read" in public.run("scan", "model.py", *SCAN).error()


@pytest.mark.parametrize(
    "words", ["recalibrate model.py -o", "convert model.py --finetune -o", "lint model.py --output"]
)
def test_an_output_that_may_not_be_written(public: Workspace, words: str) -> None:
    public.write("inside/empty", "")
    denied(public.folder / "inside")
    message = public.run(*words.split(), "inside/out.safetensors").error()
    assert "inside/out.safetensors cannot be written: Permission denied." in message


def test_a_state_that_may_not_be_read(public: Workspace) -> None:
    public.write("out.state/made-by-bnprobe.txt", "This folder was made by bnprobe")
    denied(public.folder / "out.state")
    finetune = ("convert", "model.py", "--finetune", "-o", "out.safetensors", *SCAN)
    for more in ((), ("--force",), ("--resume",)):
        assert "out.state was not made by bnprobe" in public.run(*finetune, *more).error()


NAMES = {LONG: "File name too long", "loop": "Too many levels of symbolic links"}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_file_can_have(workspace: Workspace, name: str) -> None:
    workspace.write("model.py", MODEL)
    (workspace.folder / "loop").symlink_to("loop")
    for suffix in (".py", ".yaml", ".json", ".pt", ".safetensors"):
        (workspace.folder / f"loop{suffix}").symlink_to(f"loop{suffix}")
    cases = {
        ("scan", f"{name}.py", *SCAN): "The file",
        ("scan", f"{name}.yaml", *SCAN): "The file",
        ("scan", "model.py", *SCAN, "--checkpoint", f"{name}.pt"): "The checkpoint",
        ("scan", "model.py", *SCAN, "--output", f"{name}.json"): "--output",
        ("recalibrate", "model.py", "-o", f"{name}.safetensors"): "-o",
        ("convert", "model.py", "-o", f"{name}.safetensors"): "-o",
        ("export", "model.py", *SCAN[:2], "--to", "torchscript", "-o", f"{name}.pt"): "-o",
        ("verify", f"{name}.json", f"{name}.json"): "The report",
        ("convert", "model.py", "-o", "out.safetensors", *SCAN, "--report", f"{name}.json"): "The report",
    }
    for arguments, beginning in cases.items():
        message = workspace.run(*arguments).error()
        assert message.startswith(f"{beginning} {name}"), message
        assert NAMES[name] in message


def test_a_link_to_what_is_gone_says_so(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    for name in ("other.py", "weights.pt"):
        (workspace.folder / name).symlink_to("gone")
    said = "is a link to gone, which does not exist."
    assert workspace.run("scan", "other.py", *SCAN).error() == f"The file other.py {said}"
    found = workspace.run("scan", "model.py", *SCAN, "--checkpoint", "weights.pt")
    assert found.error() == f"The checkpoint weights.pt {said}"


def test_a_name_that_leaves_no_room_for_more(workspace: Workspace) -> None:
    """The name of the output fits, and that of a temporary file beside it would not."""
    workspace.write("model.py", MODEL)
    output = "a" * 243 + ".safetensors"
    result = workspace.run("export", "model.py", "--batch-size", "4", "--to", "torchscript", "-o", output)
    assert result.code == CLEAN
    assert [path.name for path in workspace.folder.iterdir() if path.name != "model.py"] == [output]
    assert workspace.run("recalibrate", "model.py", "--batch-size", "4", "-o", output, "--force").code == CLEAN


@pytest.mark.parametrize("key", ["checkpoint: ~nosuchuser/w.pt", "loss: ~nosuchuser/m.py:f", "data: ~nosuchuser/m.py"])
def test_a_user_who_does_not_exist(workspace: Workspace, key: str) -> None:
    workspace.write("model.py", MODEL)
    workspace.write("spec.yaml", f"model: model.py\n{key}\n")
    assert "~nosuchuser does not exist" in workspace.run("scan", "spec.yaml", *SCAN).error()


PYPROJECTS = [
    ("tool = 3\n", "tool of {} must be a table, but is 3."),
    ("[tool]\nbnprobe = 3\n", "tool.bnprobe of {} must be a table, but is 3."),
    ("[[[", "{} is not valid TOML"),
    ("a = " + "[" * 5000, "{} is not valid TOML: it is nested too deeply."),
    ("\udcff", "{} could not be read as UTF-8 text"),
]


@pytest.mark.parametrize(("text", "said"), PYPROJECTS, ids=[said for _, said in PYPROJECTS])
def test_an_odd_pyproject_above(workspace: Workspace, text: str, said: str) -> None:
    workspace.write("inside/model.py", MODEL)
    place = workspace.folder / "pyproject.toml"
    place.write_bytes(text.encode(errors="surrogateescape"))
    assert workspace.run("scan", "inside/model.py", *SCAN).error().startswith(said.format(place))


def test_a_folder_of_that_name_is_none(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    (workspace.folder / "pyproject.toml").mkdir()
    assert workspace.run("scan", "model.py", *SCAN).code == CLEAN


def test_a_working_directory_that_is_gone(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = workspace.write("model.py", MODEL)
    gone = Workspace(workspace.folder / "gone")
    gone.folder.mkdir()
    real = command.main

    def main() -> None:
        gone.folder.rmdir()
        real()

    monkeypatch.setattr(command, "main", main)
    assert gone.run("lint", model).error().startswith("The working directory cannot be used (No such file")


LAUNCH = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "0"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "a"), ("RANK", "-1"), ("RANK", "2"), ("RANK", ""), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "9" * 400),
     ("WORLD_SIZE", "0"), ("MASTER_PORT", "x"), ("LOCAL_RANK", "1.5")],
)  # fmt: skip
def test_a_launcher_that_counts_in_words(workspace: Workspace, name: str, value: str) -> None:
    workspace.write("model.py", MODEL)
    message = workspace.run("scan", "model.py", *SCAN, **{**LAUNCH, name: value}).error()
    assert message.startswith(f"{name} is {value[:40]!r}, but must be a whole number from ")


def test_what_nobody_thought_of(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system refuses anywhere is no bug of bnprobe's."""
    workspace.write("model.py", MODEL)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "some/where")

    monkeypatch.setattr("bnprobe.cli.delivery.Delivery.check", full)
    message = workspace.run("scan", "model.py", *SCAN).error()
    assert message == "The operating system refused to go on with some/where: No space left on device."


def test_ctrl_c_while_modules_are_imported(workspace: Workspace) -> None:
    """They would be broken, and fail in ways of their own: a stand-in for torch is interrupted and lives on."""
    workspace.write("model.py", MODEL)
    workspace.write(
        "torch/__init__.py",
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    for _ in range(10 ** 7): pass\n"
        "except BaseException:\n    pass\n",
    )
    start = "signal.signal(signal.SIGINT, signal.default_int_handler); from bnprobe.__main__ import main; main()"
    path = os.pathsep.join([str(workspace.folder), str(REPOSITORY)])
    code = f"import signal, sys; sys.argv[1:] = ['scan', 'model.py']; {start}"
    result = workspace.call(sys.executable, "-c", code, PYTHONPATH=path)
    assert result == Result(NOTHING, "", "bnprobe: error: Interrupted.\n")
