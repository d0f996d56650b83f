"""Pages of the documentation that are made from the code, and a check that the site loads nothing from other hosts.

mkdocs calls the functions ``on_...`` (``hooks`` in mkdocs.yml). What they need of bnprobe is imported here, in one
place. No torch is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from bnprobe.cli.app import app
from bnprobe.cli.options import complete_help
from bnprobe.config.spec import Spec
from bnprobe.config.targets import DEFAULT_TARGET, TARGETS
from bnprobe.lab.experiments import EXPERIMENTS
from bnprobe.rules import RULES
from bnprobe.rules.docs import pages as rule_pages

REPOSITORY = Path(__file__).parents[1]
LAB = REPOSITORY / "docs" / "lab"
SCHEMAS = REPOSITORY / "bnprobe" / "report"
BENCHMARKS = (
    "README.md",
    *(
        f"{each}/{name}.md"
        for each in ("faults", "repairs", "peers", "drift", "monitor", "reversion", "table")
        for name in ("README", "RESULTS")
    ),
)


# What mkdocs calls


def on_config(config: Any) -> Any:
    """Add the pages of rules and decisions to the navigation."""
    decisions = sorted(path.name for path in (REPOSITORY / "docs" / "decisions").glob("0*.md"))
    _expand(
        config.nav, "Experiments", [f"lab/{name}/RESULTS.md" for name in EXPERIMENTS.names() if (LAB / name).is_dir()]
    )
    _expand(config.nav, "Rules", [f"rules/{rule.code}.md" for rule in RULES])
    _expand(config.nav, "Decisions", [f"decisions/{name}" for name in decisions])
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages; they replace files of the same name."""
    from mkdocs.structure.files import File

    for path, text in generated_pages().items():
        if path in files.src_uris:
            files.remove(files.src_uris[path])
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links into benchmarks/ stay within the site.

    In a clone that folder stands beside docs/; the site has copies of its pages in it.
    """
    return markdown.replace("../benchmarks/", "benchmarks/")


def on_post_build(config: Any) -> None:
    """Refuse a site that would load anything from another host.

    Raises:
        mkdocs.exceptions.PluginError: It would; the message says which page loads what.
    """
    from mkdocs.exceptions import PluginError

    found = list(foreign_loads(Path(config.site_dir)))
    if found:
        raise PluginError("The site would load from other hosts:\n" + "\n".join(found))


def _expand(nav: list[Any], title: str, entries: list[str]) -> None:
    """Make a section of the navigation out of the entry of this title: its page, then these."""
    for part in nav:
        for name, value in part.items() if isinstance(part, dict) else ():
            if name == title:
                part[name] = [value, *entries]
            elif isinstance(value, list):
                _expand(value, title, entries)


# The pages


def generated_pages() -> dict[str, str]:
    """Markdown of every generated page, by its path under docs/."""
    return {
        "index.md": home(),
        "reference/command-line.md": command_line(),
        "reference/spec.md": spec(),
        "reference/json-report.md": schema(
            "report.schema.json",
            "JSON report",
            "`bnprobe scan --format json` and `Report` in Python hold the same tree. "
            "A figure that does not exist is `null`, never NaN.",
        ),
        "reference/json-record.md": schema(
            "record.schema.json",
            "JSON record of a repair",
            "What `bnprobe convert` and `bnprobe recalibrate` write beside the weights, `out.record.json`.",
        ),
        "reference/json-sweep.md": schema(
            "sweep.schema.json",
            "JSON report of a sweep",
            "`bnprobe sweep --format json` and `bnprobe.sweep` in Python give the same tree.",
        ),
        "reference/json-comparison.md": schema(
            "comparison.schema.json",
            "JSON comparison of scans",
            "`bnprobe compare --format json`, and a scan of several checkpoints.",
        ),
        "reference/json-baseline.md": schema(
            "baseline.schema.json",
            "JSON baseline",
            "What `--write-baseline` writes; [known findings](../ci/baseline.md) says what it is for.",
        ),
        "reference/json-lab.md": schema(
            "lab.schema.json",
            "JSON results of an experiment",
            "What `bnprobe lab` writes, `results.json`; [the experiments](../lab/README.md) have theirs.",
        ),
        "reference/json-profile.md": schema(
            "profile.schema.json",
            "JSON profile",
            "What `bnprobe profile` writes, and `bnprobe.profile` gives.",
        ),
        "reference/json-drift.md": schema(
            "drift.schema.json",
            "JSON report of drift",
            "`bnprobe drift --format json`, and `ShiftMonitor.summary()` in Python.",
        ),
        "reference/json-table.md": schema(
            "table.schema.json",
            "JSON report of a table",
            "`bnprobe table --format json`, and `bnprobe.table` in Python.",
        ),
        **{f"rules/{name}": text for name, text in rule_pages().items()},
        **{f"benchmarks/{name}": (REPOSITORY / "benchmarks" / name).read_text(encoding="utf-8") for name in BENCHMARKS},
    }


def home() -> str:
    """README.md, with links as they are from inside docs/."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return text.replace("](docs/", "](").replace('src="docs/', 'src="')


def targets() -> str:
    """What a layer can be converted to, from the registry, as docs/repairs.md has it."""
    rows = [
        f"| `{each.name}`{' (default)' if each.name == DEFAULT_TARGET else ''} | {each.summary} "
        f"| {'the same' if each.agrees else each.at_inference} | {'yes' if each.deploys else 'no'} | {each.advice} |"
        for each in TARGETS
    ]
    head = ["| `--to` | in training | at inference | deploys as plain BN | when |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def command_line() -> str:
    """Every command with its arguments and options, from the command line itself."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command in commands.values():
        complete_help(command)
    parts = ["# Command line", "Made from the commands themselves; `bnprobe COMMAND --help` prints the same."]
    rows = [f"| [`{name}`](#bnprobe-{name}) | {_first(command.help)} |" for name, command in commands.items()]
    parts.append("\n".join(["| command | |", "|---|---|", *rows]))
    for name, command in commands.items():
        parts += [f"## bnprobe {name}", *_command(name, command)]
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    yield f"```text\nbnprobe {name} [OPTIONS] {' '.join(_argument(argument) for argument in arguments)}\n```"
    yield from (" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    if arguments:
        rows = [f"| `{_argument(argument)}` | {_cell(argument.help)} |" for argument in arguments]
        yield "\n".join(["| argument | |", "|---|---|", *rows])
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(parameter)
    for panel, options in panels.items():
        rows = [f"| {_flags(option)} | {_cell(option.help)}{_default(option)} |" for option in options]
        yield "\n".join([f"| {panel} | |", "|---|---|", *rows])
    if command.epilog:
        yield command.epilog


def _argument(argument: Any) -> str:
    text = (argument.metavar or argument.name.upper()).strip("{}")
    return text if argument.required else f"[{text}]"


def _flags(option: Any) -> str:
    value = f" {option.metavar}" if option.metavar else ""
    return ", ".join(f"`{flag}{value}`" for flag in (*option.opts, *option.secondary_opts))


def _default(option: Any) -> str:
    shown = option.show_default and option.default is not None and not option.is_flag and not option.multiple
    value = getattr(option.default, "value", option.default)
    return f" Default: `{value}`." if shown and isinstance(value, str | int | float) else ""


def spec() -> str:
    """Every key of the spec file, from the models that validate it.

    Raises:
        ValueError: A key has no description.
    """
    parts = [
        "# Spec file",
        "Everything about a scan or a repair in one YAML file. Paths are relative to it, options of the command line "
        "override it, and `[tool.bnprobe]` in `pyproject.toml` holds defaults with the same keys. Unknown keys are "
        "errors that name the nearest one. `bnprobe init` writes a file with every key explained; "
        "[Model files](../model-files.md) shows one.",
    ]
    for path, model in _sections(Spec):
        parts += [f"## {path or 'Top level'}", _summary(model), _keys(path, model)]
    return "\n\n".join(parts) + "\n"


def _sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            yield from _sections(inner, f"{path}.{name}".lstrip("."))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)


def _keys(path: str, model: type[BaseModel]) -> str:
    properties = model.model_json_schema()["properties"]
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        meaning = field.description or _attributes(model).get(name)
        inner = list(_models(field.annotation))
        if meaning is None and inner:
            meaning = _summary(inner[0])
        if meaning is None:
            raise ValueError(f"{model.__name__}.{name} has no description: add it to the class's docstring")
        meaning = meaning.replace("None:", "not given:")
        key = f"{path}.{name}".lstrip(".")
        shown = f"[`{name}`](#{key.replace('.', '')})" if inner else f"`{name}`"
        kind = (
            _type(properties[name])
            if not inner
            else "list of sections"
            if properties[name].get("type") == "array"
            else "section"
        )
        rows.append(f"| {shown} | {kind} | {_initial(field, inner)} | {_cell(meaning)} |")
    return "\n".join(rows)


def _initial(field: Any, inner: list[Any]) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if inner or value in (None, (), {}):
        return ""
    return f"`{value:.3g}`" if isinstance(value, float) else f"`{json.dumps(value)}`"


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """What the ``Attributes`` sections of the docstrings of a class and its bases say."""
    found: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        _, _, section = (vars(parent).get("__doc__") or "").partition("Attributes:\n")
        for names, text in re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", section, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def schema(file: str, title: str, preface: str) -> str:
    """A JSON schema as tables, one for each record."""
    tree = json.loads((SCHEMAS / file).read_text(encoding="utf-8"))
    parts = [
        f"# {title}",
        f"{preface} The schema is `{(SCHEMAS / file).relative_to(REPOSITORY)}`; it stays compatible within one "
        "`schema_version`.",
        "## Top level",
        _cell(tree.get("description", "")),
        _properties(tree),
    ]
    for name, record in tree["$defs"].items():
        if "properties" in record:
            parts += [f"## {name}", _cell(record.get("description", "")), _properties(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _properties(record: dict[str, Any]) -> str:
    rows = [
        f"| `{name}` | {_type(value)} | {_cell(value.get('description', ''))} |"
        for name, value in record["properties"].items()
    ]
    return "\n".join(["| field | type | |", "|---|---|---|", *rows])


def _type(value: dict[str, Any]) -> str:
    """The type of a JSON schema, in words; records are links."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{item}`" for item in value["enum"])
    if "anyOf" in value:
        return " or ".join(_type(part) for part in value["anyOf"])
    if "prefixItems" in value:
        return f"[{', '.join(_type(part) for part in value['prefixItems'])}]"
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}"
    inner = value.get("additionalProperties")
    return f"map to {_type(inner)}" if isinstance(inner, dict) else str(value.get("type", "any"))


def _summary(model: type[BaseModel]) -> str:
    return _cell((model.__doc__ or "").partition("\n\n")[0])


def _first(text: str | None) -> str:
    return _cell((text or "").partition("\n\n")[0])


def _cell(text: str | None) -> str:
    """Text for one cell of a table."""
    return " ".join((text or "").replace("``", "`").replace("|", "\\|").split())


# The check


class _Loads(HTMLParser):
    """What a page makes a browser load, as far as it stands in the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev"):
            return
        names = ("href", "xlink:href") if tag in ("link", "use", "image") else ()
        self.found += [given[name] for name in (*names, "src", "srcset", "poster", "data") if name in given]


def foreign_loads(site: Path) -> Iterator[str]:
    """What the pages, styles and pictures of a built site load from other hosts: "FILE: ADDRESS"."""
    for path in sorted(site.rglob("*")):
        if path.suffix not in (".html", ".css", ".svg"):
            continue
        text = path.read_text(encoding="utf-8")
        loads = re.findall(r"(?:url\(\s*|@import\s+)[\"']?([^\"')\s]+)", text)
        if path.suffix != ".css":
            parser = _Loads()
            parser.feed(text)
            loads += parser.found
        for address in loads:
            if re.match(r"(?:https?:)?//", address):
                yield f"{path.relative_to(site)}: {address}"
