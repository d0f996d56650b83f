"""``bnprobe config``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bnprobe.cli import options
from bnprobe.cli.scan import scan
from bnprobe.docstrings import docstring

if TYPE_CHECKING:
    from bnprobe.config.load import Setting

Language = Literal["yaml", "toml", "json"]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every option of a scan that sets a field of the spec, instead of ``**given``."""
    own = inspect.signature(command, eval_str=True)
    settings = [
        each
        for each in inspect.signature(scan, eval_str=True).parameters.values()
        if any(isinstance(note, options.Sets) for note in getattr(each.annotation, "__metadata__", ()))
    ]
    kept = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]

    def run(**given: Any) -> None:
        command(**given)

    run.__name__, run.__doc__ = command.__name__, docstring(command)
    parameters = [*kept, *settings]
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


@with_settings
def config(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(help="A spec file or a model, as for scan; none: what pyproject.toml says.", metavar="TARGET"),
    ] = None,
    language: Annotated[
        Language, options.option(options.REPORT, "--format", "yaml (default), toml or json.", "NAME")
    ] = "yaml",
    **given: Any,
) -> None:
    """Print the settings in force, and where each comes from: an option, the spec file, pyproject.toml, or the default.

    Takes the options of scan. Nothing is loaded or run.
    """
    from bnprobe.cli.streams import write_out
    from bnprobe.config.load import settings_in_force
    from bnprobe.printable import escaped_lines

    found = settings_in_force(target, options.overrides(context))
    write_out(escaped_lines("".join(f"{line}\n" for line in _WRITERS[language](found))))


def _yaml(settings: Sequence[Setting]) -> Iterator[str]:
    """A spec file: JSON values are YAML too."""
    for section, found in groupby(settings, key=lambda setting: setting.section):
        rows = list(found)
        if rows[0].key:
            yield f"{section}:"
        for each in rows:
            name = f"  {_name(each.key)}" if each.key else section
            yield f"{name}: {json.dumps(each.value, ensure_ascii=False)}  # {_comment(each)}"


def _toml(settings: Sequence[Setting]) -> Iterator[str]:
    """The tables of pyproject.toml; what is not set is a comment, since TOML has no null."""
    yield "[tool.bnprobe]"
    for each in settings:
        if not each.key:
            yield _assignment(each.section, each)
    for section, found in groupby((each for each in settings if each.key), key=lambda setting: setting.section):
        yield f"\n[tool.bnprobe.{section}]"
        yield from (_assignment(_name(each.key), each) for each in found)


def _assignment(name: str, setting: Setting) -> str:
    if setting.value is None:
        return f"# {name} is not set ({_comment(setting)})"
    return f"{name} = {_toml_value(setting.value)}  # {_comment(setting)}"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        pairs = ((key, part) for key, part in value.items() if part is not None)
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(part)}" for key, part in pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _json(settings: Sequence[Setting]) -> Iterator[str]:
    """Values and origins by section."""
    found: dict[str, Any] = {}
    for each in settings:
        entry = {"value": each.value, "from": each.origin}
        if each.key:
            found.setdefault(each.section, {})[each.key] = entry
        else:
            found[each.section] = entry
    yield json.dumps(found, indent=2, ensure_ascii=False)


def _name(key: str) -> str:
    """A key, in quotes where a bare one would mean something else."""
    return key if key.replace("_", "a").isalnum() and key.isascii() else json.dumps(key)


def _comment(setting: Setting) -> str:
    from bnprobe.report.page import clean

    return clean(setting.origin, unicode=True)


_WRITERS: dict[str, Callable[[Sequence[Setting]], Iterator[str]]] = {"yaml": _yaml, "toml": _toml, "json": _json}
