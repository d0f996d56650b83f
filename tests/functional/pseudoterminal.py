"""Run a command whose stdout or stderr is a terminal of a given width."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from typing import Literal

from functional.command import COMMAND, TIMEOUT, Result, Workspace


def run_in_terminal(
    workspace: Workspace, *arguments: str, stream: Literal["stdout", "stderr"], columns: int = 80, **environment: str
) -> Result:
    """Run ``bnprobe`` with one stream on a terminal and the other in a pipe."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: slave}
    command = subprocess.Popen(
        [str(COMMAND), *arguments],
        cwd=workspace.folder,
        env=workspace.environment(**environment),
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        **streams,
    )
    os.close(slave)
    seen = _read(master)
    piped = command.communicate(timeout=TIMEOUT)
    stdout, stderr = (text if text is not None else seen for text in piped)
    return Result(command.returncode, stdout, stderr)


def _read(master: int) -> str:
    """Everything until the last writer is gone, with plain line ends."""
    parts = []
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux ends a terminal with an error
            break
        if not part:
            break
        parts.append(part)
    os.close(master)
    return b"".join(parts).decode().replace("\r\n", "\n")
