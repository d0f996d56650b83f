"""``bnprobe init``: a starter that scans at once."""

from __future__ import annotations

import re
import shlex

import yaml
from pydantic import BaseModel

from bnprobe.config.load import build_spec
from bnprobe.config.spec import Spec
from functional.command import CLEAN, MODEL, REPOSITORY, Workspace

STARTER = REPOSITORY / "bnprobe" / "starter"
COMMENTED_KEY = re.compile(r"^( *)# ( *[\w.*\"]+:.*)$", re.MULTILINE)


def test_the_starter_scans_at_once(workspace: Workspace) -> None:
    found = workspace.run("init", "a new/folder of mine")
    assert (found.code, found.stderr) == (CLEAN, "")
    assert {path.name for path in (workspace.folder / "a new/folder of mine").iterdir()} == {"model.py", "spec.yaml"}
    assert found.stdout.splitlines() == [
        "wrote a new/folder of mine/model.py",
        "wrote a new/folder of mine/spec.yaml",
        "next: bnprobe scan 'a new/folder of mine/spec.yaml'",
    ]
    command = shlex.split(found.stdout.splitlines()[-1].removeprefix("next: bnprobe "))
    scanned = workspace.run(*command)
    assert (scanned.code, scanned.stderr) == (CLEAN, "")  # a new network is no finding
    assert "on held-out data" in scanned.stdout  # loss, metric and evaluation data
    assert "Running statistics never updated (BN102): 2 of 2 layers" in scanned.stdout


def test_nothing_is_overwritten_unasked(workspace: Workspace) -> None:
    workspace.write("spec.yaml", "mine")
    said = "spec.yaml already exists; choose another folder, or give --force to overwrite it."
    assert workspace.run("init").error() == said
    assert not (workspace.folder / "model.py").exists()
    assert (workspace.folder / "spec.yaml").read_text() == "mine"
    assert workspace.run("init", "--force").code == CLEAN
    assert (workspace.folder / "spec.yaml").read_bytes() == (STARTER / "spec.yaml").read_bytes()


def test_a_folder_that_cannot_be_made_is_explained(workspace: Workspace) -> None:
    workspace.write("taken", "a file")
    assert (
        workspace.run("init", "taken/deeper").error()
        == "The folder taken/deeper could not be created: Not a directory."
    )


def test_every_path_of_a_spec_is_written_as_seen_from_the_new_one(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    workspace.write("old.yaml", "model: model.py\ndata: {batch_size: 4}\ntrain: {optimizer: {target: 'own.py:adam'}}\n")
    assert workspace.run("init", "--from", "old.yaml", "probe").code == CLEAN
    written = yaml.safe_load((workspace.folder / "probe" / "spec.yaml").read_text(encoding="utf-8"))
    assert written["model"]["target"] == "../model.py"
    assert written["train"]["optimizer"]["target"] == "../own.py:adam"


def test_every_commented_key_of_the_spec_is_valid(workspace: Workspace) -> None:
    text = (STARTER / "spec.yaml").read_text(encoding="utf-8")
    path = workspace.write("spec.yaml", COMMENTED_KEY.sub(r"\1\2", text))
    spec = build_spec(str(path), {})
    plain = Spec.model_validate({"model": {"target": spec.model.target}})
    said = ("loss", "metric", "forward", "checkpoint", "data", "eval_data", "thresholds", "layers", "rules", "scan")
    for section in said:
        assert getattr(spec, section) != getattr(plain, section), section


def test_every_key_of_the_spec_is_explained() -> None:
    text = (STARTER / "spec.yaml").read_text(encoding="utf-8")
    named = set(re.findall(r"(\w+):(?= |$)", text, re.MULTILINE))
    assert _keys(Spec) - named == set()


def _keys(section: type[BaseModel]) -> set[str]:
    """Names of all keys of a section and of the sections in it."""
    inner = [field.annotation for field in section.model_fields.values()]
    return set(section.model_fields).union(
        *(_keys(kind) for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel))
    )
