"""Which nodes of a configuration are the model and the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bnprobe.config.load import build_spec
from bnprobe.config.nodes import Configuration, configuration_of, is_node_target
from bnprobe.config.spec import Spec
from bnprobe.errors import SpecError

PATH = Path("config.yaml")
NODE = {"class_path": "a.B"}


def configuration(**values: Any) -> Configuration:
    return Configuration(PATH, "LightningCLI", values)


@pytest.mark.parametrize(
    ("values", "targets"),
    [
        ({"model": NODE, "data": NODE}, {"model": "model", "data": "data"}),
        ({"trainer": NODE, "net": NODE, "datamodule": NODE}, {"model": "net", "data": "datamodule"}),
        ({"model": {"net": NODE}, "train_loader": NODE, "val_loader": NODE},
         {"model": "model.net", "data": "train_loader", "eval_data": "val_loader"}),
        ({"fit": {"model": NODE, "data": NODE}}, {"model": "fit.model", "data": "fit.data"}),
        ({"model": {**NODE, "init_args": {"data": NODE}}}, {"model": "model"}),
    ],
)  # fmt: skip
def test_nodes_by_role(values: dict[str, Any], targets: dict[str, str]) -> None:
    found = configuration(**values).as_spec(None)
    assert {section: each["target"] for section, each in found.items()} == {
        section: f"config.yaml:{name}" for section, name in targets.items()
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed_everything": 7, "ckpt_path": "last.ckpt"}, {"data": {"seed": 7}, "checkpoint": {"path": "last.ckpt"}}),
        ({"seed": 7, "ckpt_path": "best"}, {"data": {"seed": 7}}),
        ({"seed_everything": True, "ckpt_path": None}, {}),
        ({"seed": -1, "ckpt_path": "${paths.best}"}, {}),
        ({"fit": {"ckpt_path": "x.ckpt"}}, {"checkpoint": {"path": "x.ckpt"}}),
    ],
)
def test_seed_and_checkpoint(settings: dict[str, Any], said: dict[str, Any]) -> None:
    found = configuration(model=NODE, **settings).as_spec(None)
    assert found == {"model": {"target": "config.yaml:model"}, **said}


def test_a_node_by_name_and_what_is_there() -> None:
    found = configuration(parts={"net": NODE}, data=NODE)
    assert found.as_spec("parts.net")["model"]["target"] == "config.yaml:parts.net"
    assert found.node("parts.net") == NODE
    with pytest.raises(SpecError, match=r'no node "parts" that names a class. Its nodes are parts.net, data: name one'):
        found.node("parts")
    with pytest.raises(SpecError, match="It has no node that names a class"):
        configuration(x=1).node("x")


@pytest.mark.parametrize(
    ("values", "is_one"),
    [
        ({"model": {"class_path": "a.B"}, "trainer": {}}, True),
        ({"model": {"class_path": "a.B"}, "data": {"class_path": "a.C"}}, False),  # a spec, with its aliases
        ({"model": "model.py", "optimizer": {}}, False),  # a mistake in a spec
        ([1, 2], False),
    ],
)
def test_what_is_a_configuration_of_lightning(values: Any, is_one: bool) -> None:
    assert (configuration_of(PATH, values, frozenset(Spec.model_fields)) is not None) is is_one


def test_targets(tmp_path: Path) -> None:
    assert is_node_target("conf/a.yaml:model")
    assert not is_node_target("conf/a.yaml")
    assert not is_node_target("a.py:model")
    (tmp_path / "spec.yaml").write_text("model: model.py\n")
    with pytest.raises(SpecError, match=r"spec.yaml is a spec of bnprobe, which has no nodes: leave out :model"):
        build_spec(f"{tmp_path / 'spec.yaml'}:model", {})
