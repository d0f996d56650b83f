"""How to use repaired weights: the files, the lines of Python that load them, and the next commands."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from bnprobe.records import Plan, RepairRecord
from bnprobe.repair_targets import TARGETS
from bnprobe.reports.layout import Page
from bnprobe.reports.plan import command_lines, deployment

_DIGEST_SHOWN = 16
_INDENT = "  "
_NAMES_WRITTEN_OUT = 3


@dataclass(frozen=True)
class Files:
    """Paths of what stands beside the weights; None: not written."""

    record: str | None = None
    before: str | None = None
    after: str | None = None
    log: str | None = None


def usage(record: RepairRecord, files: Files, page: Page) -> list[Text]:
    """What was written, and what to do with it; nothing if nothing was written."""
    if record.weights is None:
        return page.paragraph("No weights were written.")
    lines = [*_written(record, record.weights, files, page)]
    lines += page.paragraph(_loading(record.plan))
    lines += [Text(f"    {page.clean(line)}", "bold") for line in _python(record, record.weights, files)]
    for why, command in _commands(record, record.weights, files):
        lines += [*page.paragraph(why), *command_lines(command, page)]
    return lines


def _written(record: RepairRecord, weights: str, files: Files, page: Page) -> list[Text]:
    digest = f" (SHA-256 {record.weights_sha256[:_DIGEST_SHOWN]}...)" if record.weights_sha256 else ""
    rows = [
        ("weights", f"{weights}{digest}"),
        *([("record", files.record)] if files.record else []),
        *([("scan before", files.before)] if files.before else []),
        *([("scan after", files.after)] if files.after else []),
        *([("log", files.log)] if files.log else []),
    ]
    inner = Page(page.width - len(_INDENT), page.unicode)
    return [*page.heading("Written"), *(Text(_INDENT) + line for line in inner.labelled(rows)), Text()]


def _loading(plan: Plan | None) -> str:
    return f"{'The weights load strictly into your own model.' if plan is None else deployment(plan)} In Python:"


def _python(record: RepairRecord, weights: str, files: Files) -> list[str]:
    """Lines that load the weights; a model that does not deploy as it is is converted first."""
    imports = ["from safetensors.torch import load_file"]
    load = [f"weights = load_file({_quoted(weights)})", "model.load_state_dict(weights)"]
    plan = record.plan
    if plan is None or plan.deploys:
        return [*imports, *load]
    if len(plan.changes) > _NAMES_WRITTEN_OUT and files.record is not None:
        imports = ["import json", "from pathlib import Path", "import bnprobe", *imports]
        opened = f"record = json.loads(Path({_quoted(files.record)}).read_bytes())"
        names = [opened, 'layers = [layer["name"] for layer in record["plan"]["changes"]]']
    else:
        imports = ["import bnprobe", *imports]
        names = [f"layers = [{', '.join(_quoted(change.name) for change in plan.changes)}]"]
    return [*imports, *names, f"model = bnprobe.convert(model, layers, to={_quoted(plan.to)}{_option(record)})", *load]


def _option(record: RepairRecord) -> str:
    """The settings of the converted layers, which their weights do not hold."""
    given: dict[str, Any] = record.settings.get("repair") or {}
    to = record.plan.to if record.plan else ""
    settings = TARGETS[to].settings if to in TARGETS else ()  # of a package that is not installed here
    return "".join(f", {name}={given[name]}" for name in settings if name in given)


def _quoted(text: str) -> str:
    """A string of Python."""
    return json.dumps(text, ensure_ascii=False)


def _commands(record: RepairRecord, weights: str, files: Files) -> list[tuple[str, str]]:
    """Why, and the command."""
    commands = []
    if files.before and files.after:
        verify = shlex.join(["bnprobe", "verify", files.before, files.after])
        commands.append(("To compare the two scans, as in CI:", verify))
    export = shlex.join(["bnprobe", "export", _target(record), "--checkpoint", weights])
    if record.plan is None or record.plan.deploys:
        commands.append(("To export the repaired model, its outputs checked:", export))
    return commands


def _target(record: RepairRecord) -> str:
    """What the user's command named, e.g. a spec file; else the model."""
    words = shlex.split(record.command) if record.command else []
    after = words[words.index(record.action) + 1 :] if record.action in words else []
    return after[0] if after and not after[0].startswith("-") else record.model
