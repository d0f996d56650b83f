"""What a plan says: which layers, why, and what comes next."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from bnprobe.records import Plan
from bnprobe.report import RenderOptions, renderer
from support import repairs

render_plan = renderer("terminal", Plan)

WIDE = RenderOptions(width=400, command="bnprobe convert model.py --dry-run")


def test_every_layer_has_a_line_with_its_reason() -> None:
    text = render_plan(repairs.plan(), WIDE)
    assert text.startswith("6 of 9 normalization layers would become batch-renorm, chosen by a scan at batch size 2.\n")
    assert "  Class: BatchNorm2d → BatchRenorm2d\n" in text
    assert "  layer2.0.bn1           flagged: n_eq 12.1, below 32 (small batch)\n" in text
    assert len(re.findall(r"\n  layer\S+ +flagged: ", text)) == 6
    assert "3 other normalization layers stay as they are.\n" in text


def test_layers_of_several_kinds_say_both_classes_each() -> None:
    text = render_plan(repairs.mixed_plan(), WIDE)
    assert "layer2.0.downsample.1  BN2d → BatchRenorm2d  flagged: n_eq 1.0, below 32 (lag)\n" in text
    assert "head.bn                BN1d → BatchRenorm1d  matches --layers 'head.*'\n" in text
    assert "  layer2.0.bn1: the same layer as critic.bn\n" in text
    assert "  head.bn: momentum 0.1 -> 0.01\n" in text


def test_refused_layers_are_named_with_the_reason() -> None:
    text = render_plan(repairs.mixed_plan(), replace(WIDE, show_all=True))
    assert "Refused: 9 layers, left as they are\n" in text
    names = ", ".join(f"stages.{index}.bn" for index in range(9))
    said = f"{names} (BatchNormAct2d): its class applies an activation after normalizing."
    assert said in " ".join(text.split())


def test_one_reason_for_all_is_said_once() -> None:
    changes = tuple(replace(change, reason="matches --layers '*'") for change in repairs.changes())
    text = render_plan(repairs.plan(changes=changes), WIDE)
    assert text.count("matches --layers") == 1


def test_whether_the_weights_deploy() -> None:
    assert "load strictly into your own model, as plain BatchNorm.\n" in render_plan(repairs.plan(), WIDE)
    text = render_plan(repairs.plan(to="group-norm", deploys=False), WIDE)
    said = "do not load into a model with plain BatchNorm: convert the model to group-norm first, then load them."
    assert said in " ".join(text.split())


@pytest.mark.parametrize(
    ("command", "follows"),
    [
        (
            "bnprobe convert model.py --check",
            "bnprobe convert model.py --finetune --output repaired.safetensors",
        ),
        (
            "bnprobe convert model.py --dry-run -o out.safetensors",
            "bnprobe convert model.py -o out.safetensors --finetune",
        ),
        (
            "bnprobe convert 'a b.py' --finetune --output=x.safetensors --dry-run",
            "bnprobe convert 'a b.py' --finetune --output=x.safetensors",
        ),
    ],
)
def test_the_next_command_does_what_was_planned(command: str, follows: str) -> None:
    assert f"    {follows}\n" in render_plan(repairs.plan(), replace(WIDE, command=command))


@pytest.mark.parametrize("name", ["nothing", "refused"])
def test_a_plan_without_changes_suggests_none(name: str) -> None:
    text = render_plan(repairs.PLANS[name](), WIDE)
    assert "bnprobe convert" not in text
    assert text.endswith("Nothing has been changed.\n")


def test_what_auto_would_choose_is_not_said() -> None:
    text = render_plan(repairs.plan(to="auto"), WIDE)
    assert "6 of 9 normalization layers would become the target with the best score (--to auto)," in text
    assert "BatchRenorm2d" not in text


def test_a_large_plan_is_folded_without_all() -> None:
    made = repairs.PLANS["large"]()
    assert "\n  and 35 more layers; --all shows all.\n" in render_plan(made, WIDE)
    assert render_plan(made, WIDE).count("denselayer") == 25
    assert render_plan(made, replace(WIDE, show_all=True)).count("denselayer") == 60


def test_as_json_it_is_the_record() -> None:
    document = json.loads(renderer("json", Plan)(repairs.mixed_plan(), WIDE))
    assert list(document) == ["schema_version", "to", "source", "changes", "refused", "untouched", "deploys"]
    assert document["changes"][0]["aliases"] == ["critic.bn"]
    assert (document["schema_version"], document["deploys"], len(document["refused"])) == (1, True, 9)
