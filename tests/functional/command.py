"""Run the command in a folder of real files, as a user would.

``Workspace.run`` runs it in this process, where torch is imported already: a scan takes 0.1 seconds of processor time
and not 3. ``Workspace.run_installed`` runs the installed script in a process of its own, for what needs one: start-up,
encodings, pipes. ``functional.processes`` forks processes for signals, terminals, full disks and launches of several.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from bnprobe.cli.app import main
from support.imports import as_in_a_new_process

COMMAND = Path(sys.executable).parent / "bnprobe"
REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 120
CLEAN, FINDINGS, ERROR, NOTHING = 0, 1, 2, 3

MODEL = '''\
"""One BN layer straight on the input: standard normal images fit its fresh statistics, others do not."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SHIFT = 0.0
IMAGES = 64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.bn(x).relu().mean((2, 3)))


def images():
    return torch.randn(IMAGES, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + SHIFT


def load_model():
    return Net()


def load_data(batch_size):
    return DataLoader(TensorDataset(images()), batch_size=batch_size, shuffle=True)
'''
"""A model file whose scan is clean; what a test appends to it replaces what stands above."""

SHIFTED = MODEL.replace("SHIFT = 0.0", "SHIFT = 3.0")
"""The same with data that the running statistics do not fit: a scan flags the layer."""


_INTERRUPTIBLE = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    code: int
    stdout: str
    stderr: str

    def error(self, code: int = ERROR) -> str:
        """The message of a run that failed on purpose: nothing on stdout, no traceback, said once."""
        assert (self.code, self.stdout) == (code, ""), self
        assert self.stderr.startswith("bnprobe: error: "), self.stderr
        assert self.stderr.count("bnprobe: error: ") == 1, self.stderr
        assert "Traceback" not in self.stderr
        assert "site-packages" not in self.stderr
        return self.stderr.removeprefix("bnprobe: error: ").rstrip("\n")

    def report(self, code: int) -> dict[str, Any]:
        """The JSON report on stdout."""
        assert self.code == code, self
        assert self.stderr == ""
        found: dict[str, Any] = json.loads(self.stdout)
        return found


class Workspace:
    """A folder with files, in which the command runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def environment(self, **changes: str) -> dict[str, str]:
        """One thread: a machine that is busy with other tests gets no faster by two."""
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
        return {**kept, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TERM": "xterm-256color", **changes}

    def run(self, *arguments: str | Path, **environment: str) -> Result:
        """Run ``bnprobe`` with these arguments, in this process."""
        return self._in_this_process(main, "bnprobe", *arguments, **environment)

    def run_script(self, name: str) -> Result:
        """Run a script of the folder, in this process."""

        def run() -> None:
            sys.path.insert(0, str(self.folder))
            runpy.run_path(name, run_name="__main__")

        return self._in_this_process(run, name)

    def _in_this_process(self, run: Callable[[], object], *words: str | Path, **environment: str) -> Result:
        stdout, stderr = _stream("strict"), _stream("backslashreplace")
        arguments, variables = list(map(str, words)), self.environment(**environment)
        with _as_process(self.folder, arguments, variables), redirect_stdout(stdout), redirect_stderr(stderr):
            code = _exit_code(run)
        result = Result(code, _written(stdout), _written(stderr))
        print(f"$ {' '.join(arguments)}\n{result.stdout}{result.stderr}[exit {code}]")
        return result

    def run_installed(self, *arguments: str | Path, **environment: str) -> Result:
        """Run the installed script with these arguments, in a process of its own."""
        return self.call(COMMAND, *arguments, **environment)

    def call(self, *command: str | Path, **environment: str) -> Result:
        """Run any command."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=TIMEOUT,
        )
        print(f"$ {' '.join(map(str, command[1:]))}\n{done.stdout}{done.stderr}[exit {done.returncode}]")
        return Result(done.returncode, done.stdout, done.stderr)

    def start_installed(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Start the installed script and go on; it can be interrupted even where this process ignores Ctrl-C."""
        return subprocess.Popen(
            [sys.executable, "-c", _INTERRUPTIBLE, str(COMMAND), *map(str, arguments)],
            cwd=self.folder,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def scan(self, *arguments: str | Path) -> Result:
        """Run ``bnprobe scan model.py`` at batch size 2."""
        return self.run("scan", "model.py", "--batch-size", "2", *arguments)


def _exit_code(run: Callable[[], object]) -> int:
    """Run something; how it ended, as the exit code of a process."""
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@contextmanager
def _as_process(folder: Path, arguments: list[str], environment: dict[str, str]) -> Iterator[None]:
    """While the block runs, this process looks like a new one in ``folder``; afterwards like before."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with (
            as_in_a_new_process(),
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.multiple(sys, argv=arguments, stdin=io.StringIO()),
            _usual_warnings(),
        ):
            yield
    finally:
        os.chdir(before)


@contextmanager
def _usual_warnings() -> Iterator[None]:
    """Warnings as Python shows them by default, on stderr, and not as the errors that they are to pytest."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _show_warning
        yield


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _stream(errors: str) -> io.TextIOWrapper:
    """As Python opens it: what stderr cannot encode is escaped, what stdout cannot is an error."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, newline="\n", write_through=True)


def _written(stream: io.TextIOWrapper) -> str:
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)  # _stream() made it
    return buffer.getvalue().decode()
