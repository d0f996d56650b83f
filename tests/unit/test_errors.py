"""Which frames of a traceback are the user's."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

import pytest

import bnprobe.__main__
from bnprobe.errors import is_library_file


@pytest.mark.parametrize(
    "file",
    [
        json.__file__,
        "/home/me/.local/lib/python3.11/site-packages/timm/layers/norm.py",
        "/usr/lib/python3/dist-packages/torch/nn/functional.py",
        "/somewhere/else/venv/lib/python3.12/site-packages/monai/networks/nets.py",
        "<frozen importlib._bootstrap>",
        bnprobe.__main__.__file__,
        str(Path(sys.executable).with_name("bnprobe")),
        str(Path(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))) / "pytest"),
    ],
)
def test_library_code_is_what_lies_in_any_folder_of_packages_and_the_commands_that_they_install(file: str) -> None:
    assert is_library_file(file)


def test_a_users_file(tmp_path: Path) -> None:
    assert not is_library_file(str(tmp_path / "model.py"))
