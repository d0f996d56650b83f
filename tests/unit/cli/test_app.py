"""How the command ends where a command of it fails in a way nobody foresaw, or is interrupted."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bnprobe.errors import EXIT_ERROR, EXIT_NOTHING

BROKEN = """
import sys

from bnprobe.cli.app import app, main


@app.command()
def broken() -> None:
    raise {error}


sys.argv = ["bnprobe", "broken"]
main()
"""


def ended_by(error: str) -> subprocess.CompletedProcess[str]:
    """The command line, with one more command that raises this."""
    command = [sys.executable, "-c", BROKEN.format(error=error)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)


@pytest.mark.parametrize("error", ["ZeroDivisionError('by 0')", "EOFError('by 0')", "OSError(5, 'by 0')"])
def test_a_defect_is_no_finding(error: str) -> None:
    found = ended_by(error)
    assert (found.returncode, found.stdout) == (EXIT_ERROR, "")
    assert "in broken\n" in found.stderr
    assert "by 0" in found.stderr
    assert found.stderr.endswith("\nbnprobe: internal error; please report it with the lines above.\n")


def test_an_interrupt_says_nothing_that_it_cannot_know() -> None:
    found = ended_by("KeyboardInterrupt")
    assert (found.returncode, found.stdout, found.stderr) == (EXIT_NOTHING, "", "bnprobe: error: Interrupted.\n")
