"""Where in the user's code a layer was assigned."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnprobe.loading.model import resolve
from bnprobe.measure.origins import by_name, origin

SOURCE = """\
import torch
from torch import nn


class Base(nn.Module):
    def __init__(self, wide):
        super().__init__()
        self.inherited = nn.BatchNorm1d(2)
        if wide:
            self.either = nn.Linear(2, 2)
        else:
            self.either = nn.BatchNorm1d(2)


class Block(Base):
    def __init__(self):
        super().__init__(False)
        self.typed: nn.Module = nn.BatchNorm1d(2)
        self.one = self.two = nn.BatchNorm1d(2)
        self.left, self.right = (
            nn.BatchNorm1d(2),
            nn.BatchNorm1d(2),
        )
        self.add_module("added", nn.BatchNorm1d(2))
        for index in range(2):
            setattr(self, f"made{index}", nn.BatchNorm1d(2))


def stage(*layers):
    return nn.Sequential(*layers)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(2, 2),
            nn.BatchNorm1d(2),
            nn.Sequential(
                nn.ReLU(),
                nn.BatchNorm1d(2),
            ),
        )
        self.listed = nn.ModuleList([
            nn.BatchNorm1d(2),
            Block(),
        ])
        self.named = nn.ModuleDict({
            "a": nn.BatchNorm1d(2),
        })
        self.looped = nn.ModuleList(nn.BatchNorm1d(2) for _ in range(3))
        self.unpacked = nn.Sequential(
            *[nn.ReLU(), nn.BatchNorm1d(2)],
            nn.BatchNorm1d(2),
        )
        self.staged = stage(
            nn.BatchNorm1d(2),
        )


def load_model():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

    net = Net()
    net.inner = Inner()
    net.attached = nn.BatchNorm1d(2)
    return net
"""


def line_of(text: str, occurrence: int = 1) -> int:
    """The line, from 1, of the nth line that is ``text`` without its indent."""
    found = [number for number, line in enumerate(SOURCE.splitlines(), 1) if line.strip().startswith(text)]
    return found[occurrence - 1]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("listed.1.inherited", line_of("self.inherited")),
        ("listed.1.either", line_of("self.either = nn.BatchNorm1d")),
        ("listed.1.typed", line_of("self.typed")),
        ("listed.1.one", line_of("self.one")),
        ("listed.1.two", line_of("self.one")),
        ("listed.1.left", line_of("self.left") + 1),
        ("listed.1.right", line_of("self.left") + 2),
        ("listed.1.added", line_of("self.add_module")),
        ("listed.1.made1", line_of("Block(),")),
        ("body.1", line_of("self.body") + 2),
        ("body.2.1", line_of("self.body") + 5),
        ("listed.0", line_of("self.listed") + 1),
        ("named.a", line_of("self.named") + 1),
        ("looped.2", line_of("self.looped")),
        ("unpacked.2", line_of("self.unpacked")),
        ("staged.0", line_of("self.staged")),
        ("inner.bn", line_of("self.bn")),
        ("attached", None),
        ("", None),
    ],
)
def test_the_line_of_the_assignment(
    name: str, line: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(SOURCE)
    module, _ = resolve("net.py")
    assert origin(by_name(module.get("load_model")()), name) == (None if line is None else f"net.py:{line}")


def test_a_file_elsewhere_has_its_whole_path(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    module, _ = resolve(str(path))
    assert origin(by_name(module.get("load_model")()), "body.1") == f"{path.resolve()}:{line_of('self.body') + 2}"


def test_a_source_that_is_gone_gives_no_line(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    model = resolve(str(path))[0].get("load_model")()
    path.write_text("class Net(:")
    assert origin(by_name(model), "body.1") is None
    path.unlink()
    assert origin(by_name(model), "body.1") is None
