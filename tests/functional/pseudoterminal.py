"""Run a command whose stdout or stderr is a terminal of a given width."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
from typing import Literal

from functional.command import Result, Workspace
from functional.processes import Forked


def run_in_terminal(
    workspace: Workspace, *arguments: str, stream: Literal["stdout", "stderr"], columns: int = 80, **environment: str
) -> Result:
    """Run ``bnprobe`` with one stream on a terminal and the other in a file."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = Forked(workspace, arguments, environment, terminals={stream: slave})
    os.close(slave)
    seen = _read(master)
    written = dict(zip(("stdout", "stderr"), command.communicate(), strict=True)) | {stream: seen}
    assert command.returncode is not None
    return Result(command.returncode, **written)


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
