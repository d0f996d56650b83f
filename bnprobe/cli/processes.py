"""The command line in several processes of a torchrun launch: one output and one exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from bnprobe.cli.streams import say
from bnprobe.errors import EXIT_ERROR, EXIT_NOTHING, ProcessError, UsageError

if TYPE_CHECKING:
    from bnprobe.distributed import World

Ends = Callable[[int], int | None]
"""Announces the exit code of the command; returns None, or the code that another process announced before."""

TOGETHER = ("scan", "convert")
"""Commands that can run in several processes."""


def several_processes() -> bool:
    """Whether this is one of several processes, as in ``distributed.launched`` but without importing torch."""
    return "MASTER_ADDR" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_main() -> bool:
    """Whether this process writes the output."""
    return not several_processes() or os.environ.get("RANK", "0") == "0"


def refuse_together(command: str | None) -> None:
    """Reject a command that cannot run in several processes.

    Raises:
        UsageError: The command was started in several processes.
    """
    if several_processes() and command is not None and command not in TOGETHER:
        raise UsageError(f"bnprobe {command} runs in one process only: start it without torchrun.")


def run_together(run: Callable[[Ends], None]) -> NoReturn:
    """Run the command line in every process of the launch, and end all with the same exit code.

    The first process to fail prints the reason; the others exit silently as soon as they notice. Only process 0 writes
    to stdout. SIGTERM acts like Ctrl-C: what was measured so far is reported.

    Args:
        run: Runs the command and raises SystemExit.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides warnings meant for authors of training loops
    from bnprobe.distributed import connected

    if not is_main():
        _silence_stdout()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a launcher in the background ignores it
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        with connected() as world:
            code = _run_as_one(run, world)
    except ProcessError as error:
        say(f"bnprobe: error: {error}")
        code = EXIT_ERROR
    except KeyboardInterrupt:
        say("bnprobe: error: Interrupted.")
        code = EXIT_NOTHING
    sys.exit(code)


def _run_as_one(run: Callable[[Ends], None], world: World) -> int:
    """Run the command and return the exit code of all processes."""
    board = world.board
    if board is None:
        return _code_of(run, _alone)
    failed: list[int] = []

    def ends(code: int) -> int | None:
        earlier = board.end(code)
        failed.append(code if earlier is None else earlier)
        return earlier

    board.watch(_leave)
    code = _code_of(run, ends)
    # Process 0 answers Ctrl-C if it still runs; a launcher ends all processes as soon as one ends with an error.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if failed:
        board.farewell()
        return failed[0]
    code = world.share(code)
    board.close()
    world.wait()
    return code


def _code_of(run: Callable[[Ends], None], ends: Ends) -> int:
    try:
        run(ends)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _alone(code: int) -> None:
    return None


def _leave(code: int) -> NoReturn:
    """End this process at once, from a thread: another process has failed, and nothing is left to do."""
    sys.stderr.flush()
    os._exit(code)


def _as_interrupt(number: int, frame: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def _silence_stdout() -> None:
    """Discard all output to stdout, including that of the user's code and of libraries outside Python."""
    if sys.stdout is not None:
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def share_processors() -> None:
    """Let idle OpenMP threads sleep early, unless the user has set this. Call it before torch is imported.

    By default they spin for milliseconds after every kernel. If another process (a loader's worker, another CI job)
    used the same cores, this made a scan of a small network 10 to 25 times slower; alone it is equally fast.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
