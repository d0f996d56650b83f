"""``bnprobe init --from``: load a project as it stands, and write a spec that scans it, with what was found."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from bnprobe.config.load import with_paths
from bnprobe.config.spec import Spec
from bnprobe.errors import BnprobeError
from bnprobe.loading.workload import Workload, load_model_only, load_workload
from bnprobe.measure.restore import preserved_random_state, seed_everything
from bnprobe.paths import placed

_WIDTH = 100


def spec_for(spec: Spec, command: str, folder: Path) -> tuple[str, str | None]:
    """The text of a spec that scans the same project, commented with what was found in it.

    Returns:
        The text; and what must be filled in before it scans, as in "data: FILE.py has no ...", None: nothing.

    Args:
        spec: What the user named.
        command: The command line as typed.
        folder: Where the spec will be: paths in it are relative to that.

    Raises:
        BnprobeError: The project cannot be loaded; that it has no data is said in the text.
    """
    with preserved_random_state():
        seed_everything(spec.data.seed)
        workload, to_fill_in = _loaded(spec)
    sections = spec.model_dump(mode="json", exclude_unset=True)
    with_paths(sections, lambda path: _path_from(path, folder))
    if workload is not None:
        if to_fill_in is None:
            sections["data"] = {**sections.get("data", {}), "batch_size": workload.source.batch_size}
        if workload.goal is not None and spec.repair.assumes_goal:
            sections["repair"] = {**sections.get("repair", {}), "goal": workload.goal}
    return "\n".join(_written(sections, workload, to_fill_in, command)), to_fill_in


_TRIED = 2
"""A batch size to look at the data with, where none is known."""


def _loaded(spec: Spec) -> tuple[Workload | None, str | None]:
    """The project, None where its data cannot be loaded; and what must be filled in."""
    try:
        return load_workload(spec, need_statistics=False), None
    except BnprobeError as error:
        load_model_only(spec, need_statistics=False)  # raises the same where it is no matter of data
        if spec.data.batch_size is None:
            sized = spec.data.model_copy(update={"batch_size": _TRIED})
            with suppress(BnprobeError):
                found = load_workload(spec.model_copy(update={"data": sized}), need_statistics=False)
                return found, "data.batch_size: that of training"
        return None, f"data: {error}"


def _path_from(path: str, folder: Path) -> str:
    """The path as seen from a folder."""
    relative = os.path.relpath(placed(Path(path)).absolute(), placed(folder).absolute())
    return relative if len(relative) < len(path) or not Path(path).is_absolute() else path


def _written(
    sections: Mapping[str, Any], workload: Workload | None, to_fill_in: str | None, command: str
) -> Iterator[str]:
    taken = dict(workload.taken) if workload is not None else {}
    yield from _comment(
        f"Written by {command}. Paths are relative to this file; options of the command line override it. The spec that"
        " bnprobe init writes without --from explains every key."
    )
    yield ""
    yield from _section("model", sections, f"Found: {taken['model']}." if "model" in taken else "")
    if "checkpoint" in sections:
        yield from _section("checkpoint", sections, "The weights; without them the model is as it is built.")
    else:
        yield from _comment("checkpoint: {path: FILE}   # the weights; without them the model is as it is built")
        yield ""
    yield from _data(sections, workload, to_fill_in)
    for role, purpose in _PURPOSES.items():
        if role in sections:
            yield from _section(role, sections, purpose)
        else:
            found = f"Found: {taken[role]}." if role in taken else _of_file(workload, role)
            yield from _comment(f"{purpose} {found}")
            yield from _comment(f"{role}: FILE.py:FUNCTION")
            yield ""
    for name in sections:
        if name not in ("model", "checkpoint", "data", "eval_data", *_PURPOSES):
            yield from _section(name, sections, _WHY.get(name, ""))


_PURPOSES = {
    "loss": "The training loss, a function of (model, batch): compared between the two modes, needed for fine-tuning.",
    "metric": "What the network is judged by, a function of (model, batch).",
    "forward": "How a batch goes through the model, a function of (model, batch).",
}

_WHY = {"repair": "Whether a larger or a smaller metric is better: max or min."}


def _of_file(workload: Workload | None, role: str) -> str:
    if workload is None:
        return "Not looked for, since there is no data to try it on."
    if getattr(workload, role) is not None:
        return "Found in the model's file."
    why = f": {workload.missing[role]}." if role in workload.missing else "."
    usual = " Without it the model is called on the first item of a batch." if role == "forward" else ""
    return f"None was found{why}{usual}"


def _data(sections: Mapping[str, Any], workload: Workload | None, to_fill_in: str | None) -> Iterator[str]:
    if to_fill_in is not None:
        yield from _comment(f"TO BE FILLED IN: {to_fill_in}")
    if workload is None:
        if "data" in sections:
            yield from _section("data", sections, "")
            return
        yield from _comment("data: {target: FILE.py:SYMBOL, batch_size: 32}   # a loader, data set or function")
        yield ""
        return
    about = f"The training data as training sees it. Found: {workload.source.description}."
    about += " The batch size is that of training; BN sees it."
    if to_fill_in is None:
        yield from _section("data", sections, about)
    elif "data" in sections:
        yield "\n".join(_section("data", sections, about)) + "  # batch_size: 32\n"
    else:
        yield from _comment(about)
        yield from _comment("data: {batch_size: 32}")
        yield ""
    held_out = workload.held_out.description if workload.held_out else "none"
    words = f"Held-out data, which no training saw. Found: {held_out}."
    if "eval_data" in sections:
        yield from _section("eval_data", sections, words)
        return
    yield from _comment(words)
    yield from _comment("eval_data: {target: FILE.py:SYMBOL}")
    yield ""


def _section(name: str, sections: Mapping[str, Any], about: str) -> Iterator[str]:
    if about:
        yield from _comment(about)
    yield yaml.safe_dump({name: sections[name]}, sort_keys=False, width=_WIDTH, allow_unicode=True)


def _comment(text: str) -> Iterator[str]:
    """Lines of a comment; nothing in the text can end it."""
    plain = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    for line in textwrap.wrap(plain, _WIDTH, break_long_words=False):
        yield f"# {line}"
