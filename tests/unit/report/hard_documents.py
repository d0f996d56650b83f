"""Documents that are hard to show: long curves, deep networks, hostile text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import fabricated_reports as fabricated

from bnprobe.records import Curve, RepairRecord, Report


def with_curves(record: RepairRecord) -> RepairRecord:
    """A record whose trained arms have curves; those of one arm are another's, which it only recalibrates."""
    assert record.proof is not None
    arms = []
    for place, arm in enumerate(record.proof.arms):
        level = {"BN recalibrated after": 3}.get(arm.name, place)
        curve = Curve(
            (250, 500), (1.0 / (1 + level), None), (0, 250, 500), (0.9, 0.5, 0.4), (0.5, 0.6 + level / 50, 0.7)
        )
        arms.append(replace(arm, runs=tuple(replace(run, curve=curve if arm.trained else None) for run in arm.runs)))
    return replace(record, proof=replace(record.proof, arms=tuple(arms)))


def deep(number: int) -> Report:
    """A network of many layers, a third of them flagged."""
    report = fabricated.flagged()
    layers = tuple(
        replace(report.layers[index % len(report.layers)], name=f"stages.{index // 9}.{index}.bn")
        for index in range(number)
    )
    summary = replace(report.summary, layers=number, flagged=sum(layer.flagged for layer in layers))
    return replace(report, layers=layers, summary=summary)


HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "</style></title></textarea>",
    "\"'><img src=x onerror=alert(1)>",
    "{{7*7}}{% raw %}${7*7}",
    '\\"\\u003cb\\u003e',
    "line\u2028break\u2029\r\nnext",
    "left\u202eright\u2066\u200b\ufeff",
    "\x00\x1b[2J\x07\x9b31m",
    "\ud800 half",
    "datum['x'] + event.view",
    "javascript:alert(1)",
    "&lt;b&gt;&amp;",
    "w" * 5000,
)


def hostile(value: Any, text: Callable[[str], str]) -> Any:
    """A record with other names, words and paths in it."""
    if is_dataclass(value) and not isinstance(value, type):
        kept = {"cause", "rule", "severity", "outcome", "measure", "goal", "standing", "stopped", "conclusion"}
        kept |= {"ending", "action", "scored_on", "only_in", "python", "command"}
        changes = {
            each.name: hostile(getattr(value, each.name), text) for each in fields(value) if each.name not in kept
        }
        return replace(value, **changes)
    if isinstance(value, dict) and not all(isinstance(each, float) for each in value.values()):
        return {hostile(key, text): hostile(each, text) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(hostile(each, text) for each in value)
    return text(value) if isinstance(value, str) else value
