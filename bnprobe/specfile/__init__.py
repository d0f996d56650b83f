"""Read the spec from three sources; later ones override earlier ones: ``[tool.bnprobe]`` of the nearest
pyproject.toml, the spec file (YAML), and the command-line options.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bnprobe.errors import UsageError
from bnprobe.spec import ScanSettings, Spec
from bnprobe.specfile.merge import sentence, validated
from bnprobe.specfile.sources import Source, option_source, read_pyproject, read_yaml
from bnprobe.targets import is_file_target, split_target


def build_spec(target: str, overrides: Mapping[str, Any]) -> Spec:
    """Build the spec of one command from target, spec file, pyproject.toml and options.

    Args:
        target: A model target (``model.py:Net``, ``package.module``, ``timm:NAME``) or a spec file
            (.yaml, .yml).
        overrides: Dotted keys to values, e.g. ``{"data.batch_size": 2}``; None means not given.

    Raises:
        SpecError: A file contains something that bnprobe does not understand.
        UsageError: An option has a wrong value.
    """
    options = option_source(overrides)
    if target.lower().endswith((".yaml", ".yml")):
        path = Path(target)
        return validated([read_pyproject(path.parent), read_yaml(path), options])
    options.values["model"] = {**options.values.get("model", {}), "target": target}
    location, _ = split_target(target)
    folder = Path(location).parent if is_file_target(target) else Path()
    return validated([read_pyproject(folder), options])


def settings_from(options: Mapping[str, Any]) -> ScanSettings:
    """Scan settings from keyword arguments of the Python API; None means not given.

    Raises:
        UsageError: An option is unknown or has a wrong value.
    """
    source = Source({key: value for key, value in options.items() if value is not None}, arguments=True)
    try:
        return ScanSettings.model_validate(source.values)
    except ValidationError as error:
        sentences = [sentence(item, source, ScanSettings) for item in error.errors()]
        raise UsageError("\n".join(sentences)) from None
