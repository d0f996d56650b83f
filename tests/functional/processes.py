"""Start ``bnprobe`` in several processes, as a launcher does: the environment of torchrun, without its own seconds."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from functional.command import TIMEOUT, Result, Workspace


@dataclass(frozen=True)
class Launch:
    """Processes under way, in the order of their ranks."""

    processes: list[subprocess.Popen[str]]

    def results(self) -> list[Result]:
        """What each left behind; a process that hangs fails the test, and none outlives it."""
        try:
            found = []
            for process in self.processes:
                stdout, stderr = process.communicate(timeout=TIMEOUT)
                print(f"[process {len(found)}]\n{stdout}{stderr}[exit {process.returncode}]")
                found.append(Result(process.returncode, stdout, stderr))
            return found
        finally:
            for process in self.processes:
                process.kill()


def launch(workspace: Workspace, size: int, *arguments: str | Path) -> Launch:
    """Start ``python -m bnprobe`` with these arguments ``size`` times."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return Launch(
        [_start(workspace, {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}, arguments) for rank in range(size)]
    )


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(workspace: Workspace, environment: dict[str, str], arguments: tuple[Any, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bnprobe", *map(str, arguments)],
        cwd=workspace.folder,
        env=workspace.environment(**environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
