"""Processes of their own for ``bnprobe``, alone or several as a launcher starts them.

They are forked from one that has imported torch already; all else is as in any process: files, terminals, signals,
limits, exit codes.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

import torch

from bnprobe.cli.app import main
from functional.command import TIMEOUT, Result, Workspace
from support.processes import FORKING, rank_environments


class Forked:
    """A process that runs ``bnprobe`` with these arguments; it has the methods of ``subprocess.Popen``.

    Args:
        workspace: The folder that it works in.
        arguments: Those of the command line.
        environment: Changes of the environment.
        terminals: Descriptors that stand for its stdout or stderr, by name.
        largest_file: Files cannot grow beyond so many bytes, as on a full disk.
    """

    def __init__(
        self,
        workspace: Workspace,
        arguments: tuple[str | Path, ...],
        environment: dict[str, str],
        terminals: dict[str, int] | None = None,
        largest_file: int | None = None,
    ) -> None:
        # Closed when they are read.
        self._seen: dict[str, IO[bytes]] = {
            name: tempfile.TemporaryFile()  # noqa: SIM115
            for name in ("stdout", "stderr")
        }
        files = {name: file.fileno() for name, file in self._seen.items()} | (terminals or {})
        streams = [Connection(os.dup(files[name]), readable=False) for name in ("stdout", "stderr")]
        started = (workspace.folder, [str(word) for word in arguments], workspace.environment(**environment))
        self._process = FORKING.Process(target=_run, args=(*started, largest_file, *streams))
        self._process.start()
        for stream in streams:
            stream.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.join()
        _ = self._written

    def communicate(self, *, timeout: float = TIMEOUT) -> tuple[str, str]:
        """What it has written when it ends, to files."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired("bnprobe", timeout)
        return self._written

    @cached_property
    def _written(self) -> tuple[str, str]:
        """Of a process that has ended."""
        stdout, stderr = (_text(file) for file in self._seen.values())
        return stdout, stderr


def start(workspace: Workspace, *arguments: str | Path, largest_file: int | None = None) -> Forked:
    """Start ``bnprobe`` and go on."""
    return Forked(workspace, arguments, {}, largest_file=largest_file)


def run_on_a_full_disk(workspace: Workspace, *arguments: str | Path, largest_file: int) -> Result:
    """Run ``bnprobe`` where no file can grow beyond so many bytes."""
    (result,) = Launch([start(workspace, *arguments, largest_file=largest_file)]).results()
    return result


@dataclass(frozen=True)
class Launch:
    """Processes under way, in the order of their ranks."""

    processes: Sequence[Forked | subprocess.Popen[str]]

    def results(self) -> list[Result]:
        """What each left behind; a process that hangs fails the test, and none outlives it."""
        try:
            found: list[Result] = []
            for process in self.processes:
                stdout, stderr = process.communicate(timeout=TIMEOUT)
                print(f"[process {len(found)}]\n{stdout}{stderr}[exit {process.returncode}]")
                assert process.returncode is not None
                found.append(Result(process.returncode, stdout, stderr))
            return found
        finally:
            for process in self.processes:
                process.kill()


def launch(workspace: Workspace, size: int, *arguments: str | Path, **environment: str) -> Launch:
    """Start ``bnprobe`` with these arguments ``size`` times, with the environment of torchrun."""
    return Launch([Forked(workspace, arguments, {**rank, **environment}) for rank in rank_environments(size)])


def launch_installed(workspace: Workspace, size: int, *arguments: str | Path) -> Launch:
    """The same with the installed script: torch shows some warnings only in processes that were forked."""
    return Launch([workspace.start_installed(*arguments, **rank) for rank in rank_environments(size)])


def _run(
    folder: Path,
    arguments: list[str],
    environment: dict[str, str],
    largest_file: int | None,
    stdout: Connection,
    stderr: Connection,
) -> None:
    """In the new process: look like one that a shell has started, and run the command."""
    for text, stream in ((sys.stdout, stdout), (sys.stderr, stderr)):
        os.dup2(stream.fileno(), text.fileno())
        stream.close()
        text.reconfigure(line_buffering=text.isatty())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest_file is not None:
        sys.dont_write_bytecode = True  # Python would keep the beginning of a module, and fail at it ever after
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["bnprobe", *arguments]
    torch.set_num_threads(1)
    main()


def _text(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode()
